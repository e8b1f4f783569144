"""Worlds of three ranks that lose one in some state. What is left goes on. Run by test_losses.py: see losses.py."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from losses import AT_ONCE, LIMIT, SIZE, Rank, identity, main, moment, until
from torch.distributed.rpc import api

__all__ = ["main"]

FREED_WITHIN = 10.0  # seconds; a second is promised, where there is a core for it
ALL_WAYS = ("is_killed", "crashes", "exits_at_once", "raises", "is_terminated")
GIBIBYTE = 1 << 30

# How it ended, in the words of the others. One that says goodbye has not crashed.
CAUSES = {"raises": "it has left"}
CAUSE = "its process has ended without leaving"


def state(function: Callable[[Rank], None]) -> None:
    """A state of rank 1 that ends in each of the ways, and of rank 0 that is killed in it."""
    moment(ways=ALL_WAYS, ranks=(1,))(function)
    moment(ranks=(0,))(function)


def call_fails(rank: Rank, wait: Callable[[], Any]) -> None:
    began = time.monotonic()
    host, cause = socket.gethostname(), CAUSES.get(rank.case.way, CAUSE)
    whom = rf"RPC to worker '{rank.lost_name}' \(rank {rank.case.lost} on host {host}\) failed: {cause}"
    with pytest.raises(RuntimeError, match=whom):
        wait()
    took = time.monotonic() - max(rank.lost_at(), began)
    assert took < AT_ONCE, f"after {took:.2f} s"


def call_until_it_fails(rank: Rank) -> None:
    """One that raises serves until it leaves, one that crashes until its stacks are written."""
    rank.await_loss()

    def call() -> None:
        while True:
            rpc.rpc_sync(rank.lost_name, identity, args=(1,))

    call_fails(rank, call)


def goes_on(rank: Rank, *pending: torch.futures.Future) -> None:
    """What was called fails, and so does what is called; between the others all is well, now and in a later session."""
    for future in pending:
        call_fails(rank, future.wait)
    call_until_it_fails(rank)
    call_fails(rank, lambda: rpc.rpc_sync(rank.lost_name, identity, args=(1,)))
    (other,) = rank.survivors - {f"worker{rank.rank}"}
    for size in (1, 1 << 18):
        value = torch.arange(size) + rank.rank
        assert torch.equal(rpc.rpc_sync(other, identity, args=(value,)), value)
    until(holds_nothing, FREED_WITHIN)
    rank.await_survivors()
    rpc.shutdown(graceful=False)
    rank.begin(rank.rank - (rank.rank > rank.case.lost), SIZE - 1)
    assert set(api._all_gather(None)) == rank.survivors
    rpc.shutdown()


def holds_nothing() -> bool:
    rrefs = rpc._rref_context_get_debug_info()
    contexts = dist_autograd._get_debug_info()["num_autograd_contexts"]
    return int(contexts) == sum(int(rrefs[key]) for key in ("num_owner_rrefs", "num_forks")) == 0


def bytes_move() -> bool:
    """Whether a large transfer has begun and goes on, here."""
    return int(api._get_current_rpc_agent().get_metrics()["mpi.bulk_in_flight"]) > 0


@state
def when_idle(rank: Rank) -> None:
    if rank.is_lost:
        rank.lose()
    goes_on(rank)


_calls: list[None] = []


def run_for_ever() -> None:
    _calls.append(None)
    time.sleep(LIMIT)


@state
def when_executing(rank: Rank) -> None:
    if rank.is_lost:
        until(lambda: len(_calls) == SIZE - 1)
        rank.lose()
    goes_on(rank, rpc.rpc_async(rank.lost_name, run_for_ever))


@rpc.functions.async_execution
def never() -> torch.futures.Future:
    return torch.futures.Future()


@state
def when_sending(rank: Rank) -> None:
    if rank.is_lost:
        sent = [rpc.rpc_async(name, torch.numel, args=(torch.empty(GIBIBYTE // 4),)) for name in rank.survivors]
        until(bytes_move)
        rank.lose()
        del sent
    goes_on(rank, rpc.rpc_async(rank.lost_name, never))


@state
def when_receiving(rank: Rank) -> None:
    if rank.is_lost:
        until(bytes_move)
        rank.lose()
    goes_on(rank, rpc.rpc_async(rank.lost_name, torch.numel, args=(torch.empty(GIBIBYTE // 4),)))


@state
def when_owner_of_rrefs(rank: Rank) -> None:
    if rank.is_lost:
        until(lambda: len(_kept) == SIZE - 1)
        rank.lose()
    rref = rpc.remote(rank.lost_name, identity, args=(1,))
    assert rref.to_here() == 1
    (other,) = rank.survivors - {f"worker{rank.rank}"}
    rpc.rpc_sync(other, keep, args=(rref,))
    rpc.rpc_sync(rank.lost_name, keep, args=(rref,))
    call_until_it_fails(rank)
    until(lambda: len(_kept) == 1)  # the other one's
    for each in (rref, *_kept):
        call_fails(rank, each.to_here)
    _kept.clear()
    goes_on(rank)


_kept: list[Any] = []


def keep(rref: Any) -> None:
    _kept.append(rref)


@state
def when_user_of_rrefs(rank: Rank) -> None:
    """Of those that it has made, that it was given by the owner, and that it was given by another user."""
    if rank.is_lost:
        made = [rpc.remote(name, identity, args=(torch.ones(1),)) for name in rank.survivors]
        for rref in made:
            rref.to_here()
        until(lambda: len(_kept) == 2 * len(rank.survivors))
        rank.lose()
        del made
    (other,) = rank.survivors - {f"worker{rank.rank}"}
    for rref in (rpc.RRef(torch.ones(1)), rpc.remote(other, identity, args=(torch.ones(1),))):
        rpc.rpc_sync(rank.lost_name, keep, args=(rref,))
    del rref
    goes_on(rank)


@state
def when_in_a_context_of_autograd(rank: Rank) -> None:
    """Its own, and one that another worker has opened."""
    ones = torch.ones(2, requires_grad=True)
    if rank.is_lost:
        with dist_autograd.context():
            for name in rank.survivors:
                rpc.rpc_sync(name, torch.add, args=(ones, ones))
            until(lambda: int(dist_autograd._get_debug_info()["num_autograd_contexts"]) == SIZE)
            rank.lose()
    with dist_autograd.context() as context:
        loss = rpc.rpc_sync(rank.lost_name, torch.add, args=(ones, ones)).sum()
        call_until_it_fails(rank)
        with pytest.raises(RuntimeError, match=f"'{rank.lost_name}' .*{CAUSES.get(rank.case.way, CAUSE)}"):
            dist_autograd.backward(context, [loss])
    goes_on(rank)
