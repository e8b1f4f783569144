"""Timeouts: the default, per call, none, and what remains of a call that ran out."""

from __future__ import annotations

import math
import re
import time
import weakref
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from cases_calls import APIS, identity
from cases_rref import Account
from harness import SESSION_OPTIONS, World, case, equal, eventually, in_threads, signal_and_wait, wait


def ran_out(milliseconds: int | str = r"\d+") -> str:
    """torch's text."""
    return rf"RPC ran for more than set timeout \({milliseconds} ms\) and will now be marked with an error"


@case(each=("sync", "async"), sizes=(1, 4))
def per_call(world: World, api: str) -> None:
    go = world.event("go")
    with pytest.raises(RuntimeError, match=ran_out(100)):
        APIS[api](world.next, wait, args=(go,), timeout=0.1)
    with pytest.raises(RuntimeError, match=ran_out(1)):
        APIS[api](world.next, wait, args=(go,), timeout=0.001)
    go.signal("done")
    equal(APIS[api](world.next, wait, args=(go,), timeout=20), "done")
    equal(APIS[api](world.next, wait, args=(go,), timeout=0), "done")


@case()
def default_of_the_session(world: World) -> None:
    equal(rpc.get_rpc_timeout(), SESSION_OPTIONS["rpc_timeout"])


@case(options={"rpc_timeout": 0.2}, sizes=(2,))
def default_from_the_options(world: World) -> None:
    assert rpc.get_rpc_timeout() == pytest.approx(0.2)
    go = world.event("go")
    with pytest.raises(RuntimeError, match=ran_out(200)):
        rpc.rpc_sync(world.next, wait, args=(go,))
    go.signal("done")
    rpc._set_rpc_timeout(SESSION_OPTIONS["rpc_timeout"])  # shutdown's own calls need more
    equal(rpc.rpc_sync(world.next, wait, args=(go,)), "done")


@case()
def default_set_later(world: World) -> None:
    """It holds for calls made from then on, if they bring none of their own."""
    before, go = world.event("before"), world.event("go")
    try:
        old = rpc.rpc_async(world.next, signal_and_wait, args=(before, go))
        before.wait()
        rpc._set_rpc_timeout(0.05)
        assert rpc.get_rpc_timeout() == pytest.approx(0.05)
        futures = [rpc.rpc_async(world.next, wait, args=(go,)) for _ in range(5)]
        for future in futures:
            with pytest.raises(RuntimeError, match=ran_out(50)):
                future.wait()
        own = rpc.rpc_async(world.next, wait, args=(go,), timeout=20)
        rpc._set_rpc_timeout(0)
        unlimited = rpc.rpc_async(world.next, wait, args=(go,))
        go.signal("done")
        equal([old.wait(), own.wait(), unlimited.wait()], ["done"] * 3)
    finally:
        rpc._set_rpc_timeout(SESSION_OPTIONS["rpc_timeout"])


def nap(value: int) -> int:
    """Takes long enough for a deadline in the past, or at once, to be noticed."""
    time.sleep(0.3)
    return value


@case(
    each={f"{api}-{limit:g}": (APIS[api], limit) for api in APIS for limit in (math.inf, 1e10, 1e12)},
    sizes=(2,),
    tensorpipe="the number of milliseconds overflows",
)
def longer_than_any_clock(world: World, variant: Any) -> None:
    """No limit, as 0."""
    api, limit = variant
    equal(api(world.next, nap, args=(1,), timeout=limit), 1)
    equal(rpc.remote(world.next, nap, args=(2,)).to_here(timeout=limit), 2)


@case(sizes=(1, 2), tensorpipe="it takes any number")
def negative_default(world: World) -> None:
    """torch itself takes it, so the calls complain."""
    try:
        rpc._set_rpc_timeout(-5)
        for api in ("sync", "async"):
            with pytest.raises(RuntimeError, match="negative"):
                APIS[api](world.next, identity, args=(1,))
            equal(APIS[api](world.next, nap, args=(2,), timeout=20), 2)
        rpc._set_rpc_timeout(20)
        for api in APIS.values():
            equal(api(world.next, nap, args=(3,)), 3)
    finally:
        rpc._set_rpc_timeout(SESSION_OPTIONS["rpc_timeout"])


@case()
def each_call_its_own_deadline(world: World) -> None:
    """Long and short ones mixed, issued in an order that is not the order in which they run out."""
    go = world.event("go")
    milliseconds = [400, 50, 300, 100, 200, 150, 350, 250]
    futures = [rpc.rpc_async(world.next, wait, args=(go,), timeout=ms / 1000) for ms in milliseconds]
    patient = rpc.rpc_async(world.next, wait, args=(go,))
    for future, ms in zip(futures, milliseconds, strict=True):
        with pytest.raises(RuntimeError) as caught:
            future.wait()
        found = re.search(ran_out(r"(\d+)"), str(caught.value))
        assert found, caught.value
        assert abs(int(found[1]) - ms) <= 1  # seconds travel as 32-bit floats
    assert not patient.done()
    go.signal("done")
    equal(patient.wait(), "done")


@case()
def a_late_answer_harms_nobody(world: World) -> None:
    """The answer to a call that ran out is dropped, also a large one; answers to others are not mixed up with it."""
    started, go = world.event("started"), world.event("go")
    future = rpc.rpc_async(world.next, answer_late, args=(started, go), timeout=0.2)
    started.wait()
    with pytest.raises(RuntimeError, match=ran_out(200)):
        future.wait()
    go.signal()
    equal([rpc.rpc_sync(world.next, identity, args=(i,)) for i in range(100)], list(range(100)))
    with pytest.raises(RuntimeError, match=ran_out(200)):
        future.wait()


def answer_late(started: Any, go: Any) -> torch.Tensor:
    signal_and_wait(started, go)
    return torch.ones(3_000_000)


@case(tensorpipe="its deadlines need a free worker thread")
def many_run_out_at_once(world: World) -> None:
    go = world.event("go")

    def calls(thread: int) -> None:
        futures = [rpc.rpc_async(world.next, wait, args=(go,), timeout=0.1 + 0.001 * i) for i in range(50)]
        for future in futures:
            with pytest.raises(RuntimeError, match=ran_out()):
                future.wait()

    in_threads(2, calls)
    go.signal()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)


@case()
def callbacks_of_calls_that_ran_out(world: World) -> None:
    go = world.event("go")
    handled = rpc.rpc_async(world.next, wait, args=(go,), timeout=0.1).then(recover)
    equal(handled.wait(), "recovered")
    go.signal()


def recover(future: torch.futures.Future) -> str:
    with pytest.raises(RuntimeError, match=ran_out()):
        future.wait()
    return "recovered"


# RRefs. Creation that runs out is in cases_exit.py: what fails there stays in torch's RRef context.


@case()
def to_here(world: World) -> None:
    go = world.event("go")
    rref = rpc.remote(world.next, wait, args=(go,))
    with pytest.raises(RuntimeError, match=ran_out(100)):
        rref.to_here(timeout=0.1)
    go.signal("made")
    equal(rref.to_here(timeout=20), "made")


class Slow(Account):
    """An account with a method that waits."""

    def wait(self, event: Any) -> str:
        return event.wait()


@case()
def proxies(world: World) -> None:
    go = world.event("go")
    slow = rpc.remote(world.next, Slow)
    with pytest.raises(RuntimeError, match=ran_out(200)):
        slow.rpc_sync(timeout=0.2).wait(go)
    with pytest.raises(RuntimeError, match=ran_out(200)):
        slow.rpc_async(timeout=0.2).wait(go).wait()
    go.signal("done")
    equal(slow.rpc_sync(timeout=20).wait(go), "done")


@case()
def type_of_rrefs(world: World) -> None:
    go = world.event("go")
    rref = rpc.remote(world.next, wait, args=(go,))
    with pytest.raises(RuntimeError, match=ran_out(100)):
        rref._get_type(timeout=0.1)
    go.signal("done")
    assert rpc.remote(world.next, wait, args=(go,))._get_type(timeout=20) is str


class Buffer(bytearray):
    """Memory of a tensor, of which it can be seen whether it is free."""


noted: dict[str, list[object]] = {}


def note(caller: str, what: object) -> None:
    noted.setdefault(caller, []).append(what)


def noted_of(caller: str) -> list[object]:
    return noted.get(caller, [])


@case(options={"num_worker_threads": 2}, sizes=(2,), tensorpipe="it runs them all the same")
def before_they_have_begun(world: World) -> None:
    """Calls for which the callee had no thread, or no credit, are not run, and keep no memory."""
    for to in (world.next, world.name()):
        arrived = [world.event(f"{world.name()} at {to} {thread}") for thread in range(2)]
        go = world.event(f"{world.name()} at {to} goes on")
        busy = [rpc.rpc_async(to, signal_and_wait, args=(event, go)) for event in arrived]
        for event in arrived:
            event.wait()
        buffers = [Buffer(20 << 20) for _ in range(4)]
        alive = [weakref.ref(buffer) for buffer in buffers]
        calls = [
            rpc.rpc_async(to, note, args=(world.name(), argument), timeout=0.5)
            for argument in (1, *(torch.frombuffer(buffer, dtype=torch.uint8) for buffer in buffers), 2)
        ]
        del buffers
        for call in calls:
            with pytest.raises(RuntimeError, match=ran_out(500)):
                call.wait()
        del call, calls
        eventually(lambda: not any(buffer() for buffer in alive), "the tensors of these calls are free")  # noqa: B023
        go.signal()
        torch.futures.wait_all(busy)
        equal(rpc.rpc_sync(to, noted_of, args=(world.name(),)), [])
        world.barrier()
