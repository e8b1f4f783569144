"""A model in two stages on two ranks, trained with distributed autograd; micro-batches keep both busy.

Run: mpirun -n 3 python examples/pipeline.py
"""

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from mpi4py import MPI
from torch import nn
from torch.distributed.optim import DistributedOptimizer


class Stage(nn.Module):
    def __init__(self, sizes: tuple[int, int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Sequential(nn.Linear(*sizes), nn.Tanh())

    def forward(self, batch: rpc.RRef) -> torch.Tensor:
        return self.layer(batch.to_here())

    def parameter_rrefs(self) -> list[rpc.RRef]:
        return [rpc.RRef(parameter) for parameter in self.parameters()]


def train() -> None:
    stages = [rpc.remote("worker1", Stage, args=((16, 64), 1)), rpc.remote("worker2", Stage, args=((64, 4), 2))]
    parameters = [rref for stage in stages for rref in stage.rpc_sync().parameter_rrefs()]
    optimizer = DistributedOptimizer(torch.optim.SGD, parameters, lr=0.5)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    targets = torch.tanh(inputs[:, :4] - inputs[:, 4:8])
    for step in range(41):
        with dist_autograd.context() as context:
            outputs = []
            for micro_batch in inputs.split(16):
                hidden = stages[0].remote().forward(rpc.RRef(micro_batch))
                outputs.append(stages[1].rpc_async().forward(hidden))
            loss = nn.functional.mse_loss(torch.cat(torch.futures.wait_all(outputs)), targets)
            dist_autograd.backward(context, [loss])
            optimizer.step(context)
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    rank = MPI.COMM_WORLD.rank
    torch.set_num_threads(1)
    rpc.init_rpc(f"worker{rank}", backend="MPI")
    if rank == 0:
        train()
    rpc.shutdown()
