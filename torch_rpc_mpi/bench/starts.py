"""First sessions of fresh processes, those of one backend alone at a time."""

from __future__ import annotations

import os
import subprocess
import time

from .ranks import START_LIMIT, TURN_LIMIT, Failed, Ranks, mpirun, new_store, running, worker
from .world import Start

START = "start"  # as ``--cases`` knows it
MOST_ROUNDS = 3


def first_session(backend: str, size: int) -> tuple[Start, str]:
    """The times of one session, and the MPI library's name. Raises Failed."""
    ranks = Ranks(size, new_store(), "localhost")
    with running(ranks, _commands(backend, size, f"localhost:{ranks.store.port}")):
        ranks.await_processes(backend, time.monotonic() + START_LIMIT)
        replies = ranks.ask(backend, "start", rendezvous=ranks.rendezvous(backend))
        start = Start.of(replies)
        start.end(ranks.ask(backend, "end"))
        deadline = time.monotonic() + TURN_LIMIT
        for process in ranks.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                raise Failed(f"some processes had not ended {TURN_LIMIT:.0f} s after shutdown") from None
        ranks.check_processes(backend)
    return start, replies[0].get("library", "")


def _commands(backend: str, size: int, address: str) -> list[list[str]]:
    if backend == "mpi":
        return [[mpirun(), "-n", str(size), *worker(address, size=size, backends=backend)]]
    return [worker(address, backend=backend, rank=rank, size=size, parent=os.getpid()) for rank in range(size)]
