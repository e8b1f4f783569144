"""Programs for TensorPipe, run unmodified: what they rely on, over MPI with the drop-in, and over TensorPipe itself."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
from cases_calls import identity
from harness import World, case, equal, program
from torch.distributed.rpc import TensorPipeRpcBackendOptions, init_rpc
from torch.nn.parallel import DistributedDataParallel

import __main__

LATER_SESSION = "torch's RRef context keeps the first session's agent, which is gone then"


def switch_on(world: World) -> None:
    """As `python -m torch_rpc_mpi` does; over TensorPipe there is nothing to do."""
    if world.mpi:
        from torch_rpc_mpi import _drop_in

        _drop_in.switch_on()


def address(world: World) -> str:
    """An init_method of this case alone."""
    return f"file://{os.environ['RPC_TEST_SCRATCH']}/{world._scope.replace(':', '-').replace('/', '-')}"


@contextlib.contextmanager
def session(world: World, *place: Any, **given: Any) -> Iterator[None]:
    """One that a program for TensorPipe makes, with its arguments."""
    switch_on(world)
    if "rpc_backend_options" not in given and len(place) < 4:
        given["rpc_backend_options"] = TensorPipeRpcBackendOptions(init_method=address(world))
    if not place:
        given = {"rank": world.rank, "world_size": world.size, **given}
    init_rpc(world.name(), *place, **given)
    try:
        yield
        equal(rpc.rpc_sync(world.next, torch.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))
    finally:
        rpc.shutdown()
        os.environ.pop("TORCH_RPC_MPI_DROP_IN", None)


@case(session=False, each={"none": {}, "both": {"backend": "TENSORPIPE"}}, sizes=(2,))
def backend_by_options(world: World, arguments: dict[str, str]) -> None:
    kinds = {name: rpc.BackendType[value] for name, value in arguments.items()}
    with session(world, **kinds):
        assert rpc.is_available()
        equal(rpc.rpc_sync(world.next, identity, args=(world.rank,)), world.rank)


@case(session=False, sizes=(2,))
def positional_arguments(world: World) -> None:
    options = TensorPipeRpcBackendOptions(num_worker_threads=16, init_method=address(world))
    with session(world, rpc.backend_registry.BackendType.TENSORPIPE, world.rank, world.size, options):
        pass


@case(session=False, sizes=(2,))
def options_assigned_afterwards(world: World) -> None:
    options = TensorPipeRpcBackendOptions(_transports=["uv"], _channels=["basic"])
    options.init_method, options.rpc_timeout = address(world), 0
    with session(world, rpc_backend_options=options):
        equal(rpc.get_rpc_timeout(), 0)


class Options(TensorPipeRpcBackendOptions):
    """A program's own."""

    def __init__(self, init_method: str) -> None:
        super().__init__(init_method=init_method, num_worker_threads=3, rpc_timeout=33)


@case(session=False, sizes=(2,))
def the_agent_is_what_they_expect(world: World) -> None:
    from torch._C._distributed_rpc import TensorPipeAgent

    options = Options(address(world))
    with session(world, rpc_backend_options=options):
        agent = rpc._get_current_rpc_agent()
        assert agent is rpc.api._get_current_rpc_agent()
        for kind in (TensorPipeAgent, rpc.TensorPipeAgent, rpc.RpcAgent):
            assert isinstance(agent, kind)
        assert agent.is_static_group
        equal(sorted(info.name for info in agent.get_worker_infos()), world.everyone)
        equal(agent.get_worker_info(world.next).id, (world.rank + 1) % world.size)
        theirs = agent._get_backend_options()
        equal((theirs.num_worker_threads, theirs.rpc_timeout, theirs.device_maps, theirs.devices), (3, 33, {}, []))
        equal(agent._get_device_map(rpc.get_worker_info(world.next)), {})
        assert isinstance(agent.store, dist.Store)
        assert "agent.thread_pool_size" in agent.get_debug_info()


@case(session=False, sizes=(3,))
def private_helpers(world: World) -> None:
    @rpc.api._require_initialized
    def names() -> list[str]:
        return sorted(info.name for info in rpc._get_current_rpc_agent().get_worker_infos())

    assert not rpc._is_current_rpc_agent_set()
    with pytest.raises(RuntimeError, match="RPC has not been initialized"):
        names()
    with session(world):
        assert rpc._is_current_rpc_agent_set()
        equal(names(), world.everyone)
        expected = {world.name(rank): {"rank": rank} for rank in range(world.size)}
        equal(rpc.api._all_gather({"rank": world.rank}, timeout=30), expected)
        equal(rpc.api._all_gather({"rank": world.rank}), expected)
        rpc.api._barrier(set(world.everyone))
        rpc.api._wait_all_workers()
        rpc.api._wait_all_workers(timeout=30)


@case(session=False, sizes=(2,))
def sessions_one_after_the_other(world: World) -> None:
    for round_ in range(2):
        options = TensorPipeRpcBackendOptions(init_method=f"{address(world)}-{round_}")
        with session(world, rpc_backend_options=options):
            pass


@case(session=False, sizes=(2,), tensorpipe=LATER_SESSION)
def beside_a_process_group_and_ddp(world: World) -> None:
    dist.init_process_group("gloo", init_method=f"{address(world)}-gloo", rank=world.rank, world_size=world.size)
    with session(world):
        model = DistributedDataParallel(torch.nn.Linear(2, 1, bias=False))
        rref = rpc.remote(world.next, torch.nn.Linear, args=(2, 2))
        with torch.distributed.autograd.context() as context:
            loss = model(rref.rpc_sync().forward(torch.ones(1, 2))).sum()
            torch.distributed.autograd.backward(context, [loss])
            equal(len(torch.distributed.autograd.get_gradients(context)), 1)
        x = torch.ones(1)
        dist.all_reduce(x)
        equal(x.item(), float(world.size))
        del rref
    dist.destroy_process_group()


@case(session=False, sizes=(2,), tensorpipe="it has dynamic groups")
def dynamic_groups_are_refused(world: World) -> None:
    switch_on(world)
    try:
        with pytest.raises(ValueError, match="without world_size, which means a dynamic group"):
            init_rpc(world.name(), rank=world.rank)
    finally:
        os.environ.pop("TORCH_RPC_MPI_DROP_IN", None)


@case(session=False, sizes=(2,), tensorpipe="its agent is its own")
def nothing_is_replaced_unless_asked_for(world: World) -> None:
    """In a process that has had sessions as TensorPipe's."""
    world.init()
    agent = rpc._get_current_rpc_agent()
    assert not isinstance(agent, rpc.TensorPipeAgent)
    assert not hasattr(agent, "_get_backend_options")
    rpc.shutdown()
    options = TensorPipeRpcBackendOptions(init_method=address(world))
    rpc.init_rpc(world.name(), rank=world.rank, world_size=world.size, rpc_backend_options=options)
    assert type(rpc._get_current_rpc_agent()) is rpc.TensorPipeAgent
    rpc.shutdown()


MAIN = """
import dataclasses

@dataclasses.dataclass
class Data:
    x: int

class Server:
    def __init__(self, data):
        self.data = data

    def get(self):
        return dataclasses.replace(self.data, x=self.data.x + 1)

def double(data):
    return Data(data.x * 2)
"""


@case(session=False, sizes=(2,), tensorpipe=LATER_SESSION)
def names_of_main(world: World) -> None:
    exec(MAIN, __main__.__dict__)
    world.barrier()
    with session(world):
        equal(rpc.rpc_sync(world.next, __main__.double, args=(__main__.Data(4),)), __main__.Data(8))
        server = rpc.remote(world.next, __main__.Server, args=(__main__.Data(1),))
        equal(server.rpc_sync().get(), __main__.Data(2))
        equal(server.remote().get().to_here().x, 2)
        del server


@program(any_world=True)
def shutdown_at_exit_of_a_tensorpipe_program(world: World) -> None:
    """PyG's way: a handler that looks whether RPC is up."""

    def shut_down() -> None:
        if rpc._is_current_rpc_agent_set():
            assert isinstance(rpc._get_current_rpc_agent(), rpc.TensorPipeAgent)
            rpc.shutdown()

    atexit.register(shut_down)
    switch_on(world)
    options = TensorPipeRpcBackendOptions(init_method=address(world))
    init_rpc(world.name(), rank=world.rank, world_size=world.size, rpc_backend_options=options)
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
