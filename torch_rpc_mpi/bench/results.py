"""What was measured, and what it says."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .case import Case
from .world import Start, Turn

PERCENTS = range(101)
LEAST_ROUNDS = 5  # for a conclusion


@dataclass
class Result:
    """One case in worlds of one size; everything by backend."""

    case: Case
    size: int
    medians: dict[str, list[float]] = field(default_factory=dict)  # one a round
    samples: dict[str, list[float]] = field(default_factory=dict)  # of all rounds
    grown: dict[str, dict[int, int]] = field(default_factory=dict)  # bytes by rank, the most of all rounds

    def add(self, backend: str, turn: Turn) -> None:
        self.medians.setdefault(backend, []).append(statistics.median(turn.samples))
        self.samples.setdefault(backend, []).extend(turn.samples)
        most = self.grown.setdefault(backend, {})
        for rank, grown in turn.grown.items():
            most[rank] = max(most.get(rank, 0), grown)

    def calls(self) -> int:
        """All calls that the callers make in the time of one sample."""
        callers = {"first": 1, "others": self.size - 1, "all": self.size}[self.case.callers]
        return (self.size if self.case.calls is None else self.case.calls) * callers

    def median(self, backend: str) -> float | None:
        return statistics.median(self.medians[backend]) if self.medians.get(backend) else None

    def percentile(self, backend: str, percent: float) -> float:
        return percentile(sorted(self.samples[backend]), percent)

    def comparison(self, backend: str) -> Comparison | None:
        """How many times faster MPI was than ``backend``; of a share of a core, how many times less it took."""
        return Comparison.of(self.medians.get("mpi", []), self.medians.get(backend, []))


@dataclass(frozen=True)
class Comparison:
    """Ratios of the rounds' medians: their median, and the 10th and 90th percentile."""

    ratio: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Comparison | None:
        """Of values by round; None if there is no round that has both."""
        ratios = sorted(there / here for here, there in zip(ours, theirs, strict=False) if here > 0)
        if not ratios:
            return None
        return cls(statistics.median(ratios), percentile(ratios, 10), percentile(ratios, 90), len(ratios))

    @property
    def conclusive(self) -> bool:
        """Whether the difference is larger than the noise, of which a few rounds say nothing."""
        return self.rounds >= LEAST_ROUNDS and not self.low <= 1 <= self.high


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, between neighbours in proportion."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass
class Starts:
    """First sessions in worlds of one size: one a round, by backend."""

    rounds: dict[str, list[Start]] = field(default_factory=dict)

    def median(self, backend: str, what: str) -> float | None:
        """Of one of Start's times."""
        values = [value for start in self.rounds[backend] if (value := getattr(start, what)) is not None]
        return statistics.median(values) if values else None

    def whole(self, backend: str) -> float:
        """The median of what a session takes with a call to each rank."""
        return statistics.median(start.init + start.calls + (start.shutdown or 0) for start in self.rounds[backend])

    def comparison(self, backend: str) -> Comparison | None:
        """How many times faster MPI's init_rpc and shutdown were together."""
        ours, theirs = (
            [start.init + start.shutdown for start in self.rounds.get(which, []) if start.shutdown is not None]
            for which in ("mpi", backend)
        )
        return Comparison.of(ours, theirs)


@dataclass
class Report:
    """All of a run. ``starts`` is by size of the world, ``failures`` by size and backend."""

    backends: list[str]
    results: list[Result] = field(default_factory=list)
    starts: dict[int, Starts] = field(default_factory=dict)
    failures: dict[int, dict[str, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    library: str = ""  # MPI's
    device: str = ""  # that tensors were on

    def of(self, name: str, size: int | None = None) -> Result | None:
        """A case's result, in the smallest world if ``size`` is None."""
        found = [result for result in self.results if result.case.name == name and size in (None, result.size)]
        return min(found, key=lambda result: result.size, default=None)

    def as_json(self) -> dict[str, Any]:
        return {
            "results": [_as_json(result) for result in self.results],
            "starts": {str(size): _starts_as_json(starts) for size, starts in self.starts.items()},
            "failures": {str(size): failures for size, failures in self.failures.items() if failures},
            "notes": self.notes,
            "device": self.device,
        }


def _starts_as_json(starts: Starts) -> dict[str, Any]:
    found = {}
    for backend, rounds in starts.rounds.items():
        comparison = None if backend == "mpi" else starts.comparison(backend)
        found[backend] = {
            "rounds": [vars(start) for start in rounds],
            "medians": {what: starts.median(backend, what) for what in vars(rounds[0])},
            "mpi_is_faster": comparison and vars(comparison),
        }
    return found


def _as_json(result: Result) -> dict[str, Any]:
    case = result.case
    backends = {}
    for backend, samples in result.samples.items():
        ordered = sorted(samples)
        comparison = None if backend == "mpi" else result.comparison(backend)
        backends[backend] = {
            "medians": result.medians[backend],
            "percentiles": [percentile(ordered, percent) for percent in PERCENTS],
            "grown_bytes": {str(rank): grown for rank, grown in result.grown[backend].items()},
            "mpi_is_faster": comparison and {**vars(comparison), "conclusive": comparison.conclusive},
        }
    return {
        "case": case.name,
        "title": case.title,
        "ranks": result.size,
        "unit": case.unit,
        "calls": result.calls(),
        "raw_message_bytes": case.message,
        "backends": backends,
    }
