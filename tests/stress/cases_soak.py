"""A soak: random calls of every kind from everyone to everyone; every result is checked, none is lost, nothing grows.

Set by $RPC_SOAK_CALLS, of all ranks together, and $RPC_SOAK_SEED. Which calls are made depends on the seed alone.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from harness import World, case, equal, eventually, in_threads
from soak_service import (
    Held,
    Piece,
    elsewhere,
    executions,
    fail,
    nested,
    pattern,
    read_as_owner,
    read_as_user,
    script_flip,
    take_and_return,
)
from torch.distributed.rpc import api
from torch.futures import Future

RANKS, CALLERS, DEPTH = 4, 8, 5
CALLS = int(os.environ.get("RPC_SOAK_CALLS", "40000"))
LIMIT = 240 + CALLS / 200
WARM_UP = 0.25  # of the calls, after which nothing may grow
WINDOW = 8  # calls of one caller at once

# Arguments: one in a hundred is large, and as often between 1 and 2 MiB as between 100 and 200 MiB, on average 300 kB a
# call. More calls than 200 000 have no more large ones than those.
SMALL, LARGE = 16 << 10, 256 << 20
CALLS_WITH_LARGE = min(CALLS, 200_000)
BYTES_IN_ALL = CALLS_WITH_LARGE * 300_000
LARGE_SHARE = 0.01 * CALLS_WITH_LARGE / CALLS
STARTS = 16 << 20  # of arguments, in what all of them are parts of
IN_FLIGHT = (2 << 30) // RANKS  # of one rank's arguments

# What the process may have more after all calls than after the first. Allocated: caches of the heap for more threads.
# Resident: also what malloc does not give back to the system, up to 64 MiB in each of its arenas, 8 of them for a core.
GROWTH_ALLOCATED, GROWTH_RESIDENT = 16 << 20, 512 << 20


class Bytes:
    """What one rank may have in flight, and may send in all."""

    def __init__(self, in_all: int) -> None:
        self._left, self._free = in_all, IN_FLIGHT
        self._changed = threading.Condition()

    def size(self, wanted: int) -> int:
        with self._changed:
            size = min(wanted, max(self._left, SMALL))
            self._left -= size
            return size

    def take(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count

    def give(self, count: int) -> None:
        with self._changed:
            self._free += count
            self._changed.notify_all()


class Soaker:
    """One thread's calls."""

    def __init__(self, world: World, seed: str, thread: int, in_all: Bytes) -> None:
        self.world, self.bytes = world, in_all
        self.random = random.Random(f"{seed}, rank {world.rank}, thread {thread}")
        self.executions = 0  # that the calls come to
        self.pending: list[tuple[Future, Callable[[Any], None]]] = []

    def run(self, count: int) -> None:
        kinds = {self.builtin: 4, self.function: 4, self.script: 3, self.nested: 2, self.remote: 2, self.owned: 2}
        kinds |= {self.elsewhere: 2, self.autograd: 1, self.failing: 1}
        for make in self.random.choices(list(kinds), list(kinds.values()), k=count):
            make()
            if len(self.pending) >= WINDOW:
                self.random.shuffle(self.pending)
                self.collect(WINDOW // 2)
        self.collect(0)

    # Kinds of calls

    def builtin(self) -> None:
        piece = self.piece(forms=("tensor", "strided"))
        self.later(rpc.rpc_async(self.anyone(), torch.bitwise_not, args=(piece.value(),)), piece, torch.bitwise_not)

    def function(self) -> None:
        piece = self.piece()
        self.executions += 1
        self.later(rpc.rpc_async(self.anyone(), take_and_return, args=(piece, piece.value())), piece)

    def script(self) -> None:
        piece = self.piece(forms=("tensor", "strided"))
        self.later(rpc.rpc_async(self.anyone(), script_flip, args=(piece.value(),)), piece, torch.bitwise_not)

    def nested(self) -> None:
        route = self.random.choices(self.world.everyone, k=self.random.randrange(1, DEPTH + 1))
        piece = self.piece(copies=len(route))
        self.executions += len(route)
        piece.check(rpc.rpc_sync(route[0], nested, args=(piece, piece.value(), route[1:])))
        self.give(piece, copies=len(route))

    def remote(self) -> None:
        piece = self.piece()
        self.executions += 1
        piece.check(rpc.remote(self.anyone(), take_and_return, args=(piece, piece.value())).to_here())
        self.give(piece)

    def owned(self) -> None:
        piece = self.piece(copies=2)
        self.executions += 2
        held = rpc.remote(self.anyone(), Held, args=(piece, piece.value()))
        way = self.random.randrange(3)
        if way == 0:
            piece.check(held.rpc_sync().read())
        elif way == 1:
            piece.check(rpc.rpc_sync(held.owner(), read_as_owner, args=(held,)))
        else:
            piece.check(rpc.rpc_sync(self.anyone(), read_as_user, args=(held,)))
        self.give(piece, copies=2)

    def elsewhere(self) -> None:
        piece = self.piece(copies=2)
        self.executions += 2
        future = rpc.rpc_async(self.anyone(), elsewhere, args=(piece, piece.value(), self.anyone()))
        self.later(future, piece, copies=2)

    def autograd(self) -> None:
        piece = self.piece(forms=("tensor",), largest=SMALL)
        x, y = piece.value().float().requires_grad_(), torch.rand(1, requires_grad=True)
        with dist_autograd.context() as context:
            dist_autograd.backward(context, [rpc.rpc_sync(self.anyone(), torch.mul, args=(x, y)).sum()])
            gradients = dist_autograd.get_gradients(context)
        equal(gradients[x], y.detach().expand_as(x))
        torch.testing.assert_close(gradients[y], x.detach().sum().reshape(1))

    def failing(self) -> None:
        self.executions += 1
        text = f"on purpose {self.executions}"
        with pytest.raises(ValueError, match=text):
            rpc.rpc_sync(self.anyone(), fail, args=(text,))

    # Their parts

    def anyone(self) -> str:
        return self.random.choice(self.world.everyone)

    def piece(
        self, forms: tuple[str, ...] = ("tensor", "strided", "bytes", "list"), largest: int = LARGE, copies: int = 1
    ) -> Piece:
        """An argument, for which there is room once this returns.

        Args:
            copies: how many there are of it at once.
        """
        if self.random.random() < LARGE_SHARE and largest > SMALL:
            wanted = int(math.exp(self.random.uniform(math.log(SMALL), math.log(largest))))
            size = self.bytes.size(min(wanted, IN_FLIGHT // copies))
            form = "list" if "list" in forms and self.random.random() < 0.5 else "tensor"
        else:
            size = int(math.exp(self.random.uniform(0, math.log(SMALL)))) - 1
            form = self.random.choice(forms)
        if size > SMALL:
            self.collect(0)  # so that nobody waits for room that only itself could make
            self.bytes.take(size * copies)
        return Piece(self.random.randrange(STARTS), size, form)

    def give(self, piece: Piece, copies: int = 1) -> None:
        if piece.size > SMALL:
            self.bytes.give(piece.size * copies)

    def later(
        self, future: Future, piece: Piece, undo: Callable[[Any], Any] = lambda value: value, copies: int = 1
    ) -> None:
        def check(value: Any) -> None:
            piece.check(undo(value))
            self.give(piece, copies)

        self.pending.append((future, check))

    def collect(self, keep: int) -> None:
        while len(self.pending) > keep:
            future, check = self.pending.pop()
            check(future.wait())


class _MallocInfo(ctypes.Structure):
    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


class Usage(NamedTuple):
    """What the process has when no call is under way."""

    allocated: int
    resident: int
    descriptors: int
    threads: int  # beside the engine's, of which there are more as more requests run at once

    @staticmethod
    def now() -> Usage:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        libc.mallinfo2.restype = _MallocInfo
        info = libc.mallinfo2()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        threads = len(os.listdir("/proc/self/task"))
        allocated = info.uordblks + info.hblkhd
        return Usage(allocated, resident, len(os.listdir("/proc/self/fd")), threads - metric("engine_threads"))


def metric(name: str) -> int:
    return int(api._get_current_rpc_agent().get_metrics()[f"mpi.{name}"])


def come_to_rest(world: World) -> Usage:
    """Once nothing is under way at any rank, what this one has."""
    world.barrier(LIMIT)
    gc.collect()
    for key in ("num_owner_rrefs", "num_pending_users", "num_forks"):
        eventually(lambda key=key: int(rpc._rref_context_get_debug_info()[key]) == 0, f"{key} is 0")
    # What tensors were received into is kept for a few seconds.
    for name in ("pending_calls", "request_queue", "send_queue", "bulk_in_flight", "receive_pool_bytes"):
        eventually(lambda name=name: metric(name) == 0, f"{name} is 0")
    usage = Usage.now()
    world.barrier()
    return usage


@case(
    sizes=(RANKS,),
    limit=LIMIT,
    options={"rpc_timeout": LIMIT, "num_worker_threads": RANKS * CALLERS * (DEPTH + 1)},  # one for each hop
)
def soak(world: World) -> None:
    if world.rank == 0:
        world.signal("seed", os.environ.get("RPC_SOAK_SEED") or str(random.SystemRandom().randrange(10**9)))
    seed = world.wait("seed")
    try:
        make_calls(world, seed)
    finally:
        print(f"soak: RPC_SOAK_SEED={seed} RPC_SOAK_CALLS={CALLS}", flush=True)


def make_calls(world: World, seed: str) -> None:
    generator = torch.Generator().manual_seed(random.Random(seed).randrange(2**60))
    words = torch.randint(2**62, ((STARTS + LARGE + SMALL) // 8,), generator=generator)
    pattern[:] = [words.view(torch.uint8)]
    in_all = Bytes(BYTES_IN_ALL // RANKS)
    soakers = [Soaker(world, seed, thread, in_all) for thread in range(CALLERS)]

    def make(calls: float) -> Usage:
        in_threads(CALLERS, lambda thread: soakers[thread].run(round(calls / RANKS / CALLERS)))
        return come_to_rest(world)

    world.barrier()
    begin = time.monotonic()
    before = make(WARM_UP * CALLS)
    after = make((1 - WARM_UP) * CALLS)
    engine = metric("engine_threads")
    print(f"soak: {time.monotonic() - begin:.1f} s, {engine} engine threads; before {before}, after {after}")
    assert after.allocated - before.allocated <= GROWTH_ALLOCATED
    assert after.resident - before.resident <= GROWTH_RESIDENT
    assert after.descriptors <= before.descriptors
    assert after.threads <= before.threads
    # Each function was executed once, by whomever.
    world.signal(f"rank {world.rank}", f"{sum(soaker.executions for soaker in soakers)} {executions.value}")
    told = [world.wait(f"rank {rank}").split() for rank in range(world.size)]
    equal(sum(int(done) for _, done in told), sum(int(asked) for asked, _ in told))
    # Nothing would be left if all ranks were killed now.
    if not world.launched:
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]
        equal([line for line in mapped if not line.endswith("(deleted)")], [])
    pattern.clear()
