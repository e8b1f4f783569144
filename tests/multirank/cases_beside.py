"""Beside RPC: the user's own MPI traffic, process groups, DDP, and forked data loaders."""

from __future__ import annotations

import os
import select
import signal
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
from cases_calls import identity
from harness import World, case, equal, in_threads
from torch.utils.data import DataLoader, Dataset

FORKS = "a forked child of a TensorPipe worker hangs when it calls"


# The user's MPI


def mpi_world(world: World) -> object:
    from mpi4py import MPI

    assert MPI.Query_thread() == MPI.THREAD_MULTIPLE, "users' threads call MPI too"
    return MPI.COMM_WORLD


@case(sizes=(2, 4), tensorpipe="MPI is not started there")
def collectives_on_another_thread(world: World) -> None:
    comm = mpi_world(world)

    def work(thread: int) -> None:
        if thread == 0:
            for index in range(100):
                equal(comm.allreduce(index + world.rank), index * world.size + sum(range(world.size)))
                equal(comm.bcast({"index": index} if world.rank == 0 else None), {"index": index})
        else:
            for index in range(100):
                equal(rpc.rpc_sync(world.name(index), identity, args=(index,)), index)
                if index % 20 == 0:
                    x = torch.full((300_000,), float(index))
                    equal(rpc.rpc_sync(world.next, identity, args=(x,)), x)

    in_threads(3, work)


@case(sizes=(2, 4), tensorpipe="MPI is not started there")
def wildcard_receives_on_the_same_communicator(world: World) -> None:
    """RPC has a duplicate of the communicator, so that ANY_SOURCE and ANY_TAG meet the user's messages only."""
    comm = mpi_world(world)

    def work(thread: int) -> None:
        for index in range(100):
            if thread == 0:
                request = comm.isend((world.rank, index), dest=(world.rank + 1) % world.size, tag=index)
                equal(comm.recv(), ((world.rank - 1) % world.size, index))
                request.wait()
            else:
                equal(rpc.rpc_sync(world.next, identity, args=(index,)), index)

    in_threads(2, work)


@case(sizes=(4,), tensorpipe="MPI is not started there")
def a_barrier_that_waits_does_not_stop_rpc(world: World) -> None:
    """Rank 0 comes late to a collective of the user, because it calls those who wait in it."""
    comm = mpi_world(world)
    if world.rank == 0:
        for index in range(100):
            equal(rpc.rpc_sync(world.name(index), identity, args=(index,)), index)
    comm.Barrier()


# Process groups

# In c10d the last reference to a group goes with the GIL held, and then its destructor joins threads that may be about
# to take the GIL. So the groups live until their process ends.
groups: list[dist.ProcessGroup | None] = []


def gloo(world: World, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group(
            "gloo",
            init_method=f"file://{os.environ['RPC_TEST_SCRATCH']}/{name}",
            rank=world.rank,
            world_size=world.size,
        )
    groups.append(dist.group.WORLD)


@case()
def gloo_process_group(world: World) -> None:
    gloo(world, "group")
    try:
        for index in range(20):
            x = torch.full((1000,), float(world.rank + index))
            work = dist.all_reduce(x, async_op=True)
            equal(rpc.rpc_sync(world.next, identity, args=(index,)), index)
            work.wait()
            equal(x, torch.full((1000,), float(sum(range(world.size)) + index * world.size)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


@case(session=False)
def gloo_before_rpc(world: World) -> None:
    gloo(world, "before")
    try:
        world.init()
        equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
        dist.barrier()
        rpc.shutdown()
        dist.barrier()
    finally:
        dist.destroy_process_group()


@case()
def distributed_data_parallel(world: World) -> None:
    gloo(world, "ddp")
    try:
        torch.manual_seed(world.rank)
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            x = rpc.rpc_sync(world.next, batch, args=(world.rank, step))
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
        weights = [torch.empty(2, 8) for _ in range(world.size)]
        dist.all_gather(weights, model.module.weight.detach())
        for other in weights:
            equal(other, model.module.weight.detach())
    finally:
        dist.destroy_process_group()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.rand(4, 8, generator=torch.Generator().manual_seed(100 * rank + step))


# Forked children


class Squares(Dataset):
    """Made of nothing but numbers, as a child process needs nothing else of this one."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(float(index * index))


class Remote(Squares):
    """Fetches its items by RPC, which a forked child cannot."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return rpc.rpc_sync(rpc.get_worker_info(), torch.add, args=(torch.ones(1), index))


def loader(dataset: Dataset) -> DataLoader:
    return DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork")


@case(sizes=(2,))
def data_loader_with_forked_workers(world: World) -> None:
    for _ in range(2):
        for index, squares in enumerate(loader(Squares())):
            expected = torch.arange(8 * index, 8 * index + 8, dtype=torch.float32).square()
            equal(rpc.rpc_sync(world.next, identity, args=(squares,)), expected)


@case(sizes=(2,), tensorpipe=FORKS)
def data_loader_whose_workers_call(world: World) -> None:
    with pytest.raises(RuntimeError, match="fork"):
        next(iter(loader(Remote())))
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)


def in_forked_child(function: Callable[[], object], limit: float = 20.0) -> str:
    """What the function does in a forked child, as text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = f"returned {function()!r}"
        except BaseException as error:
            text = f"raised {type(error).__name__}: {error}"
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    ready, _, _ = select.select([read], [], [], limit)
    text = os.read(read, 4096).decode() if ready else "hung"
    os.close(read)
    if not ready:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return text or f"ended with status {status}"


def use_rref(rref: rpc.RRef) -> object:
    return rref.to_here()


@case(
    each={
        "sync": lambda world, rref: rpc.rpc_sync(world.next, identity, args=(1,)),
        "async": lambda world, rref: rpc.rpc_async(world.next, torch.add, args=(torch.ones(1), 1)).wait(),
        "remote": lambda world, rref: rpc.remote(world.next, identity, args=(1,)).to_here(),
        "to_here": lambda world, rref: rref.to_here(),
        "to_self": lambda world, rref: rpc.rpc_sync(world.name(), identity, args=(1,)),
        "shutdown": lambda world, rref: rpc.shutdown(),
        "init": lambda world, rref: world.init(),
    },
    sizes=(2,),
    tensorpipe=FORKS,
)
def forked_child_that_touches_rpc(world: World, touch: Callable[[World, rpc.RRef], object]) -> None:
    rref = rpc.remote(world.next, identity, args=(5,))
    equal(rref.to_here(), 5)
    text = in_forked_child(lambda: touch(world, rref))
    assert text.startswith("raised "), text
    assert "fork" in text or "already initialized" in text, text
    equal(rref.to_here(), 5)
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)


@case(sizes=(2,), tensorpipe=FORKS)
def forked_child_that_drops_an_rref(world: World) -> None:
    """The child's copy is none of the RRef: the value stays with its owner."""
    rrefs = [rpc.remote(world.next, identity, args=(5,))]
    equal(rrefs[0].to_here(), 5)
    equal(in_forked_child(rrefs.clear), "returned None")
    equal(rrefs[0].to_here(), 5)


@case(sizes=(2,))
def children_while_calls_are_under_way(world: World) -> None:
    done = threading.Event()

    def work(thread: int) -> None:
        if thread == 0:
            for index in range(5):
                equal(in_forked_child(lambda index=index: index * index), f"returned {index * index}")
            done.set()
        else:
            while not done.is_set():
                equal(rpc.rpc_sync(world.next, identity, args=(thread,)), thread)

    in_threads(2, work)
