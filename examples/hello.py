"""The shortest program: every rank asks its neighbour. Run: mpirun -n 4 python examples/hello.py"""

import socket

import torch
import torch.distributed.rpc as rpc
from mpi4py import MPI


def greet(name: str) -> str:
    return f"hello {name}, this is {rpc.get_worker_info().name} on {socket.gethostname()}"


if __name__ == "__main__":
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    rpc.init_rpc(f"worker{rank}", backend="MPI")
    neighbour = f"worker{(rank + 1) % size}"
    print(rpc.rpc_sync(neighbour, greet, args=(f"worker{rank}",)))
    print(rpc.rpc_sync(neighbour, torch.add, args=(torch.ones(2), rank)))
    rpc.shutdown()
