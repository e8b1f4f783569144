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


# RRefs


@case()
def to_here(world: World) -> None:
    go = world.event("go")
    rref = rpc.remote(world.next, wait, args=(go,))
    with pytest.raises(RuntimeError, match=ran_out(100)):
        rref.to_here(timeout=0.1)
    go.signal("made")
    equal(rref.to_here(timeout=20), "made")


@case(each=("next", "self"), tensorpipe="the first RRef of a process is marked for all, own values are waited for")
def creation_of_rrefs(world: World, at: str) -> None:
    """That they are told of another one's failure, freed perhaps, is not seen here but by a sanitizer."""
    to, go = world.next if at == "next" else world.name(), world.event("go")
    for number in range(3):
        begun = world.event(f"begun {number}")
        rref = rpc.remote(to, signal_and_wait, args=(begun, go), timeout=0.3)
        begun.wait()
        if at == "next":  # a fetch that waits for the value does so for as long as it is told to
            with pytest.raises(RuntimeError, match=ran_out(300)):
                rref._get_future().wait()
        with pytest.raises(RuntimeError, match=r"RRef creation via rpc.remote\(\) timed out"):
            rref.to_here()
        equal(rpc.remote(to, identity, args=(number,)).to_here(), number)
        del rref
    go.signal()


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


# Why a call is late.


@case(options={"num_worker_threads": 2}, sizes=(2,), tensorpipe="it does not say why")
def the_error_says_why(world: World) -> None:
    """What the callee was doing with the call shortly before its time was over."""
    if world.rank == 0:
        started, go = world.event("started"), world.event("go")
        holder = rpc.rpc_async(world.next, signal_and_wait, args=(started, go), timeout=20)
        started.wait()
        running = rpc.rpc_async(world.next, wait, args=(go,), timeout=2)
        promised = rpc.rpc_async(world.next, promise, timeout=2)
        queued = rpc.rpc_async(world.next, identity, args=(1,), timeout=2)
        behind = rpc.rpc_async(world.next, identity, args=(torch.ones(3_000_000),), timeout=2)
        short = rpc.rpc_async(world.next, identity, args=(1,), timeout=0.05)
        where = rf"On worker '{world.next}' \(rank 1 on host .+\) it waits behind"
        busy = r"all its 2 worker threads are busy, the oldest in harness\.signal_and_wait for \d"
        for future, why in (
            (running, rf"It has been running on worker '{world.next}' \(rank 1 on host .+\) for 1\.\d\d s"),
            (promised, rf"{where} \d other requests: {busy}"),
            (queued, rf"{where} \d other requests: {busy}"),
            (behind, rf"{where} \d other requests: {busy}"),
            (short, rf"It was made to worker '{world.next}' \(rank 1"),
        ):
            with pytest.raises(RuntimeError, match=rf"{ran_out()}\. {why}"):
                future.wait()
        go.signal("done")
        equal(holder.wait(), "done")
        late = rpc.rpc_async(world.next, promise, timeout=2)
        with pytest.raises(RuntimeError, match=r"returned a future, which is not complete 1\.\d\d s after it began"):
            late.wait()
        rpc.rpc_sync(world.next, keep_promises)


_promised: list[torch.futures.Future[int]] = []


@rpc.functions.async_execution
def promise() -> torch.futures.Future[int]:
    _promised.append(torch.futures.Future())
    return _promised[-1]


def keep_promises() -> None:
    while _promised:
        _promised.pop().set_result(1)


@case(options={"num_worker_threads": 1}, sizes=(2,), tensorpipe="it does not say why")
def the_error_names_nested_calls_that_use_up_all_threads(world: World) -> None:
    """Each worker's only thread waits for a call to the other, whose only thread does the same."""
    if world.rank == 0:
        with pytest.raises(RuntimeError, match=r"each of them waits for a call of its own.*num_worker_threads"):
            rpc.rpc_sync(world.next, call_back_and_forth, args=(world.name(), world.next, 3), timeout=20)


def call_back_and_forth(there: str, here: str, depth: int) -> int:
    return rpc.rpc_sync(there, call_back_and_forth, args=(here, there, depth - 1), timeout=depth) if depth > 1 else 0


@case(sizes=(1,), tensorpipe="it does not say why")
def the_error_of_a_call_to_oneself_says_why(world: World) -> None:
    go = world.event("go")
    future = rpc.rpc_async(world.name(), wait, args=(go,), timeout=1)
    with pytest.raises(RuntimeError, match=rf"It has been running on worker '{world.name()}' \(rank 0"):
        future.wait()
    go.signal()
