"""A model in two stages on the devices of two ranks, GPUs if there are any, and device maps between them.

Run: mpirun -n 2 python examples/gpu_pipeline.py
"""

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from mpi4py import MPI
from torch import nn
from torch.distributed.nn import RemoteModule
from torch.distributed.optim import DistributedOptimizer

import torch_rpc_mpi


class Stage(nn.Module):
    def __init__(self, sizes: tuple[int, int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(*sizes), nn.Tanh())

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layers(batch)


def train(here: str, there: str) -> None:
    first = Stage((16, 64), 1).to(here)
    second = RemoteModule(f"worker1/{there}", Stage, args=((64, 4), 2))
    parameters = [rpc.RRef(parameter) for parameter in first.parameters()] + second.remote_parameters()
    optimizer = DistributedOptimizer(torch.optim.SGD, parameters, lr=0.5)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator).to(here)
    targets = torch.tanh(inputs[:, :4] - inputs[:, 4:8])
    for step in range(41):
        with dist_autograd.context() as context:
            # While the other rank has one micro-batch, this one works on the next.
            outputs = [second.forward_async(first(micro_batch)) for micro_batch in inputs.split(16)]
            loss = nn.functional.mse_loss(torch.cat(torch.futures.wait_all(outputs)), targets)
            dist_autograd.backward(context, [loss])
            optimizer.step(context)
        if step % 10 == 0:
            print(f"{here} and {there}: step {step:3d}  loss {loss.item():.4f}")


def own_device() -> str:
    """Of the GPUs of this host, the one for this rank; the CPU if there are none."""
    if not torch.accelerator.is_available():
        return "cpu"
    rank_on_host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).rank
    return f"{torch.accelerator.current_accelerator().type}:{rank_on_host % torch.accelerator.device_count()}"


if __name__ == "__main__":
    rank = MPI.COMM_WORLD.rank
    torch.set_num_threads(1)
    devices = MPI.COMM_WORLD.allgather(own_device())
    # What this rank has on its device arrives on the other's. Answers and gradients take the way back.
    maps = {f"worker{other}": {devices[rank]: device} for other, device in enumerate(devices)}
    options = torch_rpc_mpi.MPIRpcBackendOptions(device_maps=maps)
    rpc.init_rpc(f"worker{rank}", backend="MPI", rpc_backend_options=options)
    if rank == 0:
        train(*devices)
    rpc.shutdown()
