"""Programs with device tensors that need processes of their own: a rank dies, or what a process uses is looked at."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from device_world import COUNT, FIRST, IS_TEST_DEVICE, SECOND, late, maps, module, numbers
from harness import World, equal, eventually, program

from torch_rpc_mpi import _mpi


def identity(value: Any) -> Any:
    return value


def die(_: torch.Tensor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def path_to(worker: str) -> str:
    return rpc._get_debug_info().get(f"mpi.device_path.{worker}", "")


@program(
    size=3,
    launcherless=True,
    succeeds=None,
    expect=["rank 0 went on", "rank 2 went on"],
    tensorpipe="TensorPipe knows no test device" if IS_TEST_DEVICE else "its ranks wait for the dead one",
)
def one_dies_in_the_middle_of_a_transfer(world: World) -> None:
    world.init(**maps((FIRST, FIRST), ranks=3))
    for to in world.others:  # by pinned memory, and when that is agreed, by memory that they share
        equal(rpc.rpc_sync(to, identity, args=(late(100_000),)).cpu(), numbers(100_000, "cpu"))
        eventually(lambda to=to: "ipc" in path_to(to), "memory is shared")
    go_on_without_one(world)


@program(
    size=3,
    launcherless=True,
    succeeds=None,
    expect=["rank 0 went on", "rank 2 went on"],
    skip=None if IS_TEST_DEVICE else "no MPI that can be had is aware of real devices",
    tensorpipe="it does not use MPI",
)
def one_dies_in_the_middle_of_a_transfer_by_mpi(world: World) -> None:
    world.init(**maps((FIRST, FIRST), ranks=3), device_path="mpi")
    go_on_without_one(world)


def go_on_without_one(world: World) -> None:
    world.barrier()
    if world.rank == 1:
        world.wait("never")
    other = world.name(2 - world.rank)
    if world.rank == 0:
        first = rpc.rpc_async("worker1", die, args=(numbers(10),))
        rest = [rpc.rpc_async("worker1", identity, args=(late(20_000_000),)) for _ in range(3)]
        for future in (first, *rest):
            with pytest.raises(RuntimeError, match="worker1"):
                future.wait()
    for i in range(5):
        x = late(5_000_000, seed=i)
        equal(rpc.rpc_sync(other, identity, args=(x,)).cpu(), x.cpu())
    world.signal(f"rank {world.rank} is done")
    world.wait(f"rank {2 - world.rank} is done")
    print(f"rank {world.rank} went on", flush=True)
    rpc.shutdown(graceful=False)


@program(
    size=2,
    launcherless=True,
    skip=None if IS_TEST_DEVICE else "no MPI that can be had is aware of real devices",
    tensorpipe="it does not use MPI",
)
def an_mpi_that_says_that_it_takes_device_memory_is_given_it(world: World) -> None:
    """Not where two processes share the devices: so each has a node of its own here."""
    asked: list[str] = []
    _mpi.LoadedMPI.takes_memory_of = lambda self, kind: not asked.append(kind)  # type: ignore[method-assign]
    world.init(**maps((FIRST, FIRST)), node=f"node of rank {world.rank}")
    equal(asked, [torch.device(FIRST).type])
    x = late(100_000)
    equal(rpc.rpc_sync(world.next, identity, args=(x,)).cpu(), numbers(100_000, "cpu"))
    told = rpc._get_debug_info()
    equal(told["mpi.device_path"], "mpi")
    assert int(told["mpi.device_bytes_received_mpi"]) >= 400_000
    rpc.shutdown()


def last_of(x: torch.Tensor) -> float:
    return float(x.cpu()[-1])


@program(
    size=2,
    launcherless=True,
    skip=None if IS_TEST_DEVICE else "real devices share all of their memory or none",
    tensorpipe="TensorPipe knows no test device",
)
def one_more_region_cannot_be_opened(world: World) -> None:
    """The calls with pieces of it fail, and later ones take the next path."""
    import rpctest_device

    world.init(**maps((FIRST, FIRST)))
    equal(rpc.rpc_sync(world.next, identity, args=(late(100_000),)).cpu(), numbers(100_000, "cpu"))
    eventually(lambda: path_to(world.next) == "0->0 ipc", "memory is shared")
    world.barrier()
    rpctest_device.allow_ipc(world.rank == 0)
    world.barrier()
    if world.rank == 0:
        large = late(2_000_000)  # the region that was offered is for pieces of 4 MiB
        with pytest.raises(RuntimeError, match="IpcOpenMemHandle"):
            rpc.rpc_sync("worker1", last_of, args=(large,))
        eventually(lambda: path_to("worker1").startswith("0->0 pinned (one more region of 64 MiB"), "it is told")
        equal(rpc.rpc_sync("worker1", last_of, args=(large,)), float(large.cpu()[-1]))
        equal(rpc.rpc_sync("worker1", last_of, args=(late(100_000),)), float(numbers(100_000, "cpu")[-1]))
    world.barrier()
    rpc.shutdown()


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@program(
    size=2,
    launcherless=True,
    skip=None if IS_TEST_DEVICE and COUNT > 1 else "the test device alone tells which contexts there are",
    tensorpipe="TensorPipe knows no test device",
)
def no_context_on_devices_outside_the_maps(world: World) -> None:
    world.init(**maps((SECOND, SECOND)))
    with torch.device(SECOND), module().device(SECOND):
        for size in (10, 100_000, 3_000_000):
            x = torch.arange(size, dtype=torch.float32)
            for _ in range(3):
                equal(rpc.rpc_sync(world.next, doubled, args=(x,)).cpu(), x.cpu() * 2)
                equal(
                    rpc.rpc_async(world.next, torch.add, args=(x, 1)).then(lambda f: f.wait()).wait().cpu(), x.cpu() + 1
                )
                equal(rpc.remote(world.next, doubled, args=(x,)).to_here().cpu(), x.cpu() * 2)
    world.barrier()
    equal(module().contexts(), [1])
    rpc.shutdown()
    equal(module().contexts(), [1])
