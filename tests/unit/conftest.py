"""Fixtures of the unit tests: no MPI, no launcher, no compiled extension."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import unit_fakes
from unit_fakes import RunPython

import torch_rpc_mpi
from torch_rpc_mpi import _launchers, _mpi

HERE = Path(__file__).parent
MULTIRANK = HERE.parent / "multirank"  # has what starts processes
sys.path.insert(0, str(MULTIRANK))

from fork_server import ForkServer  # noqa: E402

PACKAGE_ROOT = Path(torch_rpc_mpi.__file__).parent.parent

# Well below pytest's own limits, so that a child that hangs shows where.
CHILD_TIMEOUT = 120
GUARD = f"import faulthandler; faulthandler.dump_traceback_later({CHILD_TIMEOUT - 20}, exit=True)\n"


def as_installed(site: Path) -> Path:
    """Makes the folder one with the package's entry point, as that of an environment in which it is installed."""
    metadata = site / "as_installed-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: as_installed\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_rpc_mpi = torch_rpc_mpi._register:autoload\n")
    return site


def inherited_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TORCH_RPC_MPI_")}


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Runs a program in a fresh interpreter and returns what it printed; fails the test if the program fails.

    With ``installed=True`` the interpreter sees the package's torch.backends entry point as after ``pip install``.
    """

    def run(program: str, *, installed: bool = False, path: tuple[Path, ...] = (), **environment: str) -> str:
        search = [*path, PACKAGE_ROOT, HERE]
        if installed:
            search.append(as_installed(tmp_path / "site"))
        child = subprocess.run(
            [sys.executable, "-c", GUARD + program],
            env={**inherited_environment(), "PYTHONPATH": os.pathsep.join(map(str, search)), **environment},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHILD_TIMEOUT,
        )
        assert child.returncode == 0, f"exit code {child.returncode}\n{child.stdout}\n{child.stderr}"
        return child.stdout

    return run


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Forks programs from a process that has imported torch where the package is installed."""
    search = [as_installed(tmp_path_factory.mktemp("site")), PACKAGE_ROOT, HERE, MULTIRANK]
    env = {**inherited_environment(), "PYTHONPATH": os.pathsep.join(map(str, search)), "OMP_NUM_THREADS": "1"}
    with contextlib.closing(ForkServer([sys.executable, str(HERE / "forked_program.py")], env)) as server:
        yield server


@pytest.fixture
def run_forked(torch_server: ForkServer, tmp_path: Path) -> RunPython:
    """As `run_python`, for many programs to which it does not matter how torch was imported."""

    def run(program: str, *, path: tuple[Path, ...] = (), **environment: str) -> str:
        output, errors = tmp_path / "output", tmp_path / "errors"
        arguments = [GUARD + program, str(tmp_path), *map(str, path)]
        child = torch_server.fork(arguments, environment, output, errors)
        try:
            status = child.wait(CHILD_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            raise
        assert status == 0, f"exit code {status}\n{output.read_text()}\n{errors.read_text()}"
        return output.read_text()

    return run


@pytest.fixture
def run_forked_with_fakes(run_forked: RunPython, tmp_path: Path) -> RunPython:
    """Runs a preamble and a program (two arguments), as `run_forked`, where mpi4py is a fake.

    The preamble installs the fake extension (``unit_fakes.install_extension``).
    """
    unit_fakes.write_mpi4py(tmp_path / "fakes")

    def run(preamble: str, program: str, **environment: str) -> str:
        return run_forked(preamble + program, path=(tmp_path / "fakes",), **environment)

    return run


@pytest.fixture(autouse=True)
def _no_engine_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TORCH_RPC_MPI_"):
            monkeypatch.delenv(name)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests themselves may run under srun or mpirun."""
    for row in (*_launchers._LAUNCHERS, _launchers._TORCHRUN):
        for variable in (row.rank, *row.job):
            monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def fresh_mpi(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MPI as not loaded yet, now and after the test."""
    monkeypatch.setattr(_mpi, "_loaded", None)
    monkeypatch.setattr(_mpi, "_library", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]:
        del sys.modules[name]
