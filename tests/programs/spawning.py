"""A program that starts its workers itself, as most of torch's examples do."""

import os
import sys

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
from torch.distributed.rpc import init_rpc


class Server:
    def __init__(self):
        self.total = torch.zeros(1)

    @staticmethod
    @rpc.functions.async_execution
    def add(rref, value):
        future = torch.futures.Future()
        rref.local_value().total += value
        future.set_result(rref.local_value().total.clone())
        return future


def run(rank, world_size, port):
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ["MASTER_PORT"] = port
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=16, rpc_timeout=0)
    init_rpc("server" if rank == 0 else f"trainer{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
    if rank > 0:
        server = rpc.remote("server", Server)
        assert rpc.rpc_sync("server", Server.add, args=(server, torch.ones(1))).item() == 1
        assert server.rpc_async().add(server, 2).wait().item() == 3
        print(f"trainer {rank} is done with {type(rpc._get_current_rpc_agent()).__name__}")
    rpc.shutdown()


if __name__ == "__main__":
    mp.spawn(run, args=(3, sys.argv[1]), nprocs=3)
