"""Remote objects: rank 0 keeps a counter on another rank, and a third one uses it too.

Run: mpirun -n 3 python examples/rref.py
"""

import threading

import torch.distributed.rpc as rpc
from mpi4py import MPI


class Counter:
    def __init__(self, start: int) -> None:
        self.lock = threading.Lock()
        self.value = start

    def add(self, amount: int) -> int:
        with self.lock:
            self.value += amount
            return self.value


def add_many(counter: rpc.RRef, times: int) -> int:
    """Runs on a rank that neither made nor owns the counter: it got a reference."""
    for _ in range(times):
        last = counter.rpc_sync().add(1)
    return last


if __name__ == "__main__":
    rank = MPI.COMM_WORLD.rank
    rpc.init_rpc(f"worker{rank}", backend="MPI")
    if rank == 0:
        counter = rpc.remote("worker1", Counter, args=(100,))
        print("owned by", counter.owner_name())
        print("after one call:", counter.rpc_sync().add(1))
        print("after another rank's 50:", rpc.rpc_sync("worker2", add_many, args=(counter, 50)))
    rpc.shutdown()
