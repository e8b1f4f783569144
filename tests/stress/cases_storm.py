"""Storms: calls of every kind and size, from many threads to everyone, each answer checked; bounded in time."""

from __future__ import annotations

import os
import random
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from harness import World, case, equal, eventually, in_threads
from torch import Tensor
from torch.futures import Future

SECONDS = float(os.environ.get("RPC_STRESS_SECONDS", "20"))
LIMIT = 4 * SECONDS + 120
# Around the eager limit and the chunk size, where the way that bytes take changes.
SIZES = [0, 1, 7, 100, 4000, 16383, 16384, 16385, 100_000, 1_000_000, 4 * 2**20 - 1, 4 * 2**20 + 1]
WEIGHTS = [4, 8, 8, 8, 8, 4, 4, 4, 4, 2, 1, 1]


def checksum(value: Any) -> int:
    """Of the position and value of every byte, so that none can be lost, doubled or displaced."""
    if isinstance(value, Tensor):
        flat = value.flatten().to(torch.int64)
        return int((flat * (torch.arange(len(flat)) % 8191 + 1)).sum()) % 2**61
    if isinstance(value, bytes):
        return checksum(torch.frombuffer(bytearray(value), dtype=torch.uint8)) if value else 0
    return sum((index + 1) * checksum(item) for index, item in enumerate(value)) % 2**61


def make(generator: random.Random) -> Any:
    size = generator.choices(SIZES, WEIGHTS)[0]
    seed = generator.randrange(2**31)
    tensor = torch.randint(256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    kind = generator.randrange(4)
    if kind == 0:
        return tensor[:: generator.randrange(1, 4)]
    if kind == 1:
        return bytes(tensor[:100_000].tolist())
    if kind == 2:
        return [tensor[: generator.randrange(size + 1)] for _ in range(generator.randrange(6))]
    return tensor


def check_and_return(value: Any, expected: int) -> tuple[Any, int]:
    actual = checksum(value)
    if actual != expected:
        raise AssertionError(f"{rpc.get_worker_info()} received checksum {actual} instead of {expected}")
    return value, actual


def nested(value: Any, expected: int, route: list[str]) -> tuple[Any, int]:
    check_and_return(value, expected)
    if not route:
        return value, expected
    return rpc.rpc_sync(route[0], nested, args=(value, expected, route[1:]))


@rpc.functions.async_execution
def elsewhere(value: Any, expected: int, to: str) -> Future[Any]:
    return rpc.rpc_async(to, check_and_return, args=(value, expected)).then(lambda future: future.wait())


def fail(text: str) -> None:
    raise ValueError(text)


@torch.jit.script
def script_flip(x: Tensor) -> Tensor:
    return 255 - x


class Storm:
    """One thread's share: makes random calls until the time is over, and checks what comes back."""

    def __init__(self, world: World, thread: int, depth: int) -> None:
        self.world, self.depth = world, depth
        self.random = random.Random(1000 * world.rank + thread)
        self.calls = 0
        self.pending: list[tuple[Future, Callable[[Any], None]]] = []

    def run(self) -> int:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            self.call()
            if len(self.pending) > 20:
                self.random.shuffle(self.pending)
                self.collect(10)
        self.collect(0)
        return self.calls

    def call(self) -> None:
        self.calls += 1
        to = self.random.choice(self.world.everyone)
        value = make(self.random)
        expected = checksum(value)
        kind = self.random.choices(range(7), [6, 4, 3, 2, 2, 2, 1])[0]
        if kind == 0:
            self.later(rpc.rpc_async(to, check_and_return, args=(value, expected)), lambda r: same(r, expected))
        elif kind == 1:
            same(rpc.rpc_sync(to, check_and_return, args=(value, expected)), expected)
        elif kind == 2 and isinstance(value, Tensor):
            flipped = checksum(255 - value)
            self.later(rpc.rpc_async(to, script_flip, args=(value,)), lambda r: equal(checksum(r), flipped))
        elif kind == 3 and isinstance(value, Tensor):
            self.later(rpc.rpc_async(to, torch.bitwise_not, args=(value,)), lambda r: equal(checksum(~r), expected))
        elif kind == 4:
            route = self.random.choices(self.world.everyone, k=self.random.randrange(self.depth))
            same(rpc.rpc_sync(to, nested, args=(value, expected, route)), expected)
        elif kind == 5:
            arguments = (value, expected, self.random.choice(self.world.everyone))
            self.later(rpc.rpc_async(to, elsewhere, args=arguments), lambda r: same(r, expected))
        else:
            with pytest.raises(ValueError, match=f"storm {self.calls}"):
                rpc.rpc_sync(to, fail, args=(f"storm {self.calls}",))

    def later(self, future: Future, check: Callable[[Any], None]) -> None:
        self.pending.append((future, check))

    def collect(self, keep: int) -> None:
        while len(self.pending) > keep:
            future, check = self.pending.pop()
            check(future.wait())


def same(result: tuple[Any, int], expected: int) -> None:
    value, there = result
    equal((checksum(value), there), (expected, expected))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@case(sizes=(2, 4, 6), limit=LIMIT, options={"rpc_timeout": LIMIT})
def storm(world: World) -> None:
    # Nested calls hold a thread at every hop: few enough that all callers together cannot use them all up.
    calls = in_threads(3, lambda thread: Storm(world, thread, depth=3).run())
    print(f"{sum(calls)} calls of rank {world.rank}, peak memory {peak_bytes() >> 20} MiB", flush=True)
    assert peak_bytes() < 4 * 2**30


# In the session of the storm before: torch's RRefs work in the first session of a process only.


class Cell:
    """A remote object that many write to."""

    def __init__(self) -> None:
        self.lock, self.total = threading.Lock(), 0

    def add(self, amount: int) -> int:
        with self.lock:
            self.total += amount
            return self.total


@case(limit=LIMIT, options={"rpc_timeout": LIMIT})
def storm_of_rrefs(world: World) -> None:
    """RRefs made, shared and dropped; every update counts once, and at the end no value is left."""
    end, generator = time.monotonic() + SECONDS, random.Random(world.rank)
    while time.monotonic() < end:
        cells = [rpc.remote(generator.choice(world.everyone), Cell) for _ in range(10)]
        amounts = [generator.randrange(100) for _ in range(10)]
        futures = [
            rpc.rpc_async(generator.choice(world.everyone), add_through, args=(cell, amount))
            for cell, amount in zip(cells, amounts, strict=True)
        ]
        torch.futures.wait_all(futures)
        equal([cell.rpc_sync().add(0) for cell in cells], amounts)
    del cells, futures
    eventually(lambda: int(rpc._get_debug_info()["num_owner_rrefs"]) == 0, "all values are gone", timeout=60)


def add_through(cell: rpc.RRef, amount: int) -> int:
    return cell.rpc_sync().add(amount)


@case(limit=LIMIT, options={"rpc_timeout": LIMIT, "num_worker_threads": 64})
def storm_of_nested_calls(world: World) -> None:
    in_threads(2, lambda thread: Storm(world, thread, depth=8).run())


@case(limit=LIMIT, options={"rpc_timeout": LIMIT})
def storm_into_one(world: World) -> None:
    """Everyone floods rank 0 with small calls; nothing may be lost, and memory stays bounded."""
    end, calls = time.monotonic() + SECONDS, 0
    while time.monotonic() < end and world.rank != 0:
        futures = [rpc.rpc_async(world.name(0), check_and_return, args=(b"\x01" * 64, 2080)) for _ in range(500)]
        for future in futures:
            same(future.wait(), 2080)
        calls += len(futures)
    print(f"{calls} calls of rank {world.rank}, peak memory {peak_bytes() >> 20} MiB", flush=True)
    assert peak_bytes() < 4 * 2**30


@case(limit=LIMIT, options={"rpc_timeout": LIMIT})
def storm_of_timeouts(world: World) -> None:
    """Calls that run out while their answers come; every one ends with its own answer or with the timeout."""
    end, ended = time.monotonic() + SECONDS, {"answered": 0, "timed out": 0}
    generator = random.Random(world.rank)
    while time.monotonic() < end:
        futures = []
        for _ in range(50):
            value = make(generator)
            expected = checksum(value)
            timeout = generator.choice((0.001, 0.003, 0.01, 0.05, 0))
            to = generator.choice(world.everyone)
            futures.append((expected, rpc.rpc_async(to, check_and_return, args=(value, expected), timeout=timeout)))
        for expected, future in futures:
            try:
                result = future.wait()
            except RuntimeError as error:
                assert "RPC ran for more than set timeout" in str(error)  # noqa: PT017 (it need not happen)
                ended["timed out"] += 1
            else:
                same(result, expected)
                ended["answered"] += 1
    print(ended, flush=True)
    assert all(ended.values())


@case(limit=LIMIT, options={"rpc_timeout": LIMIT})
def storm_of_autograd(world: World) -> None:
    def train(thread: int) -> None:
        end, generator = time.monotonic() + SECONDS, random.Random(10 * world.rank + thread)
        while time.monotonic() < end:
            n = generator.choice((2, 30, 100, 300))
            x, y = (torch.rand(n, n, requires_grad=True) for _ in range(2))
            with dist_autograd.context() as context:
                product = rpc.rpc_sync(generator.choice(world.everyone), torch.mm, args=(x, y))
                total = rpc.rpc_sync(generator.choice(world.everyone), torch.mul, args=(product, x)).sum()
                dist_autograd.backward(context, [total])
                gradients = dist_autograd.get_gradients(context)
            for leaf, expected in zip((x, y), torch.autograd.grad((torch.mm(x, y) * x).sum(), (x, y)), strict=True):
                torch.testing.assert_close(gradients[leaf], expected)

    in_threads(3, train)


@case(session=False, limit=LIMIT)
def storm_of_sessions(world: World) -> None:
    end, sessions = time.monotonic() + SECONDS, 0
    while True:
        world.init(num_worker_threads=1 + sessions % 8)
        for _ in range(20):
            to, value = world.name(sessions), b"\x01" * 64
            same(rpc.rpc_sync(to, check_and_return, args=(value, 2080)), 2080)
        world.barrier()
        rpc.shutdown(graceful=sessions % 2 == 0)
        if world.rank == 0:
            world.signal(f"after {sessions}", "stop" if time.monotonic() > end else "go on")
        if world.wait(f"after {sessions}") == "stop":
            break
        sessions += 1
