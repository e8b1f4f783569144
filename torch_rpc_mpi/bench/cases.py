"""What is measured.

A case runs in every rank of a backend at once; those that are its callers return samples, the others serve meanwhile.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc

from .case import KIB, PEER, SERVER, Case, Place, timed
from .tensors import devices, echo, tensors

# What is called.


def empty() -> None:
    """The function that costs nothing."""


with warnings.catch_warnings():
    # torch.jit.script is deprecated; torch 2.14 says so to everybody.
    warnings.filterwarnings("ignore", "`torch.jit.script`")

    @torch.jit.script
    def script_add(x: torch.Tensor, y: int) -> torch.Tensor:
        return x + y


def _forward(layer: rpc.RRef[torch.nn.Module], x: torch.Tensor) -> Any:
    return layer.local_value()(x)


def _descend(context: int, layer: rpc.RRef[torch.nn.Module]) -> None:
    """A step of gradient descent where the layer is."""
    gradients = dist_autograd.get_gradients(context)  # type: ignore[attr-defined]
    with torch.no_grad():
        for parameter in layer.local_value().parameters():
            parameter -= 0.01 * gradients[parameter]


# Ways to measure.


def _each(call: Callable[[], Any]) -> Callable[[Place, int], list[float]]:
    return lambda place, samples: timed(call, samples)


def _at_once(issue: Callable[[], Any], count: int) -> Callable[[Place, int], list[float]]:
    return _each(lambda: torch.futures.wait_all([issue() for _ in range(count)]))


def _with_pair(function: Callable[..., Any]) -> Callable[[Place, int], list[float]]:
    def run(place: Place, samples: int) -> list[float]:
        pair = place.ones(2), place.ones(2)
        return place.timed(lambda: rpc.rpc_sync(PEER, function, args=pair), samples)

    return run


def _neighbours(function: Callable[..., Any], *args: Any) -> Callable[[Place, int], list[float]]:
    def run(place: Place, samples: int) -> list[float]:
        neighbour = f"worker{(place.rank + 1) % place.size}"
        return timed(lambda: rpc.rpc_sync(neighbour, function, args=args), samples)

    return run


def call_all(place: Place) -> None:
    """Calls every rank, this one as well."""
    torch.futures.wait_all([rpc.rpc_async(f"worker{rank}", empty) for rank in range(place.size)])


def _all_to_all(place: Place, samples: int) -> list[float]:
    return timed(lambda: call_all(place), samples)


def _all_to_all_of(size: int) -> Callable[[Place, int], list[float]]:
    def run(place: Place, samples: int) -> list[float]:
        x = torch.ones(size // 4)
        workers = [f"worker{rank}" for rank in range(place.size)]
        return timed(lambda: torch.futures.wait_all([rpc.rpc_async(to, echo, args=(x,)) for to in workers]), samples)

    return run


def _training_step(place: Place, samples: int) -> list[float]:
    """A layer at the peer: forward, loss, backward, and a step of the optimizer there."""
    layer = rpc.remote(PEER, torch.nn.Linear, args=(64, 64), kwargs={"device": place.device(1)})
    x = place.ones(16, 64)

    def step() -> None:
        with dist_autograd.context() as context:
            loss = rpc.rpc_sync(PEER, _forward, args=(layer, x)).sum()
            dist_autograd.backward(context, [loss])  # type: ignore[attr-defined]
            rpc.rpc_sync(PEER, _descend, args=(context, layer))

    return place.timed(step, samples)


def _idle(place: Place, samples: int) -> list[float]:
    shares = []
    for _ in range(samples):
        before, start = time.process_time(), time.perf_counter()
        time.sleep(1.0)
        shares.append((time.process_time() - before) / (time.perf_counter() - start))
    return shares


def _after_idling(pause: float) -> Callable[[Place, int], list[float]]:
    def run(place: Place, samples: int) -> list[float]:
        times = []
        for _ in range(samples):
            time.sleep(pause)
            times += timed(lambda: rpc.rpc_sync(PEER, empty), 1)
        return times

    return run


def _session(place: Place, samples: int) -> list[float]:
    def again() -> None:
        place.restart()
        call_all(place)

    gc.collect()  # RRefs do not outlive a session
    return timed(again, samples)


_PAIR = (torch.ones(2), torch.ones(2))
_SMALL = (64, 64)  # about the bytes of a small call, for MPI itself


def _small() -> list[Case]:
    nothing = lambda: rpc.rpc_sync(PEER, empty)  # noqa: E731
    script = _each(lambda: rpc.rpc_sync(PEER, script_add, args=(_PAIR[0], 1)))
    remote = _each(lambda: rpc.remote(PEER, torch.add, args=_PAIR).to_here())
    to_self = _each(lambda: rpc.rpc_sync(SERVER, torch.add, args=_PAIR))
    return [
        Case(
            "builtin",
            "rpc_sync, builtin",
            _with_pair(torch.add),
            300,
            message=_SMALL,
            everywhere=True,
            quick=True,
            devices=True,
        ),
        Case("udf", "rpc_sync, empty function", _each(nothing), 300, message=_SMALL, everywhere=True, quick=True),
        Case("script", "rpc_sync, TorchScript", script, 300, message=_SMALL),
        Case("remote", "remote and to_here", remote, 200, quick=True),
        Case("self", "rpc_sync to oneself", to_self, 300),
        Case("after_idle", "first call after 10 s", _after_idling(10.0), 1, most_rounds=5, warm=False),
        Case("after_pause", "first call after 0.1 s", _after_idling(0.1), 4, quick=True),
        # torch's engine for distributed autograd orders streams of CUDA (and ROCm, which it calls so) only.
        Case("training", "training step", _training_step, 20, devices=True, devices_of="cuda"),
    ]


def _many() -> list[Case]:
    cases = []
    for count, samples in ((1, 300), (64, 12), (100, 8), (1024, 2)):
        builtin = _at_once(lambda: rpc.rpc_async(PEER, torch.add, args=_PAIR), count)
        udf = _at_once(lambda: rpc.rpc_async(PEER, empty), count)
        text, quick = f"{count} at once" if count > 1 else "rpc_async and wait", count == 100
        for name, title, run in (("builtin", "builtin", builtin), ("udf", "empty function", udf)):
            name, title = f"async_{name}_{count}", f"{title}, {text}"
            cases.append(Case(name, title, run, samples, calls=count, message=_SMALL, quick=quick))
    return cases


def _ranks() -> list[Case]:
    neighbours, many = _neighbours(torch.add, *_PAIR), _at_once(lambda: rpc.rpc_async(SERVER, empty), 64)
    tensors = _all_to_all_of(64 * KIB)
    return [
        Case(
            "neighbours",
            "every rank calls its neighbour",
            neighbours,
            100,
            "all",
            "neighbour",
            message=_SMALL,
            everywhere=True,
            least_ranks=3,
        ),
        Case(
            "many_to_one",
            "every rank calls rank 0",
            many,
            4,
            "others",
            "server",
            64,
            message=_SMALL,
            everywhere=True,
            least_ranks=3,
            quick=True,
        ),
        Case(
            "all_to_all",
            "every rank calls every rank",
            _all_to_all,
            10,
            "all",
            "everyone",
            None,
            message=_SMALL,
            everywhere=True,
            quick=True,
        ),
        Case(
            "all_to_all_64KiB",
            "64 KiB to every rank and back",
            tensors,
            10,
            "all",
            "everyone",
            None,
            message=(64 * KIB, 64 * KIB),
            everywhere=True,
        ),
        Case("idle", "idle, share of a core", _idle, 1, "all", unit="core", most_rounds=5, quick=True, warm=False),
        Case(
            "session",
            "shutdown, init_rpc, call all",
            _session,
            1,
            "all",
            everywhere=True,
            quick=True,
            most_rounds=5,
            warm=False,
            restarts=True,
        ),
    ]


CASES = {case.name: case for case in [*_small(), *_many(), *tensors(), *devices(), *_ranks()]}
