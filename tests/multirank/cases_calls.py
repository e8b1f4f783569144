"""Calls: every API and kind of function, to everyone, from many threads, nested, and what a future offers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from harness import World, case, equal, in_threads
from torch import Tensor

WORLDS = (1, 2, 4, 6)

APIS = {
    "sync": rpc.rpc_sync,
    "async": lambda *args, **kwargs: rpc.rpc_async(*args, **kwargs).wait(),
    "remote": lambda *args, **kwargs: rpc.remote(*args, **kwargs).to_here(),
}


def scale_and_add(x: Tensor, factor: float, bias: float = 0.0) -> Tensor:
    return x * factor + bias


@torch.jit.script
def script_scale_and_add(x: Tensor, factor: float, bias: float = 0.0) -> Tensor:
    return x * factor + bias


def nothing() -> None:
    pass


def identity(value: Any) -> Any:
    return value


def my_id() -> int:
    return rpc.get_worker_info().id


class Counter:
    """A plain object whose methods are called remotely."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counter) and self.value == other.value

    __hash__ = None

    def plus(self, value: int) -> Counter:
        return Counter(self.value + value)

    @classmethod
    def of(cls, value: int) -> Counter:
        return cls(value)

    @staticmethod
    def double(value: int) -> int:
        return 2 * value


class Record:
    """Carries tensors inside a user's class."""

    def __init__(self, tensors: dict[str, list[Tensor]]) -> None:
        self.tensors = tensors


# Basic calls


@case(each=APIS, sizes=WORLDS)
def python_function(world: World, api: Any) -> None:
    for rank in range(world.size):
        x = torch.arange(4.0) + world.rank
        equal(api(world.name(rank), scale_and_add, args=(x, 2.0), kwargs={"bias": rank}), x * 2 + rank)
        assert api(world.name(rank), nothing) is None
        equal(api(world.name(rank), my_id), rank)


@case(each=APIS, sizes=WORLDS)
def builtin_operator(world: World, api: Any) -> None:
    for rank in range(world.size):
        x = torch.arange(4.0) + world.rank
        equal(api(world.name(rank), torch.add, args=(x, rank)), x + rank)
        equal(api(world.name(rank), torch.add, args=(x, x), kwargs={"alpha": 3}), x * 4)
        equal(api(world.name(rank), torch.split, args=(x, 2)), [x[:2], x[2:]])
        equal(api(world.name(rank), torch.nonzero, args=(x,)), torch.nonzero(x))


@case(each=APIS, sizes=WORLDS)
def torchscript_function(world: World, api: Any) -> None:
    for rank in range(world.size):
        x = torch.arange(4.0) + world.rank
        equal(api(world.name(rank), script_scale_and_add, args=(x, 2.0), kwargs={"bias": float(rank)}), x * 2 + rank)


@case(each=APIS, sizes=(1, 4))
def destination_as_name_rank_or_worker_info(world: World, api: Any) -> None:
    rank = (world.rank + 1) % world.size
    for to in (world.name(rank), rank, rpc.get_worker_info(world.name(rank))):
        equal(api(to, my_id), rank)
        equal(api(to, torch.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))
        equal(api(to, script_scale_and_add, args=(torch.ones(2), 2.0)), torch.full((2,), 2.0))


@case()
def python_builtins_and_callables(world: World) -> None:
    equal(rpc.rpc_sync(world.next, min, args=(3, 1, 2)), 1)
    equal(rpc.rpc_sync(world.next, sorted, args=([3, 1, 2],), kwargs={"reverse": True}), [3, 2, 1])
    equal(rpc.rpc_sync(world.next, Tensor.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))


@case(each=APIS)
def methods(world: World, api: Any) -> None:
    equal(api(world.next, Counter, args=(5,)), Counter(5))
    equal(api(world.next, Counter(5).plus, args=(2,)), Counter(7))
    equal(api(world.next, Counter.of, args=(3,)), Counter(3))
    equal(api(world.next, Counter.double, args=(4,)), 8)


@case()
def containers_and_objects(world: World) -> None:
    a, b = torch.arange(5), torch.ones(2, 3)
    for value in (
        [a, (b, {"x": a, "y": [b]}), "text", 3, None, True, 2.5, b"bytes"],
        (),
        {},
        "",
        "∂ϕ " * 1000,
        b"\x00\xff" * 50_000,
        2**80,
    ):
        equal(rpc.rpc_sync(world.next, identity, args=(value,)), value)
    equal(rpc.rpc_sync(world.next, identity, args=(Record({"k": [a, b]}),)).tensors, {"k": [a, b]})
    assert rpc.rpc_sync(world.next, identity, args=({1, 2, 3},)) == {1, 2, 3}


def doubling_module() -> torch.jit.ScriptModule:
    class Doubling(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    return torch.jit.script(Doubling())


@case()
def modules_as_argument_and_result(world: World) -> None:
    linear, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
    equal(rpc.rpc_sync(world.next, identity, args=(linear,))(x), linear(x))
    equal(rpc.rpc_sync(world.next, doubling_module)(x), x * 2)


# Nesting, threads, many at once


def round_trip(hops: int, world_size: int) -> list[int]:
    here = rpc.get_worker_info().id
    if hops == 0:
        return [here]
    return [here, *rpc.rpc_sync((here + 1) % world_size, round_trip, args=(hops - 1, world_size))]


@case(sizes=WORLDS)
def nested_calls_round_the_world(world: World) -> None:
    hops = 2 * world.size + 1
    equal(
        rpc.rpc_sync(world.name(), round_trip, args=(hops, world.size)),
        [(world.rank + hop) % world.size for hop in range(hops + 1)],
    )


def call_back(caller: str, kind: str) -> Tensor:
    x = torch.ones(3)
    if kind == "script":
        return rpc.rpc_sync(caller, script_scale_and_add, args=(x, 2.0))
    if kind == "builtin":
        return rpc.remote(caller, torch.add, args=(x, 1)).to_here()
    return rpc.rpc_async(caller, scale_and_add, args=(x, 2.0)).wait()


@case(each=("python", "builtin", "script"), sizes=(1, 4))
def callee_calls_the_caller(world: World, kind: str) -> None:
    equal(rpc.rpc_sync(world.next, call_back, args=(world.name(), kind)), torch.full((3,), 2.0))


@case(sizes=(1, 4))
def many_threads(world: World) -> None:
    def calls(thread: int) -> None:
        for index in range(40):
            to = world.name(world.rank + index)
            value = thread * 1000 + index
            equal(rpc.rpc_sync(to, identity, args=(value,)), value)
            equal(rpc.rpc_sync(to, torch.add, args=(torch.full((8,), float(value)), 1)), torch.full((8,), value + 1.0))
            equal(rpc.rpc_async(to, script_scale_and_add, args=(torch.ones(2), float(value))).wait()[0].item(), value)

    in_threads(8, calls)


@case(sizes=(1, 2, 4, 6))
def many_outstanding(world: World) -> None:
    count = 600
    futures = [rpc.rpc_async(world.name(i), identity, args=((world.rank, i),)) for i in range(count)]
    futures += [rpc.rpc_async(world.name(i), torch.mul, args=(torch.full((64,), 1.0), i)) for i in range(count)]
    results = torch.futures.wait_all(futures)
    equal(results[:count], [(world.rank, i) for i in range(count)])
    equal(torch.stack(results[count:])[:, 0], torch.arange(count, dtype=torch.float32))


@case()
def one_target_for_all(world: World) -> None:
    futures = [rpc.rpc_async(world.name(0), identity, args=((world.rank, i),)) for i in range(1000)]
    equal(torch.futures.wait_all(futures), [(world.rank, i) for i in range(1000)])


@case()
def futures_waited_for_in_reverse_and_twice(world: World) -> None:
    futures = [rpc.rpc_async(world.next, identity, args=(i,)) for i in range(100)]
    for i in reversed(range(100)):
        equal(futures[i].wait(), i)
        equal(futures[i].wait(), i)
        assert futures[i].done()
        equal(futures[i].value(), i)


@case()
def wait_all_context(world: World) -> None:
    with rpc.api._wait_all():
        futures = [rpc.rpc_async(world.next, identity, args=(i,)) for i in range(50)]
    assert all(future.done() for future in futures)


# Callbacks


@case()
def future_callbacks(world: World) -> None:
    chained = rpc.rpc_async(world.next, torch.add, args=(torch.ones(2), 1))
    for _ in range(20):
        chained = chained.then(lambda future: future.wait() + 1)
    equal(chained.wait(), torch.full((2,), 22.0))

    called = threading.Event()
    future = rpc.rpc_async(world.next, identity, args=(1,))
    future.add_done_callback(lambda _: called.set())
    future.wait()
    assert called.wait(20)

    def broken(_: object) -> None:
        raise ValueError("callback failed")

    with pytest.raises(RuntimeError, match="callback failed"):
        rpc.rpc_async(world.next, identity, args=(1,)).then(broken).wait()


@case(sizes=(1, 4))
def callbacks_that_call(world: World) -> None:
    """A callback may itself make a blocking call, on whatever thread it runs."""
    futures = [
        rpc.rpc_async(world.next, identity, args=(i,)).then(
            lambda future: rpc.rpc_sync(world.name(0), identity, args=(future.wait() + 1,))
        )
        for i in range(8)
    ]
    equal(torch.futures.wait_all(futures), list(range(1, 9)))


def sum_of_callbacks(to: str, count: int) -> int:
    futures = [rpc.rpc_async(to, identity, args=(i,)).then(lambda future: future.wait() * 2) for i in range(count)]
    return sum(torch.futures.wait_all(futures))


@case()
def callbacks_at_the_callee(world: World) -> None:
    to = world.name(world.rank + 2)
    equal(rpc.rpc_sync(world.next, sum_of_callbacks, args=(to, 10)), 90)


# TorchScript


@torch.jit.script
def script_calls(to: str, x: Tensor) -> Tensor:
    future = rpc.rpc_async(to, script_scale_and_add, (x, 2.0))
    remote = rpc.remote(to, script_scale_and_add, (x, 3.0))
    return rpc.rpc_sync(to, script_scale_and_add, (x, 1.0), {"bias": 1.0}) + future.wait() + remote.to_here()


@torch.jit.script
def script_raises(x: Tensor) -> Tensor:
    if x.numel() > 0:
        raise ValueError("script failed")
    return x


@torch.jit.script
def script_forks(x: Tensor) -> Tensor:
    return torch.jit._wait(torch.jit._fork(script_scale_and_add, x, 2.0))


@torch.jit.script
def wait_in_script(future: torch.futures.Future[Tensor]) -> Tensor:
    return future.wait()


@case(sizes=(1, 4))
def torchscript_that_calls(world: World) -> None:
    x = torch.arange(3.0)
    equal(script_calls(world.next, x), x * 6 + 1)
    equal(rpc.rpc_sync(world.next, script_calls, args=(world.name(world.rank + 2), x)), x * 6 + 1)


@case()
def torchscript_futures_and_forks(world: World) -> None:
    x = torch.ones(2)
    equal(rpc.rpc_sync(world.next, script_forks, args=(x,)), x * 2)
    equal(wait_in_script(rpc.rpc_async(world.next, script_scale_and_add, args=(x, 5.0))), x * 5)
    with pytest.raises(RuntimeError, match="script failed"):
        rpc.rpc_sync(world.next, script_raises, args=(x,))
    with pytest.raises(RuntimeError, match="script failed"):
        rpc.remote(world.next, script_raises, args=(x,)).to_here()


# Who is who


@case(sizes=(1, 2, 4, 6))
def worker_info(world: World) -> None:
    me = rpc.get_worker_info()
    equal((me.name, me.id), (world.name(), world.rank))
    agent = rpc.api._get_current_rpc_agent()
    for rank in range(world.size):
        by_name = rpc.get_worker_info(world.name(rank))
        equal((by_name.name, by_name.id), (world.name(rank), rank))
        equal(agent.get_worker_info(rank), by_name)
        equal(rpc.get_worker_info(rank), by_name)
        equal(rpc.rpc_sync(world.name(rank), rpc.get_worker_info), by_name)
        equal(rpc.rpc_sync(world.name(rank), identity, args=(me,)), me)
    equal(sorted((info.id, info.name) for info in agent.get_worker_infos()), list(enumerate(world.everyone)))


@case(sizes=(1, 4, 6))
def torch_barrier_and_all_gather(world: World) -> None:
    expected = {world.name(rank): rank * rank for rank in range(world.size)}
    for _ in range(3):
        equal(rpc.api._all_gather(world.rank * world.rank, timeout=30), expected)
        rpc.api._barrier(set(world.everyone))


@case()
def barriers_of_threads_and_subsets(world: World) -> None:
    if world.rank < 2:
        rpc.api._barrier({world.name(0), world.name(1)})
    in_threads(3, lambda thread: rpc.api._all_gather(thread, set(world.everyone[: world.size])))
