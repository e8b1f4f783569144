"""One case of the benchmark, and what it is made with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SERVER, PEER = "worker0", "worker1"


class Place(Protocol):
    """Where a case runs: one rank of one backend."""

    rank: int
    size: int

    def meet(self, count: int) -> None:
        """Returns when so many ranks have called it in this turn."""

    def restart(self, **options: Any) -> None:
        """``shutdown`` and ``init_rpc``, with these options of ours."""

    def device(self, rank: int | None = None) -> str:
        """Where the tensors of a rank are; of this one by default."""

    def ones(self, *sizes: int) -> torch.Tensor:
        """There."""

    def timed(self, call: Callable[[], Any], samples: int) -> list[float]:
        """As :func:`timed`, until what the call has returned is there."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: as ``--cases`` knows it.
        title: as the table shows it.
        run: takes the place and a number of samples, and returns them, in ``unit``.
        samples: how many a round takes at each caller.
        callers: which ranks call at once: rank 0, all but rank 0, or all.
        to: whom they call: rank 1, rank 0, the next rank, or every rank.
        calls: calls in one sample; a rate is shown if there are several. None: one to each rank.
        unit: "s" (seconds), or "core" (the share of a core that the process takes).
        message: bytes there and back of one call in the counterpart in MPI itself; None where there is none.
        least_ranks: the smallest world in which it says something.
        everywhere: is measured in worlds of every size, not only in the smallest.
        quick: is part of ``--quick``.
        most_rounds: for cases that take long.
        warm: is run before it is measured.
        memory: bytes that the host must have free for it.
        restarts: begins a new session.
        host: is measured with tensors in the memory of the host.
        devices: is measured with tensors on devices.
        devices_of: the only type of devices with which it can be, if there is such a one.
        limit: which copy between devices is its counterpart, if there is one.
        ours: is about what the other backends have not.
    """

    name: str
    title: str
    run: Callable[[Place, int], list[float]]
    samples: int
    callers: Literal["first", "others", "all"] = "first"
    to: Literal["peer", "server", "neighbour", "everyone"] = "peer"
    calls: int | None = 1
    unit: Literal["s", "core"] = "s"
    message: tuple[int, int] | None = None
    least_ranks: int = 2
    everywhere: bool = False
    quick: bool = False
    most_rounds: int | None = None
    warm: bool = True
    memory: int = 0
    restarts: bool = False
    host: bool = True
    devices: bool = False
    devices_of: str | None = None
    limit: Literal["direct", "pinned"] = "direct"
    ours: bool = False

    def calls_from(self, rank: int) -> bool:
        return self.callers == "all" or (rank == 0) == (self.callers == "first")

    def callees(self, rank: int, size: int) -> list[int]:
        """Whom this rank calls."""
        if not self.calls_from(rank):
            return []
        return {"peer": [1], "server": [0], "neighbour": [(rank + 1) % size], "everyone": list(range(size))}[self.to]


def timed(call: Callable[[], Any], samples: int) -> list[float]:
    """Seconds of each call, one after the other."""
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def text_of(size: int) -> str:
    """Bytes for people: 64 KiB."""
    for unit, text in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {text}"
    return f"{size} B"
