"""A parameter server in the memory of its host, and trainers on GPUs if there are any: device maps between the two.

Run: mpirun -n 3 python examples/gpu_parameter_server.py
"""

import threading

import torch
import torch.distributed.rpc as rpc
from mpi4py import MPI
from torch import nn

import torch_rpc_mpi


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


class ParameterServer:
    def __init__(self) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.lock = threading.Lock()

    def step(self, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Takes gradients in memory of the host, whatever device they come from, and gives the new parameters back."""
        assert all(gradient.is_cpu for gradient in gradients)
        with self.lock:
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            return [parameter.detach().clone() for parameter in self.model.parameters()]


def train(server: rpc.RRef) -> None:
    device = own_device()
    model = make_model().to(device)
    generator = torch.Generator().manual_seed(rpc.get_worker_info().id)
    for step in range(201):
        inputs = torch.randn(64, 16, generator=generator).to(device)
        loss = nn.functional.mse_loss(model(inputs), torch.tanh(inputs[:, :4] - inputs[:, 4:8]))
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        # They go from this device into the server's memory, and what it returns comes back to this device.
        parameters = server.rpc_sync().step(list(gradients))
        with torch.no_grad():
            for own, new in zip(model.parameters(), parameters, strict=True):
                assert new.device == own.device
                own.copy_(new)
        if step % 50 == 0:
            print(f"{rpc.get_worker_info().name} on {device}: step {step:3d}  loss {loss.item():.4f}", flush=True)


def own_device() -> str:
    """Of the GPUs of this host, the one for this rank; the CPU if there are none."""
    if not torch.accelerator.is_available():
        return "cpu"
    return f"{torch.accelerator.current_accelerator().type}:{rank_on_host % torch.accelerator.device_count()}"


if __name__ == "__main__":
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    rank_on_host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).rank
    torch.set_num_threads(1)
    options = torch_rpc_mpi.MPIRpcBackendOptions()
    if rank > 0:
        options.set_device_map("server", {own_device(): "cpu"})
    rpc.init_rpc("server" if rank == 0 else f"trainer{rank}", backend="MPI", rpc_backend_options=options)
    if rank == 0:
        server = rpc.RRef(ParameterServer())
        trainers = [rpc.rpc_async(f"trainer{other}", train, args=(server,)) for other in range(1, size)]
        torch.futures.wait_all(trainers)
    rpc.shutdown()
