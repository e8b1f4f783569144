"""Programs with device tensors in which a rank dies while it is sent some."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from device_world import FIRST, IS_TEST_DEVICE, late, maps, numbers
from harness import World, equal, eventually, program


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
