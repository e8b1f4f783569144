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
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _extension, _launchers
from . import __doc__ as description
from .case import Case, text_of
from .cases import CASES
from .ranks import Failed
from .results import Report, Result, Starts
from .starts import MOST_ROUNDS, START, first_session
from .worker import serve
from .world import BACKENDS, BARE, DEVICE_BACKENDS, World, given, started

try:
    import matplotlib  # noqa: F401 (imported by those who draw; here, so that it is not missed after the measurement)
    import psutil
    from rich.progress import Progress
except ImportError:
    raise SystemExit("the benchmark needs matplotlib, psutil and rich: pip install 'torch_rpc_mpi[bench]'") from None

# Set by rank 0 of somebody else's mpirun for the controller that it starts: the number of ranks, the host that they
# know this one by, and the file descriptor for the port of the controller's store.
_GIVEN = "TORCH_RPC_MPI_BENCH_GIVEN"

QUICK_BACKENDS = ("mpi", "tensorpipe", "raw")


def main() -> None:
    arguments = _arguments()
    launcher = _launchers.find_launcher()
    if _GIVEN in os.environ or launcher is None or launcher.size == 1:
        control(arguments)
    else:
        take_part(arguments, launcher.name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m torch_rpc_mpi.bench", description=description)
    add = parser.add_argument
    add(
        "--backends",
        type=_list_of([*BACKENDS, "limit"]),
        metavar="LIST",
        help=f"of {', '.join(BACKENDS)} (default: all; with --quick {','.join(QUICK_BACKENDS)}); with --device of "
        f"{', '.join(DEVICE_BACKENDS)}",
    )
    names = [START, *CASES]
    add("--cases", type=_list_of(names), metavar="LIST", help=f"of {', '.join(names)} (default: all)")
    add(
        "--ranks",
        type=_sizes,
        metavar="LIST",
        help="sizes of the worlds to start (default 2,4,8; with --quick 2,4). In the smallest all cases are measured "
        "that it has ranks enough for, in the others those that depend on the size. Not under mpirun",
    )
    add(
        "--rounds",
        type=int,
        metavar="N",
        help=f"turns of each backend at each case (default 15; with --quick 5; of {START} at most {MOST_ROUNDS})",
    )
    add(
        "--device",
        metavar="TYPE",
        help="tensors are on devices of this type, such as cuda: one for each rank, if there are so many",
    )
    add(
        "--import",
        dest="imports",
        metavar="MODULE",
        help="what ranks import first, such as a module with a device type",
    )
    add("--quick", action="store_true", help="fewer cases and rounds: less than two minutes")
    add("--output", type=Path, metavar="DIRECTORY", help="for bench.json and the plots, as PNG and SVG")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 5 if arguments.quick else 15
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    possible = DEVICE_BACKENDS if arguments.device else BACKENDS
    if arguments.backends is None:
        arguments.backends = list(QUICK_BACKENDS if arguments.quick and not arguments.device else possible)
    possible_cases = _possible_cases(arguments.device)
    for option, asked, known in (
        ("--backends", arguments.backends, possible),
        ("--cases", arguments.cases or [], possible_cases),
    ):
        if others := [name for name in asked if name not in known]:
            how = f"is not for --device {arguments.device}" if arguments.device else "needs --device"
            parser.error(f"{option}: {', '.join(others)} {how}")
    if arguments.cases is None:
        quick = [name for name in possible_cases if name == START or CASES[name].quick]
        arguments.cases = quick if arguments.quick else possible_cases
    return arguments


def _possible_cases(device: str | None) -> list[str]:
    if device:
        return [name for name, case in CASES.items() if case.devices and case.devices_of in (None, device)]
    return [START, *(name for name, case in CASES.items() if case.host)]


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


def _sizes_of(arguments: argparse.Namespace) -> list[int]:
    if arguments.device:
        return [2]  # none of the cases depends on the size
    return [2, 4] if arguments.quick else [2, 4, 8]


def take_part(arguments: argparse.Namespace, launcher: str) -> None:
    """What a rank does that somebody else's mpirun started. Rank 0 starts the controller."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    if comm.size == 1:
        library = MPI.Get_library_version().splitlines()[0]
        raise SystemExit(
            f"{launcher} started this process, but {library} has one rank. At least 2 are needed, and the "
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
    serve(f"{host}:{port}", comm.rank, comm.size, arguments.backends, arguments.device, arguments.imports)
    if controller is not None:
        raise SystemExit(controller.wait())


def control(arguments: argparse.Namespace) -> None:
    """Measures and reports."""
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.backends)
    about = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": _machine()}
    # Without a thread of its own, which would draw while something is measured. The estimate is made of all turns so
    # far: they differ too much for the last few to tell.
    with Progress(transient=True, auto_refresh=False, speed_estimate_period=86400) as progress:
        if found := os.environ.pop(_GIVEN, None):
            given_size, host, writer = found.split()
            measure_given(arguments, report, progress, int(given_size), host, int(writer))
        else:
            for size in arguments.ranks or _sizes_of(arguments):
                measure_own(arguments, report, progress, size)

    # Here, because a rank under measurement has no use for them.
    from .report import show

    show(report)
    if not (report.results or report.starts or any(report.failures.values())):
        raise SystemExit("nothing was measured: the worlds have too few ranks for these cases")
    if arguments.output:
        from .plots import save

        options = {"rounds": arguments.rounds, "backends": arguments.backends, "arguments": sys.argv[1:]}
        about |= {"versions": _versions(report.library), "options": options, "environment": _environment()}
        text = json.dumps({**about, **report.as_json()}, indent=1)
        arguments.output.joinpath("bench.json").write_text(text + "\n")
        save(report, arguments.output)
    if any("mpi" in failures for failures in report.failures.values()):
        raise SystemExit("MPI failed; see above")


def measure_own(arguments: argparse.Namespace, report: Report, progress: Progress, size: int) -> None:
    """Measures in worlds of this size that are started on this host."""
    failures = report.failures[size] = {}
    if START in arguments.cases:
        measure_starts(arguments, report, progress, size)
    cases = _cases_for(size, arguments.cases, smallest=min(report.failures) == size)
    if cases and "mpi" not in failures:
        backends = [backend for backend in arguments.backends if backend not in failures]
        with started(size, backends, **{"device": arguments.device, "import": arguments.imports}) as world:
            world.failures = failures
            measure_in(world, backends, cases, arguments.rounds, report, progress)


def measure_given(
    arguments: argparse.Namespace, report: Report, progress: Progress, size: int, host: str, writer: int
) -> None:
    """Measures in the world that somebody else's mpirun started. Its first session is the only one there is."""
    with given(size, host, writer) as world:
        report.failures[size] = world.failures
        cases = _cases_for(size, arguments.cases, smallest=True)
        measure_in(world, arguments.backends, cases, arguments.rounds, report, progress)
        report.starts[size] = Starts({backend: [start] for backend, start in world.starts.items()})


def measure_starts(arguments: argparse.Namespace, report: Report, progress: Progress, size: int) -> None:
    """First sessions of fresh processes, in turns."""
    rounds, failures = min(arguments.rounds, MOST_ROUNDS), report.failures[size]
    backends = [backend for backend in arguments.backends if backend not in BARE]
    starts = report.starts[size] = Starts()
    task = progress.add_task(f"{size} ranks, first session", total=rounds * len(backends))
    for turn in range(rounds):
        for backend in backends[turn % len(backends) :] + backends[: turn % len(backends)]:
            if backend not in failures:
                try:
                    start, library = first_session(backend, size)
                except Failed as failure:
                    failures[backend] = f"first session: {failure}"
                else:
                    starts.rounds.setdefault(backend, []).append(start)
                    report.library = library or report.library
            progress.update(task, advance=1, refresh=True)


def measure_in(
    world: World, backends: list[str], cases: list[Case], rounds: int, report: Report, progress: Progress
) -> None:
    """The cases that need no fresh processes."""
    try:
        world.start(backends)
    except Failed:
        return
    report.library, report.device = world.library, world.device
    report.results += measure(world, backends, _that_fit(cases, report.notes), rounds, progress)
    world.end()


def _cases_for(size: int, names: list[str], smallest: bool) -> list[Case]:
    cases = [CASES[name] for name in names if name != START]
    return [case for case in cases if size >= case.least_ranks and (smallest or case.everywhere)]


def _that_fit(cases: list[Case], notes: list[str]) -> list[Case]:
    """Those for which there is memory; a note about each of the others."""
    free = psutil.virtual_memory().available
    notes += [
        f"{case.name} left out: it needs {text_of(case.memory)} of free memory" for case in cases if case.memory > free
    ]
    return [case for case in cases if case.memory <= free]


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
        "usable_cpus": _extension.load().usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "usable_memory_bytes": _extension.load().usable_memory(),
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
