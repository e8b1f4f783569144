"""Rank 1 fails: python failing.py WHEN HOW."""

import os
import sys
import time

import torch.distributed.rpc as rpc

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def fail():
    if sys.argv[2] == "raise":
        raise ValueError("on purpose")
    sys.exit(3)


if rank == 1 and sys.argv[1] == "before":
    fail()
rpc.init_rpc(f"worker{rank}", rank=rank, world_size=world_size)
if rank == 1:
    fail()
rpc.rpc_sync("worker1", time.sleep, args=(60,))
