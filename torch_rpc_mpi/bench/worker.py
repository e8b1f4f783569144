"""The ranks under measurement: ``python -m torch_rpc_mpi.bench.worker``, started by mpirun.

Each rank of the MPI world is one process that has RPC over MPI and raw MPI, and has a child for each TensorPipe that is
compared. They all do what the controller tells them through a c10d store. One of a rank's processes runs at a time:
the rank stops its children (an idle TensorPipe polls without end), and a child whose turn it is stops the rank.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed.rpc as rpc
from torch._C._distributed_c10d import PrefixStore, TCPStore

from .. import _mpi
from .cases import CASES, Case, call_all
from .raw import Raw

TENSORPIPES = ("tensorpipe", "tensorpipe-uv")
STUCK_AFTER = 240.0  # seconds
_FOR_EVER = timedelta(days=30)  # an order may be long in coming
_PR_SET_PDEATHSIG = 1


class Worker:
    """One rank of one backend."""

    def __init__(self, backend: str, rank: int, size: int) -> None:
        self.backend, self.rank, self.size = backend, rank, size
        self.rendezvous = ""  # the next session's init_method, where the backend needs one
        self._idle_memory = 0

    def open(self) -> None:
        """A session of RPC."""
        if self.backend == "mpi":
            rpc.init_rpc(f"worker{self.rank}", backend="MPI")  # type: ignore[no-untyped-call]
            return
        plain = self.backend == "tensorpipe-uv"
        options = rpc.TensorPipeRpcBackendOptions(
            init_method=self.rendezvous,
            _transports=["uv"] if plain else None,
            _channels=["basic"] if plain else None,
        )
        rpc.init_rpc(f"worker{self.rank}", rank=self.rank, world_size=self.size, rpc_backend_options=options)  # type: ignore[no-untyped-call]

    def restart(self) -> None:
        rpc.shutdown()
        self.open()

    # What the controller asks for. Arguments and results go as JSON.

    def start(self, rendezvous: str) -> dict[str, Any]:
        """The first session, and the first call to everyone. Seconds."""
        torch.set_num_threads(1)
        self.rendezvous = rendezvous
        start = time.perf_counter()
        self.open()
        opened = time.perf_counter()
        call_all(self)
        called = time.perf_counter()
        self._idle_memory = _memory("VmRSS")
        return {"init": opened - start, "calls": called - opened}

    def run(self, case: str, rendezvous: str) -> dict[str, Any]:
        """One turn: samples if this rank calls in it, and the bytes that it has beyond those of the start."""
        self.rendezvous = rendezvous
        _forget_peak()
        samples = _measure(CASES[case], self) if CASES[case].calls_from(self.rank) else []
        return {"rank": self.rank, "samples": samples, "grown": max(_memory("VmHWM") - self._idle_memory, 0)}

    def end(self) -> dict[str, Any]:
        """The last shutdown. Seconds."""
        start = time.perf_counter()
        rpc.shutdown()
        return {"shutdown": time.perf_counter() - start}


class MpiWorker(Worker):
    """A rank of the MPI world: raw MPI as well, and the children."""

    def __init__(self, rank: int, size: int, children: dict[str, subprocess.Popen[bytes]]) -> None:
        super().__init__("mpi", rank, size)
        self._children = children
        self._raw: Raw | None = None

    def start(self, rendezvous: str) -> dict[str, Any]:
        started = super().start(rendezvous)
        assert rpc.get_worker_info().id == self.rank, f"{rpc.get_worker_info()} is rank {self.rank} to its launcher"
        return {**started, "library": _mpi.open_library().library()}

    def run_raw(self, case: str) -> dict[str, Any]:
        if self._raw is None:
            self._raw = Raw()
        return {"rank": self.rank, "samples": self._raw.run(CASES[case]), "grown": 0}

    def go_on(self, backend: str) -> dict[str, Any]:
        """Lets a child run. It stops this process as long as it measures."""
        self._children[backend].send_signal(signal.SIGCONT)
        return {}

    def stop(self, backend: str) -> dict[str, Any]:
        self._children[backend].send_signal(signal.SIGSTOP)
        return {}

    def drop(self, backend: str) -> dict[str, Any]:
        """Ends a child that failed."""
        self._children[backend].kill()
        return {}


class Child(Worker):
    """A rank of a TensorPipe world, beside the MPI rank that started it."""

    def run(self, case: str, rendezvous: str) -> dict[str, Any]:
        with _parent_stopped():
            return super().run(case, rendezvous)


@contextmanager
def _parent_stopped() -> Iterator[None]:
    parent = os.getppid()
    # If this turn never ends, the parent must be there to end this process.
    timer = threading.Timer(STUCK_AFTER, os.kill, (parent, signal.SIGCONT))
    timer.start()
    os.kill(parent, signal.SIGSTOP)
    try:
        yield
    finally:
        timer.cancel()
        with suppress(ProcessLookupError):
            os.kill(parent, signal.SIGCONT)


def _measure(case: Case, place: Worker) -> list[float]:
    if case.warm:
        case.run(place, max(case.samples // 10, 1))  # back from standing still
    return case.run(place, case.samples)


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _memory(what: str) -> int:
    """Bytes, as /proc/self/status has them; 0 where there is no such file."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    return 0


def obey(store: Any, audience: str, worker: Worker) -> None:
    """Does one order after the other, the last of which is "end"."""
    for number in count():
        order = json.loads(store.get(f"{audience}/{number}"))
        do = order.pop("do")
        try:
            reply = getattr(worker, do)(**order)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"rank {worker.rank}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        store.set(f"{audience}/{number}/{worker.rank}", json.dumps(reply))
        if do == "end":
            return


def serve(address: str, rank: int, size: int, backends: list[str]) -> None:
    """What a rank of the MPI world does.

    Args:
        address: ``host:port`` of the controller's store.
        rank, size: of the MPI world.
        backends: those to compare.
    """
    store = connect(address)
    children = {}
    for backend in TENSORPIPES:
        if backend in backends:
            place = [f"--{name}={value}" for name, value in (("backend", backend), ("rank", rank), ("size", size))]
            children[backend] = subprocess.Popen([sys.executable, "-m", f"{__package__}.worker", address, *place])
    try:
        obey(store, "mpi", MpiWorker(rank, size, children))
    finally:
        for child in children.values():
            child.send_signal(signal.SIGCONT)
            child.kill()
            child.wait()


def connect(address: str) -> Any:
    """The controller's store."""
    # torch's own, at every init_rpc of TensorPipe.
    warnings.filterwarnings("ignore", "You are using a Backend .* as a ProcessGroup")
    host, _, port = address.rpartition(":")
    store = TCPStore(host, int(port), is_master=False, timeout=_FOR_EVER)
    store.add("connected", 1)
    return PrefixStore("bench", store)


def _serve_as_child(address: str, backend: str, rank: int, size: int) -> None:
    # A parent that is killed cannot end a child, least of all one that is stopped.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the controller serves the stores
    obey(connect(address), backend, Child(backend, rank, size))


def _rank() -> int:
    """As the launcher says, so that MPI is initialised by the first init_rpc, as in most programs."""
    launcher = _mpi.find_launcher()
    if launcher is not None and launcher.rank is not None:
        return launcher.rank
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.rank)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--backends", type=lambda text: text.split(","))
    parser.add_argument("--backend", choices=TENSORPIPES)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--size", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.backend:
        _serve_as_child(arguments.address, arguments.backend, arguments.rank, arguments.size)
    else:
        serve(arguments.address, _rank(), arguments.size, arguments.backends)


if __name__ == "__main__":
    main()
