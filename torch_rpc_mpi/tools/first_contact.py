"""Three programs for the first contact, under mpirun, torchrun or alone."""

from __future__ import annotations

import os
import socket
import time

import torch
import torch.distributed.rpc as rpc

from .facts import size_text
from .place import Place, worker_names

_SIZES = [0, *(4**power for power in range(3, 13))]  # bytes, up to 16 MiB


def hello(place: Place) -> None:
    """Every rank says who it is, asked by rank 0."""
    with place.session():
        for name in worker_names() if place.rank == 0 else []:
            print(rpc.rpc_sync(name, greeting), flush=True)


def greeting() -> str:
    me = rpc.get_worker_info()
    return f"hello, I am {me.name}, rank {me.id} of {len(worker_names())} on {socket.gethostname()} (pid {os.getpid()})"


def ring(place: Place, loops: int = 100) -> None:
    """A tensor goes around, each rank calling the next."""
    with place.session():
        if place.rank == 0:
            names = worker_names()
            around = [*names[1:], names[0]]
            begin = time.perf_counter()
            for _ in range(loops):
                visited = pass_on(torch.zeros(1), around)
            seconds = (time.perf_counter() - begin) / loops
            assert visited.item() == len(around)
            print(f"a tensor went around {len(around)} ranks {loops} times, {seconds * 1e6:.0f} µs each time")


def pass_on(tensor: torch.Tensor, names: list[str]) -> torch.Tensor:
    return rpc.rpc_sync(names[0], pass_on, (tensor + 1, names[1:])) if names else tensor


def pingpong(place: Place, loops: int = 20) -> None:
    """Tensors of growing size go from rank 0 to rank 1 and back."""
    with place.session():
        if place.rank == 0:
            peer = worker_names()[-1] if place.alone else worker_names()[1]
            print(f"{'size':>10} {'there and back':>15} {'each way':>10}   with {peer}")
            for size in _SIZES:
                tensor = torch.ones(size, dtype=torch.uint8)
                seconds = min(_seconds(peer, tensor) for _ in range(loops))
                rate = 2 * size / seconds / 1e9
                print(f"{size_text(size):>10} {seconds * 1e6:>12.0f} µs {rate:>5.2f} GB/s", flush=True)


def _seconds(peer: str, tensor: torch.Tensor) -> float:
    begin = time.perf_counter()
    rpc.rpc_sync(peer, give_back, (tensor,))
    return time.perf_counter() - begin


def give_back(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
