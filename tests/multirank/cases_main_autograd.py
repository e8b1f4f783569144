"""Names of __main__ that the callee lacks, in contexts of distributed autograd: the gradients of one process."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_autograd import expect_gradients, pair
from cases_calls import APIS, identity
from cases_main import main_has, mine, shared, shared_count
from cases_pickling import TORCH_CANNOT, apply, settled
from cases_profiler import REMOTE
from harness import World, case, equal, eventually, in_threads, shut_down_without_leaks, signal_and_wait
from torch.autograd.profiler_legacy import profile
from torch.distributed.rpc import RRef
from torch.distributed.rpc.internal import RPCExecMode, _build_rpc_profiling_key

import torch_rpc_mpi

OURS = {
    "our sync": torch_rpc_mpi.rpc_sync,
    "our async": lambda *args, **kwargs: torch_rpc_mpi.rpc_async(*args, **kwargs).wait(),
    "our remote": lambda *args, **kwargs: torch_rpc_mpi.remote(*args, **kwargs).to_here(),
}


def contexts_released() -> None:
    for key in ("num_current_backward_passes", "num_autograd_contexts"):
        eventually(lambda key=key: int(dist_autograd._get_debug_info()[key]) == 0, f"{key} is 0")


@case(each={**APIS, **OURS}, sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def gradients_of_a_function(world: World, api: Any) -> None:
    x, y = pair(world.rank)
    matmul = mine(world, "matmul")
    for to in world.everyone:
        equal(rpc.rpc_sync(to, main_has, args=(matmul.__name__,)), to == world.name())
        with dist_autograd.context() as context_id:
            dist_autograd.backward(context_id, [api(to, matmul, args=(x, y)).sum()])
            expect_gradients(context_id, (x, y), torch.mm(x, y).sum())
    contexts_released()


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def gradients_through_instances(world: World, api: Any) -> None:
    x, y = pair(world.rank)
    point = mine(world, "Point")
    with dist_autograd.context() as context_id:
        there = api(world.next, point, args=(x,))
        moved = api(world.next, there.moved, args=(y,))
        dist_autograd.backward(context_id, [(moved.x * api(world.next, apply, args=(point(y).get,))).sum()])
        expect_gradients(context_id, (x, y), ((x + y) * y).sum())


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def gradients_of_what_goes_along_by_value(world: World, api: Any) -> None:
    """By value a function takes a global tensor along, which the first attempt did not have."""
    x, _ = pair(world.rank)
    weight = mine(world, "weight")
    for argument in (x, torch.ones(3, 3)):
        inputs = (argument, weight) if argument.requires_grad else (weight,)
        with dist_autograd.context() as context_id:
            loss = (api(world.next, mine(world, "weighted"), args=(argument,)) * weight).sum()
            dist_autograd.backward(context_id, [loss])
            expect_gradients(context_id, inputs, (argument * weight * weight).sum())


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def gradients_beside_a_lambda(world: World, api: Any) -> None:
    x, y = pair(world.rank)
    matmul = mine(world, "matmul")
    with dist_autograd.context() as context_id:
        loss = api(world.next, lambda f, a, b: f(a, b) * a, args=(matmul, x, y)).sum()
        dist_autograd.backward(context_id, [loss])
        expect_gradients(context_id, (x, y), (torch.mm(x, y) * x).sum())


@case(tensorpipe=TORCH_CANNOT)
def nested_calls(world: World) -> None:
    x, y = pair(world.rank)
    route = [world.name(world.rank + hop) for hop in range(1, 2 * world.size + 1)]
    with dist_autograd.context() as context_id:
        loss = mine(world, "relay")(x, y, route).sum()
        dist_autograd.backward(context_id, [loss])
        local = x
        for _ in route:
            local = torch.sin(local)
        expect_gradients(context_id, (x, y), (torch.mm(local, y) * 2 ** len(route)).sum())
    contexts_released()


@case(tensorpipe=TORCH_CANNOT)
def many_calls_in_one_context(world: World) -> None:
    x, y = pair(world.rank)
    matmul = mine(world, "matmul")
    with dist_autograd.context() as context_id:
        futures = [rpc.rpc_async(to, matmul, args=(x, y)) for to in world.everyone for _ in range(3)]
        rrefs = [rpc.remote(to, matmul, args=(x, y)) for to in world.everyone]
        losses = [future.wait().sum() for future in futures] + [rref.to_here().sum() for rref in rrefs]
        dist_autograd.backward(context_id, losses)
        expect_gradients(context_id, (x, y), torch.mm(x, y).sum() * world.size * 4)
    del rrefs
    settled(world)


@case(tensorpipe=TORCH_CANNOT)
def many_contexts_at_once(world: World) -> None:
    matmul = mine(world, "matmul")

    def train(thread: int) -> None:
        for step in range(10):
            x, y = pair(100 * world.rank + 10 * thread + step)
            with dist_autograd.context() as context_id:
                loss = rpc.rpc_sync(world.name(thread + step), matmul, args=(x, y)).sum()
                dist_autograd.backward(context_id, [loss])
                expect_gradients(context_id, (x, y), torch.mm(x, y).sum())

    in_threads(4, train)


@case(tensorpipe=TORCH_CANNOT)
def backward_at_the_owner_of_a_result(world: World) -> None:
    """The RRef's owner starts the backward pass, when it has the value."""
    x, _ = pair(world.rank)
    with dist_autograd.context() as context_id:
        rref = rpc.remote(world.next, mine(world, "loss"), args=(x,))
        rref.backward(context_id)
        expect_gradients(context_id, (x, mine(world, "weight")), (x * mine(world, "weight")).sum())
    del rref
    settled(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def rrefs_in_the_arguments(world: World, api: Any) -> None:
    x, _ = pair(world.rank)
    rrefs = [rpc.remote(to, identity, args=(2,)) for to in world.others] + [RRef(2)]
    with dist_autograd.context() as context_id:
        point = api(world.next, mine(world, "Point"), args=(x, *rrefs))
        equal([rref.to_here() for rref in point.rest], [2] * world.size)
        dist_autograd.backward(context_id, [(point.x * 3).sum()])
        expect_gradients(context_id, (x,), (x * 3).sum())
    del rrefs, point
    settled(world)


@case(each=APIS)
def names_that_the_callee_has_go_by_reference(world: World, api: Any) -> None:
    """The function counts in the globals of the callee, as those of any program whose ranks run one script."""
    counting = shared(world, "shared_counting")
    x, _ = pair(world.rank)
    world.barrier()
    before = rpc.rpc_sync(world.next, shared_count)
    with dist_autograd.context() as context_id:
        dist_autograd.backward(context_id, [api(world.next, counting, args=(x,)).sum()])
        expect_gradients(context_id, (x,), (x * (before + 1)).sum())
    equal(rpc.rpc_sync(world.next, shared_count), before + 1)
    world.barrier()


@case(session=False, sizes=(2,), tensorpipe=TORCH_CANNOT)
def a_context_that_ends_before_the_call(world: World) -> None:
    """The callee's only thread is busy until the context is over: the call is sent again outside of it."""
    world.init(num_worker_threads=1)
    x, y = pair(world.rank)
    arrived, over = world.event("arrived"), world.event("over")
    busy = rpc.rpc_async(world.next, signal_and_wait, args=(arrived, over))
    arrived.wait()
    with dist_autograd.context():
        future = rpc.rpc_async(world.next, mine(world, "matmul"), args=(x, y))
        rref = rpc.remote(world.next, mine(world, "matmul"), args=(x, y))
    over.signal()
    busy.wait()
    equal(future.wait(), torch.mm(x, y))
    equal(rref.to_here(), torch.mm(x, y))
    contexts_released()
    del rref
    shut_down_without_leaks(world)


@case(session=False, sizes=(2,), tensorpipe=TORCH_CANNOT)
def two_sessions(world: World) -> None:
    for _ in range(2):
        world.init()
        for api in APIS.values():
            gradients_of_a_function(world, api)
        rpc.shutdown()


@case(session=False, sizes=(2,), tensorpipe=TORCH_CANNOT)
def a_callee_that_has_left(world: World) -> None:
    world.init()
    if world.rank == 1:
        rpc.shutdown(graceful=False)
        world.signal("left")
        return
    world.wait("left")
    x, y = pair()
    for api in (APIS["sync"], APIS["async"]):
        with dist_autograd.context(), pytest.raises(RuntimeError, match=r"worker1.*has left"):
            api(world.next, mine(world, "matmul"), args=(x, y))
    rpc.shutdown(graceful=False)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def what_the_function_raises(world: World, api: Any) -> None:
    with dist_autograd.context(), pytest.raises((AttributeError, RuntimeError), match=r"AttributeError.*on purpose"):
        api(world.next, mine(world, "fail"), args=("on purpose",))


@case(each={name: APIS[name] for name in ("sync", "async")}, tensorpipe=TORCH_CANNOT)
def what_cannot_be_sent_by_value_either(world: World, api: Any) -> None:
    with dist_autograd.context(), pytest.raises((RuntimeError, TypeError), match="cannot be sent to another worker"):
        api(world.next, mine(world, "locked"))


@case(each={"context": dist_autograd.context, "no context": contextlib.nullcontext}, tensorpipe=TORCH_CANNOT)
def profiles(world: World, context: Any) -> None:
    """The second attempt is profiled as the first would have been."""
    x, y = pair(world.rank)
    matmul = mine(world, "matmul")
    with profile() as events, context():
        equal(rpc.rpc_sync(world.next, matmul, args=(x, y)), torch.mm(x, y))
    key = _build_rpc_profiling_key(RPCExecMode.SYNC, matmul.__qualname__, world.name(), world.next)
    remote = {event.name: event.node_id for event in events.function_events if event.is_remote}
    equal(remote[f"{key}{REMOTE}aten::mm"], (world.rank + 1) % world.size)
