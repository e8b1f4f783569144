"""Programs for TensorPipe, not one line of which knows of MPI, run by ``python -m torch_rpc_mpi``."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import launcher
import pytest
from launcher import Command
from multirank_plugin import asked_backend

PROGRAMS = Path(__file__).parents[1] / "programs"
# From where they are: -m puts the current directory first, where the sources may be, which have no compiled extension.
PYTHON = ("sh", "-c", 'cd "$0" && exec "$@"', str(PROGRAMS), sys.executable)
OURS = ("-m", "torch_rpc_mpi")

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]
mpich = pytest.mark.skipif(launcher.is_open_mpi(), reason="Open MPI needs its launcher")


@pytest.fixture(autouse=True)
def _only_for_mpi(pytestconfig: pytest.Config) -> None:
    if asked_backend(pytestconfig) not in (None, "mpi"):
        pytest.skip("about this backend")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(*command: str, **environment: str) -> tuple[int | None, str]:
    return launcher.run_commands([Command(command, environment)], 150)


def mpirun(size: int, program: str, *arguments: str) -> tuple[int | None, str]:
    return run(*launcher.mpirun(), "-n", str(size), *PYTHON, *OURS, program, *arguments)


def test_under_mpirun() -> None:
    """With DDP, a DataLoader whose workers are spawned, and a handler at exit that calls functions of __main__."""
    status, output = mpirun(2, "training.py", "--epochs", "1")
    assert status == 0, output
    for rank in range(2):
        assert f"rank {rank} is done with StandInAgent" in output, output
    assert output.count("_transports of TensorPipeRpcBackendOptions are ignored") == 1, output


@mpich
@pytest.mark.parametrize("way", ["runner", "variable"])
def test_that_spawns_its_workers(way: str) -> None:
    if way == "runner":
        status, output = run(*PYTHON, *OURS, "spawning.py", free_port())
    else:
        status, output = run(*PYTHON, "spawning.py", free_port(), TORCH_RPC_MPI_DROP_IN="1")
    assert status == 0, output
    assert len(re.findall(r"trainer [12] is done with StandInAgent", output)) == 2, output


@mpich
def test_under_torchrun() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    status, output = run(*PYTHON, *torchrun, *OURS, "training.py", "--epochs", "1")
    assert status == 0, output
    assert len(re.findall(r"rank [01] is done with StandInAgent", output)) == 2, output


@pytest.mark.parametrize(
    ("when", "how", "status", "who"),
    [
        ("before", "raise", 1, r"rank 1 \(on host \S+\) ends with status 1, because of this ValueError"),
        ("before", "exit", 3, r"rank 1 \(on host \S+\) ends with status 3, because of its exit"),
        ("within", "raise", 1, r"worker 'worker1' \(rank 1 on host \S+\) ends the job .* because of this ValueError"),
        ("within", "exit", 3, r"worker 'worker1' \(rank 1 on host \S+\) ends the job with status 3"),
    ],
    ids=lambda value: str(value).split(" ")[0],
)
def test_that_fails_ends_the_job(when: str, how: str, status: int, who: str) -> None:
    ended, output = mpirun(2, "failing.py", when, how)
    assert ended == status, output
    assert re.search(who, output), output
    if how == "raise":
        frames = re.findall(r'^  File "(.*)", line', output, re.MULTILINE)
        assert frames == [str(PROGRAMS / "failing.py")] * 2, output
        assert "ValueError: on purpose" in output


@mpich
def test_whose_ranks_start_processes() -> None:
    """A program of its own makes a world of its own; a child made by fork() may not use RPC, is told so, and ends."""
    status, output = mpirun(2, "children.py")
    assert status == 0, output
    assert "rank 0 is done" in output, output
    assert "statuses [0, 0]" in output, output
    assert "child 0: 1.0" in output, output
    assert "child 1: 2.0" in output, output
    assert "endings [7, 1]" in output, output
    assert re.search(r"forked: RPC over MPI cannot be used in this process .* forked from pid \d+", output), output
