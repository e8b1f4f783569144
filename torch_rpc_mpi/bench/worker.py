"""The ranks under measurement: ``python -m torch_rpc_mpi.bench.worker``, started by mpirun or the controller.

Each rank of the MPI world is one process that has RPC over MPI and raw MPI, and has a child for each TensorPipe that is
compared. They all do what the controller tells them through a c10d store. A child is stopped but for its turns (an idle
TensorPipe polls without end); the ranks of MPI wait asleep while it has one.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed.rpc as rpc

from .. import MPIRpcBackendOptions, _mpi
from .._torch_api import PrefixStore, TCPStore
from .case import Case, timed
from .cases import CASES, call_all
from .device import Devices
from .raw import Raw

TENSORPIPES = ("tensorpipe", "tensorpipe-uv")
_CONNECT_LIMIT = timedelta(seconds=60)
_MEETING_LIMIT = timedelta(seconds=60)
_FOR_EVER = timedelta(days=30)  # an order may be long in coming
_PR_SET_PDEATHSIG = 1


class Worker:
    """One rank of one backend."""

    def __init__(self, backend: str, rank: int, size: int, devices: Devices | None) -> None:
        self.backend, self.rank, self.size = backend, rank, size
        self._devices = devices  # None: its tensors are in the memory of the host
        self.rendezvous = ""  # the next session's init_method, where the backend needs one
        self.turn: Any = None  # a store for the order that is carried out
        self._idle_memory: int | None = None
        self._peak_is_known = False

    def open(self, **options: Any) -> None:
        """A session of RPC."""
        if self._devices:
            options["device_maps"] = self._devices.maps(self.rank, self.size)
        if self.backend == "mpi":
            ours = MPIRpcBackendOptions(**options)
            rpc.init_rpc(f"worker{self.rank}", backend="MPI", rpc_backend_options=ours)  # type: ignore[no-untyped-call]
            return
        plain = self.backend == "tensorpipe-uv"
        theirs = rpc.TensorPipeRpcBackendOptions(
            init_method=self.rendezvous,
            _transports=["uv"] if plain else None,
            _channels=["basic"] if plain else None,
            **options,
        )
        rpc.init_rpc(f"worker{self.rank}", rank=self.rank, world_size=self.size, rpc_backend_options=theirs)  # type: ignore[no-untyped-call]

    def restart(self, **options: Any) -> None:
        rpc.shutdown()
        self.open(**options)

    def device(self, rank: int | None = None) -> str:
        return self._devices.of(self.rank if rank is None else rank) if self._devices else "cpu"

    def ones(self, *sizes: int) -> torch.Tensor:
        return torch.ones(sizes, device=self.device())

    def timed(self, call: Callable[[], Any], samples: int) -> list[float]:
        devices = self._devices
        if devices is None:
            return timed(call, samples)

        def call_and_wait() -> None:
            call()
            devices.synchronize(self.rank)

        return timed(call_and_wait, samples)

    def meet(self, count: int) -> None:
        if self.turn.add("met", 1) == count:
            self.turn.set("all", "")
        self.turn.wait(["all"], _MEETING_LIMIT)

    # What the controller asks for. Arguments and results go as JSON.

    def start(self, rendezvous: str) -> dict[str, Any]:
        """The first session, and the first call to everyone. Seconds."""
        torch.set_num_threads(1)
        self.rendezvous = rendezvous
        start = time.perf_counter()
        mpi_init = self._initialize_mpi()
        self.open()
        opened = time.perf_counter()
        call_all(self)
        called = time.perf_counter()
        self._idle_memory = _memory("VmRSS")
        return {"init": opened - start, "mpi_init": mpi_init, "calls": called - opened}

    def _initialize_mpi(self) -> float | None:
        """Seconds, if it was this that called MPI_Init."""
        return None

    def forget_peak(self) -> dict[str, Any]:
        """The peak of resident memory is that of now."""
        with suppress(OSError):  # then there is no peak of a turn
            Path("/proc/self/clear_refs").write_text("5")
            self._peak_is_known = True
        return {}

    def run(self, case: str, rendezvous: str) -> dict[str, Any]:
        """One turn: the samples, if this rank calls in it."""
        self.rendezvous = rendezvous
        return {"samples": _measure(CASES[case], self) if CASES[case].calls_from(self.rank) else []}

    def peak(self) -> dict[str, Any]:
        """By how many bytes the peak is beyond what there was after the start; None if the system does not say."""
        now = _memory("VmHWM")
        if not self._peak_is_known or now is None or self._idle_memory is None:
            return {"rank": self.rank, "grown": None}
        return {"rank": self.rank, "grown": max(now - self._idle_memory, 0)}

    def end(self) -> dict[str, Any]:
        """The last shutdown. Seconds."""
        start = time.perf_counter()
        rpc.shutdown()
        return {"shutdown": time.perf_counter() - start}


class MpiWorker(Worker):
    """A rank of the MPI world: raw MPI as well, and the children."""

    def __init__(
        self, rank: int, size: int, devices: Devices | None, children: dict[str, subprocess.Popen[bytes]]
    ) -> None:
        super().__init__("mpi", rank, size, devices)
        self._children = children
        self._raw: Raw | None = None

    def start(self, rendezvous: str) -> dict[str, Any]:
        started = super().start(rendezvous)
        assert rpc.get_worker_info().id == self.rank, f"{rpc.get_worker_info()} is rank {self.rank} to its launcher"
        name = self._devices.name(self.rank) if self._devices else ""
        return {**started, "library": _mpi.open_library().library(), "device": name}

    def _initialize_mpi(self) -> float | None:
        if _mpi.is_initialized():
            return None
        start = time.perf_counter()
        _mpi.load(MPIRpcBackendOptions().init_timeout)  # as init_rpc does, which then finds it done
        return time.perf_counter() - start

    def run_raw(self, case: str) -> dict[str, Any]:
        if self._raw is None:
            self._raw = Raw()
        return {"samples": self._raw.run(CASES[case])}

    def run_limit(self, case: str) -> dict[str, Any]:
        assert self._devices is not None
        return {"samples": self._devices.limit(CASES[case]) if self.rank == 0 else []}

    def go_on(self, backend: str) -> dict[str, Any]:
        """Lets a child run."""
        self._children[backend].send_signal(signal.SIGCONT)
        return {}

    def stop(self, backend: str) -> dict[str, Any]:
        self._children[backend].send_signal(signal.SIGSTOP)
        return {}

    def check(self, backend: str) -> dict[str, Any]:
        """Raises RuntimeError if a child has failed."""
        if status := self._children[backend].poll():
            raise RuntimeError(f"its process {how_it_ended(status)}")
        return {}

    def drop(self, backend: str) -> dict[str, Any]:
        """Ends a child that failed."""
        self._children[backend].kill()
        return {}


def _measure(case: Case, place: Worker) -> list[float]:
    if case.warm:
        case.run(place, max(case.samples // 10, 1))  # back from standing still
    callers = sum(case.calls_from(rank) for rank in range(place.size))
    if callers > 1:
        place.meet(callers)
    return case.run(place, case.samples)


def how_it_ended(status: int) -> str:
    """What became of a process, as Popen has its status."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"has ended with status {status}"


def _memory(what: str) -> int | None:
    """Bytes, as /proc/self/status has them; None where there is no such file."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) * 1024
    return None


def obey(store: Any, audience: str, worker: Worker) -> None:
    """Does one order after the other, the last of which is "end"."""
    for number in count():
        order = json.loads(store.get(f"{audience}/{number}"))
        worker.turn = PrefixStore(f"{audience}/{number}", store)
        do = order.pop("do")
        try:
            reply = getattr(worker, do)(**order)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"rank {worker.rank}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"}
        store.set(f"{audience}/{number}/{worker.rank}", json.dumps(reply))
        if do == "end":
            return


def serve(address: str, rank: int, size: int, backends: list[str], device: str | None, imports: str | None) -> None:
    """What a rank of the MPI world does.

    Args:
        address: ``host:port`` of the controller's store.
        rank, size: of the MPI world.
        backends: those to compare.
        device: the type of the devices that tensors are on, if not in the memory of the host.
        imports: a module that is imported first.
    """
    devices = _find(device, imports)
    store = connect(address, "mpi")
    children = {}
    for backend in TENSORPIPES:
        if backend in backends:
            options: dict[str, Any] = {"backend": backend, "rank": rank, "size": size, "parent": os.getpid()}
            options |= {"device": device, "import": imports}
            place = [f"--{name}={value}" for name, value in options.items() if value is not None]
            children[backend] = subprocess.Popen([sys.executable, "-m", f"{__package__}.worker", address, *place])
    try:
        obey(store, "mpi", MpiWorker(rank, size, devices, children))
    finally:
        for child in children.values():
            child.send_signal(signal.SIGCONT)
            child.kill()
            child.wait()


def _find(device: str | None, imports: str | None) -> Devices | None:
    if imports:
        importlib.import_module(imports)
    return Devices(device) if device else None


def connect(address: str, audience: str) -> Any:
    """The controller's store."""
    # torch's own, at every init_rpc of TensorPipe.
    warnings.filterwarnings("ignore", "You are using a Backend .* as a ProcessGroup")
    host, _, port = address.rpartition(":")
    store = TCPStore(host, int(port), is_master=False, timeout=_CONNECT_LIMIT)
    store.set_timeout(_FOR_EVER)
    store.add(f"connected/{audience}", 1)
    return PrefixStore("bench", store)


def _serve_as_child(
    address: str, backend: str, rank: int, size: int, parent: int, device: str | None, imports: str | None
) -> None:
    # A parent that is killed cannot end a child, least of all one that is stopped.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the controller serves the stores
    obey(connect(address, backend), backend, Worker(backend, rank, size, _find(device, imports)))


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
    parser.add_argument("--parent", type=int)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--device")
    parser.add_argument("--import", dest="imports")
    arguments = parser.parse_args()
    address, size, tensors = arguments.address, arguments.size, (arguments.device, arguments.imports)
    if arguments.backend:
        _serve_as_child(address, arguments.backend, arguments.rank, size, arguments.parent, *tensors)
    else:
        serve(address, _rank(), size, arguments.backends, *tensors)


if __name__ == "__main__":
    main()
