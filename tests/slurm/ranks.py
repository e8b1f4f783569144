"""Ranks of the cases of slurm.py: python ranks.py waits | given RANK."""

from __future__ import annotations

import signal
import sys
import time

import torch
import torch.distributed.rpc as rpc

from torch_rpc_mpi import _launchers


def waits() -> None:
    """For its end. Rank 1 has no ear for SIGTERM."""
    launcher = _launchers.find_launcher()
    assert launcher is not None
    if launcher.rank == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rpc.init_rpc(f"worker{launcher.rank}", backend="MPI")
    print(f"rank {launcher.rank} waits", flush=True)
    if launcher.rank == 0:
        rpc.rpc_sync("worker1", time.sleep, args=(600,), timeout=0)
    rpc.shutdown()


def given(rank: int) -> None:
    """One of two processes that know their rank and where to meet."""
    rpc.init_rpc(f"worker{rank}", backend="MPI", rank=rank, world_size=2)
    assert rpc.rpc_sync(f"worker{1 - rank}", torch.add, args=(torch.ones(1), 1)) == 2
    rpc.shutdown()
    print(f"rank {rank} of 2: ok", flush=True)


if __name__ == "__main__":
    waits() if sys.argv[1] == "waits" else given(int(sys.argv[2]))
