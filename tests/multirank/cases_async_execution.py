"""@rpc.functions.async_execution: functions that answer when a future completes, and hold no thread meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from cases_calls import APIS, scale_and_add, script_scale_and_add
from harness import Event, World, case, equal
from torch import Tensor
from torch.futures import Future


@rpc.functions.async_execution
def add_elsewhere(to: str, x: Tensor, y: float) -> Future[Tensor]:
    return rpc.rpc_async(to, torch.add, args=(x, y))


@rpc.functions.async_execution
def add_chained(to: str, x: Tensor, y: float) -> Future[Tensor]:
    return rpc.rpc_async(to, torch.add, args=(x, y)).then(lambda future: future.wait() + y)


@rpc.functions.async_execution
def add_nested(to: str, x: Tensor, y: float) -> Future[Tensor]:
    return rpc.rpc_async(to, add_elsewhere, args=(to, x, y))


@rpc.functions.async_execution
def add_fanned_out(to: str, x: Tensor, y: float) -> Future[Tensor]:
    parts = torch.futures.collect_all([rpc.rpc_async(to, torch.add, args=(x, y)) for _ in range(5)])
    return parts.then(lambda future: torch.stack([part.wait() for part in future.wait()]).mean(0))


@rpc.functions.async_execution
def add_by_new_future(to: str, x: Tensor, y: float) -> Future[Tensor]:
    result: Future[Tensor] = Future()
    rpc.rpc_async(to, torch.add, args=(x, y)).then(lambda future: result.set_result(future.wait()))
    return result


@rpc.functions.async_execution
def add_already_done(to: str, x: Tensor, y: float) -> Future[Tensor]:
    result: Future[Tensor] = Future()
    result.set_result(x + y)
    return result


@rpc.functions.async_execution
@torch.jit.script
def script_add(to: str, x: Tensor, y: float) -> Future[Tensor]:
    return rpc.rpc_async(to, script_scale_and_add, (x, 1.0, y))


class Adder:
    """Asynchronous methods of every kind; the decorator comes below staticmethod and classmethod."""

    @staticmethod
    @rpc.functions.async_execution
    def static(to: str, x: Tensor, y: float) -> Future[Tensor]:
        return rpc.rpc_async(to, torch.add, args=(x, y))

    @classmethod
    @rpc.functions.async_execution
    def of_class(cls, to: str, x: Tensor, y: float) -> Future[Tensor]:
        return rpc.rpc_async(to, torch.add, args=(x, y))

    @rpc.functions.async_execution
    def bound(self, to: str, x: Tensor, y: float) -> Future[Tensor]:
        return rpc.rpc_async(to, torch.add, args=(x, y)).then(lambda future: future.wait() + 0)


FUNCTIONS = {
    "simple": (add_elsewhere, 1),
    "chained": (add_chained, 2),
    "nested": (add_nested, 1),
    "fan_out": (add_fanned_out, 1),
    "new_future": (add_by_new_future, 1),
    "already_done": (add_already_done, 1),
    "script": (script_add, 1),
    "static_method": (Adder.static, 1),
    "class_method": (Adder.of_class, 1),
}


@case(each={f"{name}-{api}": (FUNCTIONS[name], APIS[api]) for name in FUNCTIONS for api in APIS}, sizes=(1, 4))
def function(world: World, variant: Any) -> None:
    (function, times), api = variant
    x = torch.arange(4.0)
    equal(api(world.next, function, args=(world.name(world.rank + 2), x, 1.0)), x + times)


@case(sizes=(1, 4))
def method_of_a_remote_object(world: World) -> None:
    adder, x = rpc.remote(world.next, Adder), torch.arange(4.0)
    arguments = (world.name(world.rank + 2), x, 1.0)
    for name in ("static", "of_class", "bound"):
        equal(getattr(adder.rpc_sync(), name)(*arguments), x + 1)
        equal(getattr(adder.rpc_async(), name)(*arguments).wait(), x + 1)
        equal(getattr(adder.remote(), name)(*arguments).to_here(), x + 1)


# Errors


@rpc.functions.async_execution
def raises_at_once() -> Future[None]:
    raise RuntimeError("no future today")


@rpc.functions.async_execution
def future_with_error() -> Future[None]:
    def fail(_: object) -> None:
        raise ValueError("failed later")

    return rpc.rpc_async(rpc.get_worker_info(), torch.add, args=(torch.ones(1), 1)).then(fail)


@rpc.functions.async_execution
def not_a_future() -> int:
    return 1


@case(each=APIS)
def errors(world: World, api: Any) -> None:
    with pytest.raises(RuntimeError, match="no future today"):
        api(world.next, raises_at_once)
    with pytest.raises(Exception, match="failed later"):
        api(world.next, future_with_error)
    with pytest.raises(RuntimeError, match=r"must return a torch.futures.Future object"):
        api(world.next, not_a_future)
    equal(api(world.next, scale_and_add, args=(torch.ones(2), 2.0)), torch.full((2,), 2.0))


# Batching: many callers wait at once, on few threads


class Batcher:
    """Answers all callers with their sum, once they are all there."""

    def __init__(self, expected: int) -> None:
        self._lock = threading.Lock()
        self._expected = expected
        self._values: list[int] = []
        self._future: Future[int] = Future()

    def submit(self, value: int) -> Future[int]:
        with self._lock:
            self._values.append(value)
            complete = len(self._values) == self._expected
        if complete:
            self._future.set_result(sum(self._values))
        return self._future


batchers: dict[int, Batcher] = {}


@rpc.functions.async_execution
def submit(round_: int, value: int) -> Future[int]:
    return batchers[round_].submit(value)


@case(options={"num_worker_threads": 2})
def batching_on_fewer_threads_than_callers(world: World) -> None:
    each, rounds = 10, 3
    if world.rank == 0:
        batchers.update({round_: Batcher(each * world.size) for round_ in range(rounds)})
    world.barrier()
    for round_ in range(rounds):
        futures = [rpc.rpc_async(world.name(0), submit, args=(round_, i)) for i in range(each)]
        equal(torch.futures.wait_all(futures), [sum(range(each)) * world.size] * each)


@rpc.functions.async_execution
def completed_by_event(event: Event) -> Future[str]:
    """A future that a plain thread completes, when the event comes."""
    result: Future[str] = Future()
    threading.Thread(target=lambda: result.set_result(event.wait())).start()
    return result


@case(options={"num_worker_threads": 1})
def pending_answers_hold_no_thread(world: World) -> None:
    go = world.event("go")
    futures = [rpc.rpc_async(world.next, completed_by_event, args=(go,)) for _ in range(8)]
    equal(rpc.rpc_sync(world.next, torch.add, args=(torch.ones(1), 1)), torch.full((1,), 2.0))
    assert not any(future.done() for future in futures)
    go.signal("gone")
    equal(torch.futures.wait_all(futures), ["gone"] * 8)
