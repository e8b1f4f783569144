"""fairscale's DistributedPipeline: a model in two parts, each in a process of its own, which a third one trains."""

import os
import sys

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
from fairscale.experimental.nn.distributed_pipeline import DistributedLoss, DistributedPipeline, PipelineModulesGraph
from torch import nn
from torch.distributed.nn import RemoteModule
from torch.distributed.optim import DistributedOptimizer

STEPS, CHUNKS = 100, 4


def train():
    layers = [
        RemoteModule("worker1/cpu", nn.Linear, (64, 64)),
        RemoteModule("worker1/cpu", nn.ReLU, ()),
        RemoteModule("worker2/cpu", nn.Linear, (64, 1)),
    ]
    graph = PipelineModulesGraph()
    graph.add_sequence(layers, [0])
    model = DistributedPipeline(graph, chunks=CHUNKS)
    optimizer = DistributedOptimizer(torch.optim.SGD, model.parameter_rrefs(), lr=0.05)
    loss_of = DistributedLoss(nn.MSELoss)
    torch.manual_seed(0)
    inputs = torch.randn(32, 64)
    targets = inputs.sum(1, keepdim=True) / 8
    losses = []
    for _ in range(STEPS):
        with dist_autograd.context() as context:
            loss = loss_of(model(inputs), rpc.RRef(targets)).to_here()
            dist_autograd.backward(context, [loss])
            optimizer.step(context)
            losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    print(f"{STEPS} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}")


def run(rank, size, port):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "localhost", port
    torch.manual_seed(rank)  # of the layers there: some do not get better in so few steps
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=8)
    rpc.init_rpc(f"worker{rank}", rank=rank, world_size=size, rpc_backend_options=options)
    if rank == 0:
        train()
    rpc.shutdown()


if __name__ == "__main__":
    mp.spawn(run, args=(3, sys.argv[1]), nprocs=3)
