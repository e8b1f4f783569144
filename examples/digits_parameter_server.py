"""A parameter server and its trainers learn to read handwritten digits.

    mpirun -n 4 python examples/digits_parameter_server.py
    python examples/digits_parameter_server.py --backend tensorpipe     # the same without MPI, for comparison

Rank 0 holds the network. Every other rank holds a share of the images and trains on it: it calls the network's forward
on the server, computes the loss, and lets distributed autograd and DistributedOptimizer do the rest, which happens
where the parameters are. The trainers do not wait for each other within an epoch.

The data are scikit-learn's 1797 scans of digits, 8 x 8 pixels each; they come with the package. At the end it shows the
accuracy on images that no trainer saw, the rate of calls and bytes, and a picture; its status is 1 below 0.95.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn, optim
from torch.distributed.optim import DistributedOptimizer
from torch.nn import functional
from tqdm import tqdm

SERVER = "server"
REQUIRED_ACCURACY = 0.95
BATCH = 32
LEARNING_RATE = 0.03


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; the same on every rank."""
    digits = load_digits()
    split = train_test_split(digits.data / 16, digits.target, test_size=0.25, random_state=0, stratify=digits.target)
    x_train, x_test, y_train, y_test = (torch.tensor(part) for part in split)
    return x_train.float(), y_train.long(), x_test.float(), y_test.long()


class Linear(nn.Linear):
    """A linear layer that can be stepped while others are between their forward and backward passes.

    Backward needs the weights that forward saw. Another trainer's step changes them in place, which autograd refuses.
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.clone(), self.bias)


class Net(nn.Module):
    """Lives on the server; trainers call its methods through an RRef."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Linear(64, 128), nn.ReLU(), Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def parameter_rrefs(self) -> list[rpc.RRef]:
        return [rpc.RRef(parameter) for parameter in self.parameters()]


class Epoch(NamedTuple):
    """What a trainer reports of one pass through its images."""

    loss: float
    calls: int
    tensor_bytes: int


class Trainer:
    """Lives on a trainer's rank, with its share of the images."""

    def __init__(self, net: rpc.RRef, index: int, count: int) -> None:
        images, labels, _, _ = load_images()
        self.images, self.labels = images[index::count], labels[index::count]
        self.net = net
        # Its steps get shorter with time. Plain SGD works too, but every trainer steps on weights that others have just
        # changed, and with steps of one length that now and then throws the net off its course.
        self.optimizer = DistributedOptimizer(optim.Adagrad, net.rpc_sync().parameter_rrefs(), lr=LEARNING_RATE)
        self.random = torch.Generator().manual_seed(index)

    def train(self) -> Epoch:
        losses, sent = [], 0
        for batch in torch.randperm(len(self.images), generator=self.random).split(BATCH):
            with dist_autograd.context() as context:
                images = self.images[batch]
                logits = self.net.rpc_sync().forward(images)
                loss = functional.cross_entropy(logits, self.labels[batch])
                dist_autograd.backward(context, [loss])
                self.optimizer.step(context)
            losses.append(loss.item())
            sent += images.nbytes + 2 * logits.nbytes  # the logits come, and their gradient goes
        return Epoch(sum(losses) / len(losses), 3 * len(losses), sent)  # forward, backward, step


def serve(size: int, arguments: argparse.Namespace) -> bool:
    """Runs the training; True if the result is good enough."""
    torch.manual_seed(0)
    _, _, images, labels = load_images()
    net = rpc.RRef(Net())
    trainers = [rpc.remote(f"trainer{rank}", Trainer, args=(net, rank - 1, size - 1)) for rank in range(1, size)]
    losses, accuracies, calls, tensor_bytes, seconds = [], [], 0, 0, 0.0
    with tqdm(total=arguments.epochs * len(trainers), unit="pass", desc=f"{size - 1} trainers", mininterval=0.3) as bar:
        for _ in range(arguments.epochs):
            begin = time.perf_counter()
            passes = [trainer.rpc_async(timeout=0).train() for trainer in trainers]
            for future in passes:
                future.add_done_callback(lambda _: bar.update())
            epochs = torch.futures.wait_all(passes)
            seconds += time.perf_counter() - begin
            with torch.no_grad():
                accuracy = (net.local_value()(images).argmax(1) == labels).float().mean().item()
            losses.append(sum(epoch.loss for epoch in epochs) / len(epochs))
            accuracies.append(accuracy)
            calls += sum(epoch.calls for epoch in epochs)
            tensor_bytes += sum(epoch.tensor_bytes for epoch in epochs)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracy:.3f}")
    draw(losses, accuracies, arguments)
    print(f"backend        {arguments.backend}")
    print(f"test accuracy  {accuracies[-1]:.4f} (at least {REQUIRED_ACCURACY})")
    print(f"training time  {seconds:.2f} s")
    print(f"calls          {calls} in all, {calls / seconds:.0f} per second (forward, backward, step)")
    print(f"tensor bytes   {tensor_bytes / 1e6:.1f} MB in all, {tensor_bytes / seconds / 1e6:.2f} MB per second")
    print(f"picture        {os.path.abspath(arguments.output)}", flush=True)
    return accuracies[-1] >= REQUIRED_ACCURACY


def draw(losses: list[float], accuracies: list[float], arguments: argparse.Namespace) -> None:
    import matplotlib as mpl  # here, because the trainers need not wait for it

    mpl.use("Agg")  # there is no display on a cluster's nodes
    from matplotlib import pyplot

    epochs = range(1, len(losses) + 1)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(epochs, losses, color="tab:blue")
    left.set(title="Training loss", xlabel="epoch", ylabel="cross entropy", yscale="log")
    right.plot(epochs, accuracies, color="tab:green")
    right.axhline(REQUIRED_ACCURACY, color="gray", linestyle="--", linewidth=1)
    right.set(title=f"Test accuracy, {accuracies[-1]:.3f} at the end", xlabel="epoch", ylim=(0.5, 1.0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Handwritten digits, one parameter server, backend {arguments.backend}")
    figure.savefig(arguments.output, dpi=120)


def run(rank: int, size: int, address: str, arguments: argparse.Namespace) -> int:
    """One rank, from beginning to end; returns its exit status."""
    if size < 2:
        print("needs a server and at least one trainer: mpirun -n 4 python digits_parameter_server.py", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # the ranks share the machine's cores
    name = SERVER if rank == 0 else f"trainer{rank}"
    if arguments.backend == "mpi":
        rpc.init_rpc(name, backend="MPI")
    else:
        options = rpc.TensorPipeRpcBackendOptions(init_method=address)
        rpc.init_rpc(name, rank=rank, world_size=size, rpc_backend_options=options)
    good = serve(size, arguments) if rank == 0 else True
    rpc.shutdown()
    return 0 if good else 1


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def run_spawned(rank: int, size: int, address: str, arguments: argparse.Namespace) -> None:
    sys.exit(run(rank, size, address, arguments))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=("mpi", "tensorpipe"), default="mpi")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", default="digits_parameter_server.png", help="where the picture goes")
    arguments = parser.parse_args()
    launched = any(variable in os.environ for variable in ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"))
    if arguments.backend == "tensorpipe" and not launched:
        try:
            mp.spawn(run_spawned, (4, free_address(), arguments), nprocs=4)
        except mp.ProcessExitedException as error:
            return error.exit_code
        return 0
    from mpi4py import MPI

    world: Any = MPI.COMM_WORLD
    address = world.bcast(free_address() if world.rank == 0 else None)
    return run(world.rank, world.size, address, arguments)


if __name__ == "__main__":
    sys.exit(main())
