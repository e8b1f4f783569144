"""Sessions: init_rpc and shutdown, again and again, in groups of every kind, and with arguments that are wrong."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from cases_calls import APIS, identity, script_scale_and_add
from harness import Event, World, case, equal, in_threads, signal_and_wait

STORE = "its store keeps what the session that failed left"
MPI_ONLY = "about this backend's options"
AT_ONCE = 15.0  # seconds: long for one that fails at once, and far below any timeout in these tests


def check_calls(world: World) -> None:
    for to in world.everyone:
        equal(rpc.rpc_sync(to, identity, args=(to,)), to)
        equal(rpc.rpc_sync(to, torch.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))
        equal(rpc.rpc_sync(to, script_scale_and_add, args=(torch.ones(2), 2.0)), torch.full((2,), 2.0))
        equal(rpc.rpc_sync(to, identity, args=(torch.ones(100_000),)), torch.ones(100_000))


# Again and again


@case(session=False, sizes=(1, 2, 4))
def init_and_shutdown_five_times(world: World) -> None:
    for round_ in range(5):
        world.init(num_worker_threads=2 + round_)
        check_calls(world)
        rpc.shutdown()
        assert not rpc.api._is_current_rpc_agent_set()


@case(session=False, sizes=(2, 4))
def init_and_shutdown_at_once(world: World) -> None:
    for _ in range(3):
        world.init()
        rpc.shutdown()


@case(session=False, sizes=(1, 2, 4))
def ungraceful_shutdown(world: World) -> None:
    for _ in range(2):
        world.init()
        check_calls(world)
        world.barrier()
        rpc.shutdown(graceful=False)
        world.barrier()


@case(session=False)
def calls_before_and_after(world: World) -> None:
    def refused() -> None:
        for api in APIS.values():
            with pytest.raises(RuntimeError, match="RPC has not been initialized"):
                api(world.next, identity, args=(1,))
        for function in (rpc.get_worker_info, rpc.shutdown):
            with pytest.raises(RuntimeError, match="RPC has not been initialized"):
                function()

    refused()
    world.init()
    check_calls(world)
    rpc.shutdown()
    refused()


@case()
def init_twice(world: World) -> None:
    with pytest.raises(RuntimeError, match="already initialized"):
        world.init()
    check_calls(world)


# Shutdown and what is under way


@case(session=False)
def graceful_shutdown_waits_for_everyone(world: World) -> None:
    """Who is done first still serves the others, which call on and on."""
    world.init()
    if world.rank == 0:
        world.wait("the others shut down")
        for index in range(200):
            equal(rpc.rpc_sync(world.name(index), identity, args=(index,)), index)
    elif world.rank == 1:
        world.signal("the others shut down")
    rpc.shutdown()


completed: list[str] = []


def complete(started: Event, go: Event) -> str:
    value = signal_and_wait(started, go)
    completed.append(value)
    return value


@case(session=False)
def graceful_shutdown_waits_for_calls_under_way(world: World) -> None:
    completed.clear()
    world.init()
    started, go = world.event("started"), world.event("go")
    future = rpc.rpc_async(world.next, complete, args=(started, go))
    started.wait()
    world.barrier()
    in_threads(2, lambda thread: rpc.shutdown() if thread == 0 else go.signal("done"))
    equal(completed, ["done"])
    assert future.done()


@case(session=False)
def callers_of_one_who_left(world: World) -> None:
    """Calls to it fail at once, pending and new ones; everyone else goes on."""
    world.init()
    check_calls(world)
    started, go = world.event("started"), world.event("go")
    pending = rpc.rpc_async(world.name(1), signal_and_wait, args=(started, go)) if world.rank != 1 else None
    if pending is not None:
        started.wait()
    world.barrier()
    go.signal()
    if pending is not None:
        pending.wait()
    world.barrier()
    if world.rank == 1:
        rpc.shutdown(graceful=False)
    world.barrier()
    if world.rank != 1:
        for api in (
            "sync",
            "async",
        ):  # rpc.remote() is in cases_exit.py: what fails there stays in torch's RRef context
            begin = time.monotonic()
            with pytest.raises(RuntimeError) as caught:
                APIS[api](world.name(1), identity, args=(1,))
            assert time.monotonic() - begin < AT_ONCE
            if world.mpi:
                for part in (world.name(1), "1", socket.gethostname()):
                    assert part in str(caught.value), f"no {part!r} in {caught.value!s}"
        for rank in (0, 2, 3):
            equal(rpc.rpc_sync(world.name(rank), identity, args=(rank,)), rank)
    world.barrier()
    if world.rank != 1:
        rpc.shutdown(graceful=False)


# Names


@case(session=False)
def names_that_torch_refuses(world: World) -> None:
    for name, text in {"": "non-empty", "no spaces": "must match", "no*stars": "must match", "x" * 128: "128"}.items():
        with pytest.raises(RuntimeError, match=text):
            rpc.init_rpc(name, **arguments(world))
    with pytest.raises((RuntimeError, TypeError)):
        rpc.init_rpc(None, **arguments(world))
    world.init()
    check_calls(world)
    rpc.shutdown()


@case(session=False)
def names_that_torch_takes(world: World) -> None:
    prefix = "A-z_0:" + "x" * 120
    world.init(f"{prefix}{world.rank}")
    to = f"{prefix}{(world.rank + 1) % world.size}"
    equal(rpc.rpc_sync(to, identity, args=(1,)), 1)
    rpc.shutdown()


@case(session=False, tensorpipe=STORE)
def names_given_twice(world: World) -> None:
    with pytest.raises(RuntimeError, match=r"not unique.*worker0|worker0.*not unique"):
        world.init(world.name(world.rank // 2))
    world.init()
    check_calls(world)
    rpc.shutdown()


def arguments(world: World, **options: Any) -> dict[str, Any]:
    """What init_rpc takes besides the name."""
    if world.mpi:
        return {"backend": "MPI", "rpc_backend_options": world.options(**options)}
    return {"rank": world.rank, "world_size": world.size, "rpc_backend_options": world.options(**options)}


# Rank and world size


@case(session=False, launched=True, sizes=(1, 4), tensorpipe=MPI_ONLY)
def rank_and_world_size_are_known(world: World) -> None:
    for given in (
        {},
        {"rank": world.rank},
        {"world_size": world.size},
        {"rank": world.rank, "world_size": world.size},
        {"rank": -1, "world_size": None},
    ):
        if world.size == 1 and "world_size" not in given:
            continue  # one rank is taken for a missing launcher, unless asked for
        rpc.init_rpc(world.name(), backend="MPI", **given)
        equal((rpc.get_worker_info().id, rpc.get_worker_info().name), (world.rank, world.name()))
        check_calls(world)
        rpc.shutdown()


@case(session=False, launched=True, tensorpipe=MPI_ONLY)
def rank_or_world_size_that_disagree(world: World) -> None:
    other = (world.rank + 1) % world.size
    for given, wrong, right in (
        ({"rank": other}, other, world.rank),
        ({"rank": other, "world_size": world.size}, other, world.rank),
        ({"rank": world.rank, "world_size": world.size + 1}, world.size + 1, world.size),
        ({"world_size": world.size - 1}, world.size - 1, world.size),
        ({"rank": world.size}, world.size, world.rank),
    ):
        with pytest.raises((ValueError, RuntimeError), match=f"(?s){wrong}.*{right}"):
            rpc.init_rpc(world.name(), backend="MPI", **given)
    world.init()
    check_calls(world)
    rpc.shutdown()


@case(session=False, launched=True, tensorpipe=MPI_ONLY)
def backend_as_member_of_the_enum_and_from_the_options(world: World) -> None:
    import torch_rpc_mpi

    for backend in (rpc.BackendType.MPI, None):
        options = torch_rpc_mpi.MPIRpcBackendOptions(num_worker_threads=3)
        rpc.init_rpc(world.name(), backend=backend, rpc_backend_options=options)
        assert isinstance(rpc.api._get_current_rpc_agent(), torch_rpc_mpi._C.MPIAgent)
        check_calls(world)
        rpc.shutdown()


# Options


@case(session=False, tensorpipe=MPI_ONLY)
def options_of_the_wrong_type(world: World) -> None:
    for options in ({"num_worker_threads": 3}, 5, rpc.TensorPipeRpcBackendOptions(init_method="env://")):
        with pytest.raises(TypeError, match="rpc_backend_options"):
            rpc.init_rpc(world.name(), backend="MPI", rpc_backend_options=options)
    with pytest.raises(TypeError, match="backend"):
        rpc.init_rpc(world.name(), backend="NO_SUCH_BACKEND")
    world.init()
    check_calls(world)
    rpc.shutdown()


@case(session=False, tensorpipe=MPI_ONLY)
def options_that_differ_between_ranks(world: World) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)eager_limit.*100.*200|eager_limit.*200.*100"):
        world.init(eager_limit=100 if world.rank == 2 else 200)
    world.init(num_worker_threads=2 + world.rank, rpc_timeout=20 + world.rank)
    check_calls(world)
    rpc.shutdown()


@case(
    session=False,
    tensorpipe=MPI_ONLY,
    each={
        "nothing_eager": {"eager_limit": 0},
        "all_eager": {"eager_limit": 2**20},
        "small_chunks": {"bulk_chunk": 4096},
        "no_spinning": {"spin_time": 0.0, "max_sleep": 0.01},
        "much_spinning": {"spin_time": 0.05},
    },
)
def engine_options(world: World, options: dict[str, Any]) -> None:
    world.init(**options)
    for size in (0, 1, 100, 10_000, 300_000):
        equal(rpc.rpc_sync(world.next, identity, args=(torch.ones(size),)), torch.ones(size))
    in_threads(3, lambda thread: check_calls(world))
    rpc.shutdown()


# Communicators


@case(session=False, tensorpipe=MPI_ONLY)
def a_communicator_freed_right_after_init(world: World) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Dup()
    world.init(comm=comm)
    comm.Free()
    check_calls(world)
    rpc.shutdown()


@case(session=False, sizes=(2, 4), tensorpipe=MPI_ONLY)
def communicators_that_cannot_carry_rpc(world: World) -> None:
    from mpi4py import MPI

    half = MPI.COMM_WORLD.Split(world.rank % 2)
    inter = half.Create_intercomm(0, MPI.COMM_WORLD, 1 - world.rank % 2)
    freed = MPI.COMM_WORLD.Dup()
    freed.Free()
    later = MPI.COMM_WORLD.Dup()
    options = world.options(comm=later)
    later.Free()
    for comm, kind, text in (
        (inter, (ValueError, TypeError), "(?i)intercomm"),
        (freed, ValueError, "(?i)freed|null"),
        (MPI.COMM_NULL, ValueError, "(?i)freed|null"),
        ("world", TypeError, "comm"),
    ):
        with pytest.raises(kind, match=text):
            world.init(comm=comm)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)freed|null"):
        rpc.init_rpc(world.name(), backend="MPI", rpc_backend_options=options)
    inter.Free()
    half.Free()
    world.init()
    check_calls(world)
    rpc.shutdown()
