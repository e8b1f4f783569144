"""The devices of the device cases: the test device, or those of $RPC_TEST_DEVICE, such as cuda."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness import case

KIND = os.environ.get("RPC_TEST_DEVICE", "rpctest")
IS_TEST_DEVICE = KIND == "rpctest"

if IS_TEST_DEVICE and "RPC_TEST_EVENTS" in os.environ:  # in a rank, not where the cases are collected
    os.environ.setdefault("RPCTEST_SEED", "1")  # so that what is queued is late, by chance
    sys.path.insert(0, str(Path(__file__).parents[1] / "device"))
    import rpctest_device

    import torch_rpc_mpi

    torch_rpc_mpi.register_device_runtime("rpctest", rpctest_device.LIBRARY, rpctest_device.PREFIX)

COUNT = int(os.environ.get("RPC_TEST_DEVICES", "2" if IS_TEST_DEVICE else torch.cuda.device_count()))
FIRST, SECOND = f"{KIND}:0", f"{KIND}:1"
RANKS = 2


def module() -> Any:
    """torch.cuda, or that of the test device."""
    return getattr(torch, KIND)


def maps(*pairs: tuple[str, str], ranks: int = RANKS) -> dict[str, Any]:
    """Options by which every worker's devices go to those of every worker, itself too."""
    return {"device_maps": {f"worker{rank}": dict(pairs) for rank in range(ranks)}}


IDENTITY = maps((FIRST, FIRST))
BOTH = maps((FIRST, FIRST), (SECOND, SECOND))
SWAPPED = maps((FIRST, SECOND), (SECOND, FIRST))
FROM_CPU = maps(("cpu", FIRST))
PINNED = {**IDENTITY, "device_path": "pinned"}
# For whatever MPI: the memory of the test device is that of the host.
BY_MPI = {**maps((FIRST, FIRST)), "device_path": "mpi"}
TO_CPU = maps((FIRST, "cpu"))
MIXED = maps(("cpu", SECOND), (FIRST, FIRST))


def device_case(options: dict[str, Any], backward: bool = False, **more: Any) -> Any:
    """A case with a session of these maps, where there are devices enough for them.

    Args:
        options: of the session.
        backward: it runs torch's engine of distributed autograd, which knows CUDA and no other kind of device.
        more: arguments of case().
    """
    needed = 2 if SECOND in str(options) else 1
    if options.get("device_path") == "mpi" and not IS_TEST_DEVICE:
        needed = COUNT + 1  # no MPI that can be had is aware of real ones

    def register(function: Any) -> Any:
        if needed > COUNT or (backward and IS_TEST_DEVICE):
            return function
        tensorpipe = "TensorPipe knows no test device" if IS_TEST_DEVICE else None
        return case(sizes=(RANKS,), options=options, tensorpipe=tensorpipe, **more)(function)

    return register


def held() -> dict[str, int]:
    """What this process has of its devices now, as far as the device tells."""
    torch.empty(1, device=FIRST)  # only then does an allocator look which of its events are done
    if not IS_TEST_DEVICE:
        return {"tensor_bytes": module().memory_allocated(FIRST)}
    counts = module().counts()._asdict()
    # How often it has waited is no such thing, and torch keeps streams for the life of the process.
    return {name: count for name, count in counts.items() if name not in ("synchronizations", "streams")}


def busy() -> None:
    """The current stream does nothing for a while: what is queued behind it now comes late."""
    if IS_TEST_DEVICE:
        module()._sleep(20_000)
    else:
        module()._sleep(20_000_000)  # cycles


def numbers(size: int, device: str = FIRST, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Different for each seed; its values can be told from one another."""
    values = (torch.arange(size, dtype=torch.int64) + seed) % 251
    return values.to(dtype).to(device)


def late(size: int, device: str = FIRST, seed: int = 0) -> torch.Tensor:
    """The same, but written in the current stream only after a while."""
    values = numbers(size, "cpu", seed=seed).to(device)
    result = torch.zeros(size, device=device)
    busy()
    result.add_(values)
    return result
