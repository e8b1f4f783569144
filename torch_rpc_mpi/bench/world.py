"""The controller's side of the ranks under measurement: starts them, and gives them their turns."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from .case import Case
from .ranks import END_LIMIT, START_LIMIT, Failed, Ranks, mpirun, new_store, running, worker

BACKENDS = ("mpi", "tensorpipe", "tensorpipe-uv", "raw")
# Of tensors on devices. "limit" is what the devices' own copies take. Over TCP alone TensorPipe has none.
DEVICE_BACKENDS = ("mpi", "tensorpipe", "limit")
# What ranks of MPI do besides: no session, no process of its own.
BARE = {"raw": "run_raw", "limit": "run_limit"}


@dataclass
class Turn:
    """What one turn of one backend gave: samples of all callers, and the bytes by which each rank's memory grew."""

    samples: list[float]
    grown: dict[int, int]


@dataclass
class Start:
    """Seconds of a process's first session, the slowest rank's: init_rpc, a call to each rank, shutdown.

    MPI_Init is a part of init_rpc; None in processes that had called it before.
    """

    init: float
    calls: float
    mpi_init: float | None = None
    shutdown: float | None = None

    @classmethod
    def of(cls, replies: list[dict[str, Any]]) -> Start:
        init, calls = (max(reply[what] for reply in replies) for what in ("init", "calls"))
        mpi_inits = [reply["mpi_init"] for reply in replies if reply["mpi_init"] is not None]
        return cls(init, calls, max(mpi_inits, default=None))

    def end(self, replies: list[dict[str, Any]]) -> None:
        self.shutdown = max(reply["shutdown"] for reply in replies)


@dataclass
class World(Ranks):
    """Ranks of all backends at once. ``starts`` and ``failures`` are by backend."""

    starts: dict[str, Start] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    library: str = ""  # MPI's
    device: str = ""  # that of rank 0

    def start(self, backends: list[str]) -> None:
        """Waits for the ranks and has them open their sessions. Raises Failed if not even MPI works."""
        deadline = time.monotonic() + START_LIMIT
        backends = ["mpi", *(backend for backend in backends if backend not in ("mpi", *BARE))]
        # All have come before the first begins: importing torch takes seconds of all cores.
        for step in (lambda backend: self.await_processes(backend, deadline), self._start):
            for backend in backends:
                if backend in self.failures:
                    continue
                try:
                    step(backend)
                except Failed as failure:
                    self._give_up(backend, failure)
                    if backend == "mpi":
                        raise

    def _start(self, backend: str) -> None:
        replies = self.ask(backend, "start", rendezvous=self.rendezvous(backend))
        self.starts[backend] = Start.of(replies)
        if backend == "mpi":
            self.library, self.device = replies[0]["library"], replies[0]["device"]
        else:
            self.ask("mpi", "stop", backend=backend)

    def turn(self, backend: str, case: Case) -> Turn | None:
        """Measures a case on one backend. None: this backend has failed, or has no such case."""
        has_it = case.message is not None if backend in BARE else backend == "mpi" or not case.ours
        if backend in self.failures or not has_it:
            return None
        try:
            return self._turn(backend, case)
        except Failed as failure:
            self._give_up(backend, failure, case)
            return None

    def _turn(self, backend: str, case: Case) -> Turn:
        if backend in BARE:
            return Turn(_samples(self.ask("mpi", BARE[backend], case=case.name)), {})
        rendezvous = self.rendezvous(backend) if case.restarts else ""
        if backend != "mpi":
            self.ask("mpi", "go_on", backend=backend)
        self.ask(backend, "forget_peak")
        samples = _samples(self.ask(backend, "run", case=case.name, rendezvous=rendezvous))
        peaks = self.ask(backend, "peak")
        if backend != "mpi":
            self.ask("mpi", "stop", backend=backend)
        return Turn(samples, {peak["rank"]: peak["grown"] for peak in peaks if peak["grown"] is not None})

    def end(self) -> None:
        """The last shutdown of those that still live."""
        for backend in [*(backend for backend in self.starts if backend != "mpi"), "mpi"]:
            if backend != "mpi" and backend in self.failures:
                continue
            try:
                if backend != "mpi":
                    self.ask("mpi", "go_on", backend=backend)
                replies = self.ask(backend, "end")
            except Failed as failure:
                self._give_up(backend, failure)
            else:
                self.starts[backend].end(replies)

    def _give_up(self, backend: str, failure: Failed, case: Case | None = None) -> None:
        self.failures.setdefault(backend, f"{case.title}: {failure}" if case else str(failure))
        if backend not in ("mpi", *BARE) and "mpi" not in self.failures:
            try:
                self.ask("mpi", "drop", backend=backend)
            except Failed as worse:
                self.failures["mpi"] = str(worse)

    def check_processes(self, audience: str) -> None:
        if audience != "mpi":
            self.ask("mpi", "check", backend=audience)
        super().check_processes("mpi")


def _samples(replies: list[dict[str, Any]]) -> list[float]:
    return [sample for reply in replies for sample in reply["samples"]]


@contextmanager
def started(size: int, backends: list[str], **tensors: str | None) -> Iterator[World]:
    """A world of ranks of our own on this host; ``tensors``: where they are, as options of the worker."""
    world = World(size, new_store(), "localhost")
    rank = worker(f"localhost:{world.store.port}", size=size, backends=",".join(backends), **tensors)
    with running(world, [[mpirun(), "-n", str(size), *rank]]):
        yield world
        with suppress(subprocess.TimeoutExpired):
            world.processes[0].wait(0 if "mpi" in world.failures else END_LIMIT)


@contextmanager
def given(size: int, host: str, writer: int) -> Iterator[World]:
    """The world of ranks that somebody else's mpirun started. They learn the store's port through ``writer``."""
    world = World(size, new_store(), host)
    with open(writer, "w") as pipe:
        pipe.write(str(world.store.port))
    yield world
