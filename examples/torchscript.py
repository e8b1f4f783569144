"""TorchScript functions: the callee runs them without the Python interpreter lock, and they can call others themselves.

Run: mpirun -n 2 python examples/torchscript.py
"""

import torch
import torch.distributed.rpc as rpc
from mpi4py import MPI
from torch import Tensor


@torch.jit.script
def power(x: Tensor, times: int) -> Tensor:
    result = torch.ones_like(x)
    for _ in range(times):
        result = result @ x
    return result


@torch.jit.script
def both(to: str, x: Tensor) -> Tensor:
    """Runs one half remotely while it computes the other."""
    remote = rpc.rpc_async(to, power, (x, 2))
    here = power(x, 3)
    return here + remote.wait()


if __name__ == "__main__":
    rank = MPI.COMM_WORLD.rank
    rpc.init_rpc(f"worker{rank}", backend="MPI")
    if rank == 0:
        x = torch.eye(3) * 2
        print(rpc.rpc_sync("worker1", power, args=(x, 5)).diagonal())
        print(both("worker1", x).diagonal())
    rpc.shutdown()
