"""The end of RRefs: the owner forgets a value when the last copy is gone.

The counts are torch's own. Messages that delete travel after the call that caused them, so they are polled for.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_calls import identity
from cases_rref import fetch
from harness import World, case, debug_info, equal, eventually, signal_and_wait
from torch.distributed.rpc import RRef

held: list[RRef] = []


def hold(rref: RRef) -> None:
    held.append(rref)


def let_go() -> None:
    held.clear()


def fetch_held() -> Any:
    return held[0].to_here()


def settle(world: World) -> None:
    """Waits, on all ranks, until nothing is left of earlier RRefs."""
    for key in ("num_owner_rrefs", "num_pending_users", "num_pending_futures", "num_forks"):
        eventually(lambda key=key: debug_info(key) == 0, f"{key} is 0")
    world.barrier()


@case()
def owner_forgets_when_the_last_user_does(world: World) -> None:
    rrefs = [rpc.remote(world.next, identity, args=(i,)) for i in range(10)]
    equal([rref.to_here() for rref in rrefs], list(range(10)))
    world.barrier()
    equal(debug_info("num_owner_rrefs"), 10)
    world.barrier()
    del rrefs
    settle(world)


@case()
def a_copy_keeps_the_value_alive(world: World) -> None:
    third = world.name(world.rank + 2)
    rref = rpc.remote(world.next, identity, args=("kept",))
    rpc.rpc_sync(third, hold, args=(rref,))
    del rref
    world.barrier()
    equal(rpc.rpc_sync(third, fetch_held), "kept")
    equal(debug_info("num_owner_rrefs"), 1)
    world.barrier()
    rpc.rpc_sync(third, let_go)
    settle(world)


@case()
def a_shared_local_rref_is_released(world: World) -> None:
    rref = RRef("mine")
    equal(debug_info("num_owner_rrefs"), 0)
    world.barrier()
    rpc.rpc_sync(world.next, hold, args=(rref,))
    equal(debug_info("num_owner_rrefs"), 1)
    equal(rpc.rpc_sync(world.next, fetch_held), "mine")
    world.barrier()
    rpc.rpc_sync(world.next, let_go)
    settle(world)
    equal(rref.local_value(), "mine")


@case()
def many_rrefs_leave_nothing(world: World) -> None:
    for _ in range(3):
        rrefs = [rpc.remote(world.name(i), torch.add, args=(torch.ones(2), i)) for i in range(60)]
        for i, rref in enumerate(rrefs):
            equal(rpc.rpc_sync(world.name(i + 1), fetch, args=(rref,)), torch.full((2,), i + 1.0))
    del rrefs, rref
    settle(world)


@case()
def remote_calls_dropped_at_once_leave_nothing(world: World) -> None:
    """The user deletes its RRef before the owner has confirmed it."""
    for i in range(100):
        rpc.remote(world.name(i), identity, args=(i,))
    world.barrier()
    settle(world)


def return_after(started: Any, go: Any, value: Any) -> Any:
    signal_and_wait(started, go)
    return value


@case(
    each=(False, True),
    sizes=(1, 4),
    tensorpipe="what a late answer holds stays for ever, and so does a graceful shutdown",
)
def rrefs_of_late_answers_are_let_go_of(world: World, recorded: bool) -> None:
    started, go = world.event("started"), world.event("go")
    mine, theirs = RRef("mine"), rpc.remote(world.next, identity, args=("theirs",))
    equal(theirs.to_here(), "theirs")
    with dist_autograd.context() if recorded else contextlib.nullcontext():
        answer = rpc.rpc_async(world.next, return_after, args=(started, go, [mine, theirs]), timeout=0.2)
        started.wait()
        with pytest.raises(RuntimeError, match="RPC ran for more than"):
            answer.wait()
        go.signal()
        del mine, theirs
        settle(world)


@case()
def a_remote_call_given_up_leaves_nothing(world: World) -> None:
    """The caller lets go of its RRef while the owner still runs the function."""
    started, go = world.event("started"), world.event("go")
    rref = rpc.remote(world.next, signal_and_wait, args=(started, go), timeout=0.2)
    started.wait()
    with pytest.raises(RuntimeError, match="RPC ran for more than"):
        rref._get_future().wait()
    del rref
    eventually(lambda: debug_info("num_pending_futures") == 0, "the owner has been told")
    go.signal()
    world.barrier()
    eventually(lambda: debug_info("agent.server_active_calls") == 0, "the function has ended")
    settle(world)
