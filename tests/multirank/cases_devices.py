"""Tensors on devices: maps, order between streams, everything that carries them.

What is sent is mostly written behind a pause of the stream (late()), so that what does not wait for it sees zeros; and
the test device delays everything at random.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_calls import APIS
from device_world import (
    BOTH,
    BY_MPI,
    FIRST,
    FROM_CPU,
    IDENTITY,
    MIXED,
    PINNED,
    SECOND,
    SWAPPED,
    TO_CPU,
    busy,
    device_case,
    late,
    maps,
    module,
    numbers,
)  # fmt: skip
from harness import Event, World, equal, eventually, in_threads
from torch import Tensor, optim
from torch.distributed.nn import RemoteModule
from torch.distributed.optim import DistributedOptimizer
from torch.distributed.rpc import RRef


def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@torch.jit.script
def script_add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def whereabouts(*tensors: Tensor) -> list[str]:
    return [str(tensor.device) for tensor in tensors]


def identity(value: Any) -> Any:
    return value


FUNCTIONS = {"builtin": torch.add, "function": add, "script": script_add}


@device_case(IDENTITY, each={f"{kind}-{api}": (FUNCTIONS[kind], APIS[api]) for kind in FUNCTIONS for api in APIS})
def add_two(world: World, variant: Any) -> None:
    function, api = variant
    x, y = late(10, seed=1), late(10, seed=2)
    equal(api(world.next, function, args=(x, y)), x + y)


SIZES = [0, 1, 100, 5_000, 20_000, 262_144, 1_000_000, 16_777_216]


@device_case(PINNED, each=SIZES)
def sizes_through_pinned_memory(world: World, size: int) -> None:
    sizes(world, size)
    if world.mpi and size > 0:
        assert int(rpc._get_debug_info()["mpi.device_bytes_sent_ipc"]) == 0


@device_case(PINNED)
def many_at_once_through_pinned_memory(world: World) -> None:
    many_tensors_and_others_between_them(world)
    argument_freed_at_once(world)
    from_both_sides_and_many_threads(world)


@device_case(BY_MPI, each=SIZES)
def sizes_by_mpi(world: World, size: int) -> None:
    before = rpc._get_debug_info()
    sizes(world, size)
    told = rpc._get_debug_info()
    equal(told["mpi.device_path"], "mpi")
    equal(int(told["mpi.device_bytes_sent_ipc"]), 0)
    received = int(told["mpi.device_bytes_received_mpi"]) - int(before["mpi.device_bytes_received_mpi"])
    if 4 * size > 16384:  # bytes: smaller ones are in the messages
        assert received >= 2 * 4 * size


@device_case(BY_MPI)
def many_at_once_by_mpi(world: World) -> None:
    many_tensors_and_others_between_them(world)
    argument_freed_at_once(world)
    from_both_sides_and_many_threads(world)


@device_case({**FROM_CPU, "device_path": "mpi"})
def from_the_cpu_by_mpi(world: World) -> None:
    x = numbers(1_000_000, "cpu", seed=world.rank)
    equal(rpc.rpc_sync(world.next, whereabouts, args=(x,)), [FIRST])
    result = rpc.rpc_sync(world.next, torch.mul, args=(x, 2))
    equal(result.device.type, "cpu")
    equal(result, x * 2)


@device_case(IDENTITY, each=SIZES)
def sizes(world: World, size: int) -> None:
    x = late(size, seed=world.rank)
    equal(rpc.rpc_sync(world.next, identity, args=(x,)), x)
    equal(rpc.rpc_sync(world.next, torch.mul, args=(x, 2)), x * 2)


@device_case(IDENTITY, each=["uint8", "bool", "int64", "float16", "bfloat16", "float64", "complex64", "complex128"])
def dtypes(world: World, name: str) -> None:
    dtype = getattr(torch, name)
    for size in (7, 100_000):
        x = numbers(size, "cpu", dtype).to(FIRST)
        there = rpc.rpc_sync(world.next, identity, args=(x,))
        equal(there.dtype, dtype)
        equal(there.cpu(), x.cpu())


@device_case(IDENTITY)
def shapes(world: World) -> None:
    base = late(10_000).reshape(100, 100)
    views = [base[3], base[:, 5], base.t(), base[::2, ::3], base[7, 7], base[10:10], base.reshape(-1)[5000:]]
    for view in views:
        equal(rpc.rpc_sync(world.next, identity, args=(view,)).cpu(), view.cpu())
    several = rpc.rpc_sync(world.next, identity, args=(views,))
    for actual, expected in zip(several, views, strict=True):
        equal(actual.cpu(), expected.cpu())
    grad = base.clone().requires_grad_()
    assert rpc.rpc_sync(world.next, identity, args=(grad,)).device == base.device


@device_case(IDENTITY)
def many_tensors_and_others_between_them(world: World) -> None:
    values: list[Any] = []
    for i in range(60):
        values += [
            late(i * 17, seed=i) if i % 10 == 0 else numbers(i * 400, seed=i),
            numbers(i * 300, "cpu", seed=i),
            i,
        ]
    for actual, expected in zip(rpc.rpc_sync(world.next, identity, args=(values,)), values, strict=True):
        if isinstance(expected, Tensor):
            equal(actual.device, expected.device)
            equal(actual.cpu(), expected.cpu())
        else:
            equal(actual, expected)


@device_case(BOTH)
def two_devices(world: World) -> None:
    x, y = late(30_000, FIRST, 1), late(30_000, SECOND, 2)
    equal(rpc.rpc_sync(world.next, whereabouts, args=(x, y)), [FIRST, SECOND])
    there = rpc.rpc_sync(world.next, identity, args=((x, y),))
    equal([tensor.cpu() for tensor in there], [x.cpu(), y.cpu()])


@device_case(SWAPPED)
def swapped(world: World) -> None:
    for to in world.everyone:  # itself too
        x, y = late(300, FIRST, 1), late(300_000, SECOND, 2)
        equal(rpc.rpc_sync(to, whereabouts, args=(x, y)), [SECOND, FIRST])
        back = rpc.rpc_sync(to, identity, args=((x, y),))
        equal(whereabouts(*back), [FIRST, SECOND])
        equal([tensor.cpu() for tensor in back], [x.cpu(), y.cpu()])


@device_case(FROM_CPU)
def from_the_cpu(world: World) -> None:
    for to in world.everyone:
        for size in (3, 500_000):
            x = numbers(size, "cpu", seed=3)
            equal(rpc.rpc_sync(to, whereabouts, args=(x,)), [FIRST])
            equal(rpc.rpc_sync(to, torch.add, args=(x, 1)), x + 1)  # and back by the map turned round


@device_case(TO_CPU)
def to_the_cpu(world: World) -> None:
    for to in world.everyone:
        for size in (3, 500_000):
            x = late(size, seed=3)
            equal(rpc.rpc_sync(to, whereabouts, args=(x,)), ["cpu"])
            back = rpc.rpc_sync(to, identity, args=(x,))
            equal(whereabouts(back), [FIRST])
            equal(back.cpu(), x.cpu())


@device_case(MIXED)
def some_from_the_cpu(world: World) -> None:
    x, y = numbers(1000, "cpu", seed=1), late(1000, seed=2)
    equal(rpc.rpc_sync(world.next, whereabouts, args=(x, y)), [SECOND, FIRST])
    x_back, y_back = rpc.rpc_sync(world.next, identity, args=((x, y),))
    equal(x_back, x)
    equal(y_back.cpu(), y.cpu())


def made(device: str) -> Tensor:
    return torch.ones(3, device=device)


@device_case(IDENTITY)
def errors_name_what_is_missing(world: World) -> None:
    if module().device_count() < 2:
        return
    with pytest.raises(RuntimeError, match=f"Could not find device map for device {SECOND}"):
        rpc.rpc_sync(world.next, identity, args=(torch.ones(2, device=SECOND),))
    with pytest.raises(RuntimeError, match=f"residing on device.s. {SECOND} which are not among the expected"):
        rpc.rpc_sync(world.next, made, args=(SECOND,))
    equal(rpc.rpc_sync(world.next, made, args=(FIRST,)).cpu(), torch.ones(3))


@device_case({})
def without_maps_only_the_cpu(world: World) -> None:
    x = torch.ones(2, device=FIRST)
    with pytest.raises(RuntimeError, match=r"only supports CPU tensors by default.*`set_device_map`"):
        rpc.rpc_sync(world.next, identity, args=(x,))
    with pytest.raises(RuntimeError, match="Response device mapping is not available"):
        rpc.rpc_sync(world.next, made, args=(FIRST,))


@device_case(IDENTITY)
def written_on_a_side_stream(world: World) -> None:
    side = module().Stream(FIRST)
    with module().stream(side):
        x = late(200_000, seed=5)
        future = rpc.rpc_async(world.next, identity, args=(x,))
        there = future.wait()
        equal(there.cpu(), numbers(200_000, "cpu", seed=5))


@device_case(IDENTITY)
def argument_freed_at_once(world: World) -> None:
    futures = []
    for i in range(20):
        x = late(50_000, seed=i) if i % 5 == 0 else numbers(50_000, seed=i)
        futures.append(rpc.rpc_async(world.next, torch.add, args=(x, 0)))
        del x
        torch.zeros(50_000, device=FIRST).fill_(-1)  # in the memory that was freed, if anything is wrong
    for i, future in enumerate(futures):
        equal(future.wait().cpu(), numbers(50_000, "cpu", seed=i))


@device_case(IDENTITY)
def argument_changed_after_the_answer(world: World) -> None:
    """In the stream that waits for it, and before anything has synchronised."""
    x = late(500_000, seed=1)
    future = rpc.rpc_async(world.next, identity, args=(x,))
    answer = future.wait()
    x.zero_()
    equal(answer.cpu(), numbers(500_000, "cpu", seed=1))


@device_case(IDENTITY)
def rrefs(world: World) -> None:
    x = late(1000, seed=1)
    value = rpc.remote(world.next, add, args=(x, x))
    equal(value.to_here().cpu(), x.cpu() * 2)
    equal(rpc.rpc_sync(world.next, of_local_value, args=(value, x)).cpu(), x.cpu() * 3)
    own = RRef(x)
    equal(rpc.rpc_sync(world.next, fetch, args=(own,)).cpu(), x.cpu() + 1)


def of_local_value(value: RRef, x: Tensor) -> Tensor:
    return value.local_value() + x


def fetch(value: RRef) -> Tensor:
    return value.to_here() + 1


@device_case(IDENTITY)
def from_both_sides_and_many_threads(world: World) -> None:
    def work(thread: int) -> None:
        for i in range(6):
            x = numbers(1000 * thread * (i + 1), seed=thread + i)
            equal(rpc.rpc_sync(world.name(thread), torch.add, args=(x, 1)).cpu(), x.cpu() + 1)

    in_threads(4, work)


def relayed(x: Tensor, names: list[str]) -> Tensor:
    return x * 2 if not names else rpc.rpc_sync(names[0], relayed, args=(x + 1, names[1:]))


@device_case(IDENTITY)
def nested(world: World) -> None:
    x = late(300)
    equal(rpc.rpc_sync(world.next, relayed, args=(x, [*world.everyone, world.next])).cpu(), (x.cpu() + 3) * 2)


@rpc.functions.async_execution
def asynchronous(to: str, x: Tensor) -> torch.futures.Future[Tensor]:
    return rpc.rpc_async(to, torch.add, args=(x, 1)).then(lambda future: future.wait() * 2)


@device_case(IDENTITY)
def async_execution(world: World) -> None:
    for size in (100, 100_000):
        x = late(size)
        equal(rpc.rpc_sync(world.next, asynchronous, args=(world.name(), x)).cpu(), (x.cpu() + 1) * 2)


@device_case(IDENTITY)
def callbacks_run_with_the_value(world: World) -> None:
    x = late(1000)
    future = rpc.rpc_async(world.next, slow_add, args=(x,)).then(lambda done: done.wait() * 3)
    equal(future.wait().cpu(), (x.cpu() + 1) * 3)


def slow_add(x: Tensor) -> Tensor:
    busy()
    return x + 1


def multiply(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@device_case(IDENTITY, each={"builtin": torch.mul, "function": multiply}, backward=True)
def gradients(world: World, function: Any) -> None:
    x, y = (late(50, seed=seed).requires_grad_() for seed in (1, 2))
    with dist_autograd.context() as context:
        loss = rpc.rpc_sync(world.next, function, args=(x, y)).sum()
        dist_autograd.backward(context, [loss])
        found = dist_autograd.get_gradients(context)
        equal(found[x].cpu(), y.detach().cpu())
        equal(found[y].cpu(), x.detach().cpu())


class Weight:
    def __init__(self) -> None:
        self.weight = torch.ones(4, device=FIRST, requires_grad=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x

    def parameter(self) -> RRef:
        return RRef(self.weight)

    def value(self) -> Tensor:
        return self.weight.detach()


@device_case(IDENTITY, backward=True)
def optimizer(world: World) -> None:
    remote = rpc.remote(world.next, Weight)
    x = late(4, seed=1)
    steps = DistributedOptimizer(optim.SGD, [remote.rpc_sync().parameter()], lr=0.5)
    with dist_autograd.context() as context:
        dist_autograd.backward(context, [remote.rpc_sync().forward(x).sum()])
        steps.step(context)
    equal(remote.rpc_sync().value().cpu(), 1 - 0.5 * x.cpu())


@device_case(IDENTITY)
def remote_module(world: World) -> None:
    layer = RemoteModule(f"{world.next}/{FIRST}", torch.nn.Linear, args=(4, 2))
    equal(whereabouts(layer.forward(late(4))), [FIRST])


@device_case(IDENTITY)
def time_runs_out_while_the_device_is_busy(world: World) -> None:
    for _ in range(20):
        busy()
    x = late(200_000)
    with pytest.raises(RuntimeError, match=r"timed out|ran for more than"):
        rpc.rpc_sync(world.next, never, args=(x, world.event("over")), timeout=0.3)
    world.event("over").signal()
    equal(rpc.rpc_sync(world.next, identity, args=(x,)).cpu(), x.cpu())


def never(x: Tensor, over: Event) -> None:
    over.wait()


@device_case(maps((FIRST, FIRST)))
def nothing_is_left(world: World) -> None:
    for _ in range(50):
        rpc.rpc_sync(world.next, torch.add, args=(numbers(100_000), 1))
    world.barrier()
    before = int(rpc._get_debug_info()["mpi.pinned_bytes"]) if world.mpi else 0
    for _ in range(50):
        rpc.rpc_sync(world.next, torch.add, args=(numbers(100_000), 1))
    if world.mpi:
        eventually(
            lambda: int(rpc._get_debug_info()["mpi.pinned_bytes"]) <= before + (4 << 20), "pinned memory is kept"
        )


@device_case(IDENTITY)
def neighbours_share_memory(world: World) -> None:
    x = late(200_000)  # smaller ones go through pinned memory
    rpc.rpc_sync(world.next, identity, args=(x,))  # which offers it
    if world.mpi:
        eventually(lambda: rpc._get_debug_info()[f"mpi.device_path.{world.next}"] == "0->0 ipc", "memory is shared")
        before = int(rpc._get_debug_info()["mpi.device_bytes_sent_ipc"])
        equal(rpc.rpc_sync(world.next, identity, args=(x,)).cpu(), x.cpu())
        assert int(rpc._get_debug_info()["mpi.device_bytes_sent_ipc"]) >= before + 800_000
