"""The command."""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _mpi
from . import __doc__ as description
from .cases import CASES, Case, text_of
from .results import Report, Result
from .worker import serve
from .world import BACKENDS, Failed, World, given, started

try:
    import matplotlib  # noqa: F401 (imported by those who draw; here, so that it is not missed after the measurement)
    import psutil
    from rich.progress import Progress
except ImportError:
    raise SystemExit("the benchmark needs matplotlib, psutil and rich: pip install 'torch_rpc_mpi[bench]'") from None

# Set by rank 0 of somebody else's mpirun for the controller that it starts: the number of ranks, the host that they
# know this one by, and the file descriptor for the port of the controller's store.
_GIVEN = "TORCH_RPC_MPI_BENCH_GIVEN"


def main() -> None:
    arguments = _arguments()
    launcher = _mpi.find_launcher()
    if _GIVEN in os.environ or launcher is None or launcher.size == 1:
        control(arguments)
    else:
        take_part(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m torch_rpc_mpi.bench", description=description)
    add = parser.add_argument
    add(
        "--backends",
        type=_list_of(BACKENDS),
        default=["mpi", "tensorpipe", "raw"],
        metavar="LIST",
        help=f"of {', '.join(BACKENDS)} (default mpi,tensorpipe,raw)",
    )
    add("--cases", type=_list_of(CASES), metavar="LIST", help=f"of {', '.join(CASES)} (default: all)")
    add(
        "--ranks",
        type=_sizes,
        metavar="LIST",
        help="sizes of the worlds to start (default 2,4,8; with --quick 2,4). In the smallest all cases are measured "
        "that it has ranks enough for, in the others those that depend on the size. Not under mpirun",
    )
    add("--rounds", type=int, metavar="N", help="turns of each backend at each case (default 15; with --quick 5)")
    add("--quick", action="store_true", help="fewer cases and rounds: less than two minutes")
    add("--output", type=Path, metavar="DIRECTORY", help="for bench.json and the plots, as PNG and SVG")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 5 if arguments.quick else 15
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    if arguments.cases is None:
        arguments.cases = [name for name, case in CASES.items() if case.quick or not arguments.quick]
    return arguments


def _list_of(known: Any) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(known)}")
        return [name for name in known if name in names]

    return parse


def _sizes(text: str) -> list[int]:
    sizes = sorted({int(size) for size in text.split(",")})
    if sizes[0] < 2:
        raise argparse.ArgumentTypeError("a world has at least 2 ranks")
    return sizes


def take_part(arguments: argparse.Namespace) -> None:
    """What a rank does that somebody else's mpirun started. Rank 0 starts the controller."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size == 1:
        library = MPI.Get_library_version().splitlines()[0]
        raise SystemExit(
            f"{_mpi.find_launcher()} started this process, but {library} has one rank. At least 2 are needed, and the "
            "launcher of the MPI that mpi4py uses (under srun: `--mpi=pmi2` or `--mpi=pmix`)"
        )
    if arguments.ranks not in (None, [comm.size]):
        raise SystemExit(f"--ranks: mpirun started {comm.size}; without it, the program starts worlds of any size")
    hosts = comm.allgather(socket.gethostname())
    host = "localhost" if len(set(hosts)) == 1 else hosts[0]
    controller, port = None, ""
    if comm.rank == 0:
        reader, writer = os.pipe()
        environment = {**os.environ, _GIVEN: f"{comm.size} {host} {writer}"}
        controller = subprocess.Popen(
            [sys.executable, "-m", __package__, *sys.argv[1:]], env=environment, pass_fds=[writer]
        )
        os.close(writer)
        with open(reader) as pipe:
            port = pipe.read()
    port = comm.bcast(port)
    if not port:
        raise SystemExit("the controller, which rank 0 starts, has failed")
    serve(f"{host}:{port}", comm.rank, comm.size, arguments.backends)
    if controller is not None:
        raise SystemExit(controller.wait())


def control(arguments: argparse.Namespace) -> None:
    """Measures and reports."""
    worlds: list[Callable[[], AbstractContextManager[World]]]
    if found := os.environ.pop(_GIVEN, None):
        size, host, writer = found.split()
        worlds = [partial(given, int(size), host, int(writer))]
    else:
        sizes = arguments.ranks or ([2, 4] if arguments.quick else [2, 4, 8])
        worlds = [partial(started, size, arguments.backends) for size in sizes]
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.backends)
    about = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": _machine()}
    library = ""
    # Without a thread of its own, which would draw while something is measured.
    with Progress(transient=True, auto_refresh=False) as progress:
        for number, start in enumerate(worlds):
            with start() as world:
                report.starts[world.size], report.failures[world.size] = world.starts, world.failures
                try:
                    world.start(arguments.backends)
                except Failed:
                    continue
                library = world.library
                cases = _cases_for(world.size, arguments.cases, smallest=number == 0, notes=report.notes)
                report.results += measure(world, arguments.backends, cases, arguments.rounds, progress)
                world.end()

    # Here, because a rank under measurement has no use for them.
    from .report import show

    show(report)
    if not report.results and not any(report.failures.values()):
        raise SystemExit("nothing was measured: the worlds have too few ranks for these cases")
    if arguments.output:
        from .plots import save

        options = {"rounds": arguments.rounds, "backends": arguments.backends, "arguments": sys.argv[1:]}
        about |= {"versions": _versions(library), "options": options, "environment": _environment()}
        text = json.dumps({**about, **report.as_json()}, indent=1)
        arguments.output.joinpath("bench.json").write_text(text + "\n")
        save(report, arguments.output)
    if any("mpi" in failures for failures in report.failures.values()):
        raise SystemExit("MPI failed; see above")


def _cases_for(size: int, names: list[str], smallest: bool, notes: list[str]) -> list[Case]:
    cases = []
    for case in (CASES[name] for name in names):
        if size < case.least_ranks or not (smallest or case.everywhere):
            continue
        if case.memory > psutil.virtual_memory().available:
            notes.append(f"{case.name} left out: it needs {text_of(case.memory)} of free memory")
            continue
        cases.append(case)
    return cases


def measure(world: World, backends: list[str], cases: list[Case], rounds: int, progress: Progress) -> list[Result]:
    """Runs every case on every backend in turns, the first of which goes round as well."""
    # New sessions last: in torch, RRefs go on using the agent of the first one, unless that is ours.
    results = [Result(case, world.size) for case in sorted(cases, key=lambda case: case.restarts)]
    turns = {result.case.name: 1 + min(rounds, result.case.most_rounds or rounds) for result in results}
    task = progress.add_task(f"{world.size} ranks", total=sum(turns.values()) * len(backends))
    for restarts in (False, True):
        for turn in range(rounds + 1):
            for result in results:
                if result.case.restarts != restarts or turn >= turns[result.case.name]:
                    continue
                for backend in backends[turn % len(backends) :] + backends[: turn % len(backends)]:
                    measured = world.turn(backend, result.case)
                    if measured and turn > 0:  # the first is for warming up
                        result.add(backend, measured)
                    progress.advance(task)
                    progress.refresh()
    return results


def _machine() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": psutil.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _versions(library: str) -> dict[str, str]:
    from mpi4py import __version__ as mpi4py

    return {
        "torch_rpc_mpi": __version__,
        "torch": torch.__version__,
        "mpi4py": mpi4py,
        "mpi": library,
        "python": platform.python_version(),
    }


def _environment() -> dict[str, str]:
    """What may have changed the measurement."""
    starts = ("TORCH_RPC_MPI_", "OMP_", "UCX_", "FI_", "MPIR_CVAR_", "OMPI_MCA_", "I_MPI_")
    return {name: value for name, value in os.environ.items() if name.startswith(starts)}


if __name__ == "__main__":
    main()
