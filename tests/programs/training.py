"""A program as it is written for torchrun and TensorPipe: DDP beside RPC, a DataLoader, a handler at exit."""

import argparse
import atexit
import dataclasses
import os

import torch
import torch.distributed as dist
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch.distributed.optim import DistributedOptimizer
from torch.distributed.rpc import TensorPipeRpcBackendOptions
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset


@dataclasses.dataclass
class Batch:
    values: torch.Tensor


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((4,), float(index))


class Embedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, batch):
        return Batch(self.layer(batch.values))

    def parameter_rrefs(self):
        return [rpc.RRef(parameter) for parameter in self.parameters()]


def count(values):
    return len(values)


def at_exit(name):
    if rpc._is_current_rpc_agent_set():
        assert rpc.rpc_sync(name, count, args=([1, 2],)) == 2
        rpc.shutdown()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, required=True)
    arguments = parser.parse_args()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    assert os.environ["LOCAL_RANK"] == str(rank)
    assert os.environ["LOCAL_WORLD_SIZE"] == str(world_size)

    dist.init_process_group("gloo")
    options = TensorPipeRpcBackendOptions(_transports=["uv"], num_worker_threads=8)
    options.init_method = "env://"
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=world_size, rpc_backend_options=options)
    other = f"worker{(rank + 1) % world_size}"
    atexit.register(at_exit, other)

    model = DistributedDataParallel(torch.nn.Linear(4, 1))
    embedding = rpc.remote(other, Embedding)
    parameters = embedding.rpc_sync().parameter_rrefs()
    parameters += [rpc.RRef(parameter) for parameter in model.parameters()]
    optimizer = DistributedOptimizer(torch.optim.SGD, parameters, lr=1e-3)
    losses = []
    for _ in range(arguments.epochs):
        for values in DataLoader(Numbers(), batch_size=4, num_workers=1, multiprocessing_context="spawn"):
            with dist_autograd.context() as context:
                loss = (model(embedding.rpc_sync().forward(Batch(values)).values) - 1).square().mean()
                dist_autograd.backward(context, [loss])
                optimizer.step(context)
                losses.append(loss.item())
    assert len(losses) == 2 * arguments.epochs
    assert min(losses) > 0
    dist.barrier()
    print(f"rank {rank} is done with {type(rpc._get_current_rpc_agent()).__name__}")


if __name__ == "__main__":
    main()
