"""A server that answers many small requests with one large computation, holding no thread while they gather.

Run: mpirun -n 4 python examples/batching_server.py
"""

import threading

import torch
import torch.distributed.rpc as rpc
from mpi4py import MPI

BATCH = 3
ROUNDS = 100


class Server:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(256, 256)
        self.lock = threading.Lock()
        self.inputs: list[torch.Tensor] = []
        self.future: torch.futures.Future = torch.futures.Future()
        self.batches = 0

    @staticmethod
    @rpc.functions.async_execution
    def project(server: rpc.RRef, row: torch.Tensor) -> torch.futures.Future:
        """Completes when the batch is full; the caller gets its own row of the result."""
        self = server.local_value()
        with self.lock:
            index = len(self.inputs)
            self.inputs.append(row)
            future = self.future
            full = len(self.inputs) == BATCH
            if full:
                batch, self.inputs, self.future = torch.stack(self.inputs), [], torch.futures.Future()
                self.batches += 1
        result = future.then(lambda done: done.wait()[index])
        if full:
            future.set_result(batch @ self.weight)
        return result


def work(server: rpc.RRef, rank: int) -> float:
    total = 0.0
    for step in range(ROUNDS):
        row = torch.full((256,), float(rank + step))
        total += rpc.rpc_sync(server.owner(), Server.project, args=(server, row)).sum().item()
    return total


if __name__ == "__main__":
    rank = MPI.COMM_WORLD.rank
    rpc.init_rpc(f"worker{rank}", backend="MPI")
    if rank == 0:
        server = rpc.RRef(Server())
        clients = [rpc.rpc_async(f"worker{client}", work, args=(server, client)) for client in range(1, BATCH + 1)]
        torch.futures.wait_all(clients)
        print(f"{BATCH * ROUNDS} requests in {server.local_value().batches} batches")
    rpc.shutdown()
