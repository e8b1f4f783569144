"""Cases of tensors, in the memory of the host or on devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.rpc as rpc

from .case import GIB, KIB, MIB, PEER, Case, Place, text_of, timed

# What is called.


def echo(x: Any) -> Any:
    return x


def take(x: Any) -> None:
    """The way there alone. On a device, the tensor is there when the streams of the call have come so far."""
    if isinstance(x, torch.Tensor) and not x.is_cpu:
        torch.get_device_module(x.device).current_stream(x.device).synchronize()


# Ways to measure.


def _with_tensor(function: Callable[..., Any], make: Callable[[Place], Any]) -> Callable[[Place, int], list[float]]:
    def run(place: Place, samples: int) -> list[float]:
        x = make(place)
        return place.timed(lambda: rpc.rpc_sync(PEER, function, args=(x,)), samples)

    return run


def _with_tensor_at_once(
    function: Callable[..., Any], make: Callable[[Place], Any], count: int
) -> Callable[[Place, int], list[float]]:
    def run(place: Place, samples: int) -> list[float]:
        x = make(place)

        def calls() -> None:
            torch.futures.wait_all([rpc.rpc_async(PEER, function, args=(x,)) for _ in range(count)])

        return place.timed(calls, samples)

    return run


def _beside(size: int) -> Callable[[Place, int], list[float]]:
    """Small calls, one after the other, while a large tensor is on its way to the same worker."""

    def run(place: Place, samples: int) -> list[float]:
        pair = torch.ones(2), torch.ones(2)
        x, times = place.ones(size // 4), []
        for _ in range(samples):
            large = rpc.rpc_async(PEER, take, args=(x,))
            while not large.done():
                times += timed(lambda: rpc.rpc_sync(PEER, torch.add, args=pair), 1)
            large.wait()
        return times

    return run


def _with_option(run: Callable[[Place, int], list[float]], **options: Any) -> Callable[[Place, int], list[float]]:
    """Of rank 0, in a session that all ranks open with our options."""

    def run_in_session(place: Place, samples: int) -> list[float]:
        place.restart(**options)
        if place.rank == 0:
            run(place, 1)  # what the first call sets up
        samples_of_this = run(place, samples) if place.rank == 0 else []
        place.restart()
        return samples_of_this

    return run_in_session


def tensors() -> list[Case]:
    cases = []
    for size, samples in ((KIB, 200), (64 * KIB, 100), (MIB, 40), (16 * MIB, 8), (64 * MIB, 3), (GIB, 1)):
        text, name = text_of(size), text_of(size).replace(" ", "")
        quick = size in (MIB, 64 * MIB)
        most_rounds, memory = (5, 14 * size) if size == GIB else (None, 0)

        def ones(place: Place, size: int = size) -> torch.Tensor:
            return place.ones(size // 4)

        both_ways, one_way = _with_tensor(echo, ones), _with_tensor(take, ones)
        cases += [
            Case(
                f"echo_{name}",
                f"{text}, there and back",
                both_ways,
                samples,
                message=(size, size),
                quick=quick,
                most_rounds=most_rounds,
                memory=memory,
                devices=True,
            ),
            Case(
                f"take_{name}",
                f"{text}, one way",
                one_way,
                samples,
                message=(size, 64),
                most_rounds=most_rounds,
                memory=memory,
                devices=True,
            ),
        ]
    small = _with_tensor(take, lambda place: [place.ones(2) for _ in range(1000)])
    transposed = _with_tensor(take, lambda place: place.ones(2048, 2048).t())
    columns = _with_tensor(take, lambda place: place.ones(2048, 4096)[:, ::2])
    there = (16 * MIB, 64)
    return [
        *cases,
        Case("beside_1GiB", "builtin while 1 GiB is sent", _beside(GIB), 1, most_rounds=5, memory=6 * GIB),
        Case("small_tensors", "1000 tensors of 8 B, one way", small, 8, devices=True),
        Case("transposed", "16 MiB, transposed, one way", transposed, 8, message=there, devices=True),
        Case("columns", "16 MiB, each second column, one way", columns, 8, message=there, devices=True),
    ]


def devices() -> list[Case]:
    """Of tensors on devices only."""

    def gradient(place: Place) -> torch.Tensor:
        return place.ones(2 * MIB)

    def large(place: Place) -> torch.Tensor:
        return place.ones(16 * MIB)

    many = _with_tensor_at_once(take, gradient, 30)
    return [
        Case(
            "gradients", "8 MiB, 30 at once, one way", many, 3, calls=30, message=(8 * MIB, 0), host=False, devices=True
        ),
        Case(
            "pinned_64MiB",
            "64 MiB through pinned memory, one way",
            _with_option(_with_tensor(take, large), device_path="pinned"),
            5,
            "all",
            message=(64 * MIB, 0),
            restarts=True,
            host=False,
            devices=True,
            limit="pinned",
            ours=True,
        ),
    ]
