"""What is measured. A case runs on rank 0 of a backend's two ranks and returns seconds, one value a sample."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed.rpc as rpc

PEER = "worker1"
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: as ``--cases`` knows it.
        title: as the table shows it.
        run: takes the number of samples and returns them, in seconds.
        samples: how many a round takes.
        message: bytes that go each way, for the counterpart in MPI itself; None where that has none.
        calls: calls in one sample; a rate is shown if there are several.
    """

    name: str
    title: str
    run: Callable[[int], list[float]]
    samples: int
    message: int | None = None
    calls: int = 1


def empty() -> None:
    """The function that costs nothing."""


def echo(x: Any) -> Any:
    return x


@torch.jit.script
def script_add(x: torch.Tensor, y: int) -> torch.Tensor:
    return x + y


def timed(call: Callable[[], Any], samples: int) -> list[float]:
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


_PAIR = (torch.ones(2), torch.ones(2))


def _all_at_once(issue: Callable[[], Any], count: int) -> Callable[[int], list[float]]:
    return lambda samples: timed(lambda: torch.futures.wait_all([issue() for _ in range(count)]), samples)


def _echo_of(size: int) -> Callable[[int], list[float]]:
    def run(samples: int) -> list[float]:
        x = torch.ones(size // 4)
        return timed(lambda: rpc.rpc_sync(PEER, echo, args=(x,)), samples)

    return run


def _cases() -> list[Case]:
    cases = [
        Case(
            "builtin",
            "rpc_sync, builtin",
            lambda n: timed(lambda: rpc.rpc_sync(PEER, torch.add, args=_PAIR), n),
            300,
            64,
        ),
        Case("udf", "rpc_sync, empty function", lambda n: timed(lambda: rpc.rpc_sync(PEER, empty), n), 300, 64),
        Case(
            "script",
            "rpc_sync, TorchScript",
            lambda n: timed(lambda: rpc.rpc_sync(PEER, script_add, args=(_PAIR[0], 1)), n),
            300,
            64,
        ),
        Case(
            "remote",
            "remote and to_here",
            lambda n: timed(lambda: rpc.remote(PEER, torch.add, args=_PAIR).to_here(), n),
            200,
        ),
        Case(
            "self",
            "rpc_sync to oneself",
            lambda n: timed(lambda: rpc.rpc_sync("worker0", torch.add, args=_PAIR), n),
            300,
        ),
    ]
    for count in (100, 1000):
        builtin = _all_at_once(lambda: rpc.rpc_async(PEER, torch.add, args=_PAIR), count)
        udf = _all_at_once(lambda: rpc.rpc_async(PEER, empty), count)
        cases.append(Case(f"async_builtin_{count}", f"{count} builtin calls at once", builtin, 8, None, count))
        cases.append(Case(f"async_udf_{count}", f"{count} function calls at once", udf, 8, None, count))
    for size, samples in ((KIB, 200), (64 * KIB, 100), (MIB, 40), (16 * MIB, 8), (64 * MIB, 4)):
        text = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        cases.append(Case(f"echo_{text.replace(' ', '')}", f"echo {text}", _echo_of(size), samples, size))
    return cases


CASES = {case.name: case for case in _cases()}
