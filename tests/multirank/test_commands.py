"""The commands, as users start them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import launcher
import pytest
import system_calls

COMMAND = [sys.executable, "-m", "torch_rpc_mpi.tools"]
LIMIT = 200.0  # seconds
FORBIDDING = """
import os, sys
sys.path.insert(0, sys.argv[1])
import system_calls
system_calls.forbid("process_vm_readv")
os.execvp(sys.argv[2], sys.argv[2:])
"""

pytestmark = pytest.mark.timeout(300)
mpich = pytest.mark.skipif(launcher.is_open_mpi(), reason="about MPICH")


def run(command: Sequence[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # From a directory without the sources: what is installed is tested.
    return subprocess.run(
        command,
        cwd=directory,
        env=launcher.environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def facts_of(output: str) -> dict[str, list[str]]:
    """Of lines for grep: value, status and perhaps a remedy."""
    lines = [line.split("\t") for line in output.splitlines()]
    return {fields[0]: fields[1:] for fields in lines}


@pytest.mark.mpi
def test_doctor_of_ranks_that_work(tmp_path: Path) -> None:
    plot = ["--plot", "pairs.png"] if _has("matplotlib") else []
    done = run([*launcher.mpirun(), "-n", "3", *COMMAND, "doctor", "--json", *plot], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    facts = {fact["key"]: fact for fact in told["facts"]}
    assert told["works"]
    assert not [fact for fact in told["facts"] if fact["status"] == "problem"]
    assert facts["launcher"]["value"].endswith("as rank 0 of 3")
    assert facts["thread_level"]["value"] == "MPI_THREAD_MULTIPLE"
    assert facts["session"]["value"] == "one of all ranks began, ran and ended"
    assert len(told["hosts"]) == 3
    assert sorted((pair["first"], pair["second"]) for pair in told["pairs"]) == [(0, 1), (0, 2), (1, 2)]
    for pair in told["pairs"]:
        assert 0 < pair["latency"] < 1
        assert pair["bandwidth"] > 0
        assert pair["error"] == ""
    assert not plot or (tmp_path / "pairs.png").read_bytes().startswith(b"\x89PNG")


def _has(module: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


@pytest.mark.mpi
def test_doctor_names_a_rank_that_dies(tmp_path: Path) -> None:
    program = tmp_path / "dies.py"
    program.write_text(
        "import os, signal, sys\n"
        "from torch_rpc_mpi.tools import __main__, place, self_test\n"
        "if place.Place.find().rank == 2:\n"
        "    self_test._take = lambda *tensors: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(__main__.main())\n"
    )
    done = run([*launcher.mpirun(), "-n", "3", sys.executable, str(program), "doctor", "--parsable"], tmp_path)
    facts = facts_of(done.stdout)
    assert done.returncode != 0
    assert facts["session"][1] == "problem"
    if launcher.is_open_mpi():
        return  # its launcher ends the job before all pairs are known
    value, status, _ = facts["broken_pairs"]
    assert status == "problem"
    *broken, last = value.split("; ")
    assert [text.partition(": ")[0].count("rank 2 (") for text in broken] == [1, 1]
    assert all("its process has ended without leaving" in text for text in broken)
    assert last.startswith("rank 2 (")
    assert last.endswith("is in all of them")


WITH_DEVICES = """
import os, sys
from torch_rpc_mpi.tools import __main__, place
if place.Place.find().rank == 2:
    os.environ["RPCTEST_VISIBLE_DEVICES"] = "1"
sys.path.insert(0, sys.argv.pop(1))
import rpctest_device, torch_rpc_mpi
torch_rpc_mpi.register_device_runtime("rpctest", rpctest_device.LIBRARY, rpctest_device.PREFIX)
sys.exit(__main__.main())
"""


@pytest.mark.mpi
def test_doctor_tells_the_paths_between_devices(tmp_path: Path) -> None:
    program = tmp_path / "with_devices.py"
    program.write_text(WITH_DEVICES)
    devices = str(Path(__file__).parents[1] / "device")
    done = run([*launcher.mpirun(), "-n", "3", sys.executable, str(program), devices, "doctor", "--json"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    paths = {(path["sender"], path["receiver"]): path for path in told["device_paths"]}
    assert len(paths) == 6
    closed = paths.pop((0, 2))  # to the one that does not see the other's
    assert closed["name"] == "pinned"
    assert "is not visible to the receiver" in closed["why"]
    assert {path["name"] for path in paths.values()} == {"ipc"}
    (warning,) = [fact for fact in told["facts"] if fact["key"] == "device_paths" and fact["status"] == "warning"]
    assert warning["remedy"].startswith("Let each rank see all devices")


def in_a_cell(command: Sequence[str]) -> list[str]:
    """As in a container: hardly any shared memory, no process_vm_readv, one core, few files."""
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    forbidding = [sys.executable, "-c", FORBIDDING, str(Path(__file__).parent)]
    limits = ["prlimit", "--nofile=66:66", "taskset", "--cpu-list", "0"]
    return ["unshare", "--mount", "sh", "-c", mount, "sh", *limits, *forbidding, *command]


def cannot(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode != 0
    except OSError:
        return True


@mpich
@pytest.mark.mpi
@pytest.mark.skipif(not system_calls.NUMBERS, reason="the numbers of its system calls are not known")
@pytest.mark.skipif(cannot(in_a_cell(["true"])), reason="only root can make the cell")
def test_doctor_in_a_cell(tmp_path: Path) -> None:
    start = [*launcher.mpirun(), "-n", "2", *COMMAND, "doctor", "--parsable", "--timeout", "10"]
    done = run(in_a_cell(start), tmp_path)
    facts = facts_of(done.stdout)
    assert done.returncode != 0, done.stdout + done.stderr
    assert facts["container"][0].endswith("system calls are filtered (seccomp)")
    for key, status, value, remedy in (
        ("shared_memory", "problem", "1.0 MiB free", "--shm-size="),
        ("process_vm_readv", "warning", "refused by a filter of system calls", "SYS_PTRACE"),
        ("affinity", "warning", "1 core", "--bind-to none"),
        ("open_files", "problem", "66 (at most 66)", "ulimit -n"),
        ("session", "problem", "init_rpc failed", ""),  # as the first of these says
    ):
        assert facts[key][1] == status, facts[key]
        assert value in facts[key][0]
        assert remedy in "".join(facts[key][2:])


def test_doctor_without_mpi(tmp_path: Path) -> None:
    done = run([*COMMAND, "doctor", "--parsable"], tmp_path, MPI4PY_LIBMPI="/nonexistent/libmpi.so")
    facts = facts_of(done.stdout)
    assert done.returncode == 1, done.stderr
    value, status = facts["mpi_library"]
    assert status == "problem"
    assert "/nonexistent/libmpi.so" in value
    assert 'pip install "torch_rpc_mpi[mpich]"' in value
    assert facts["session"] == ["not tried, because of mpi_library", "note"]
    assert facts["shared_memory"][1] == "ok"  # the rest is still looked at


@pytest.mark.mpi
def test_hello_under_mpirun(tmp_path: Path) -> None:
    done = run([*launcher.mpirun(), "-n", "3", *COMMAND, "hello"], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" of 3 on ")[0] for line in lines] == [
        f"hello, I am worker{rank}, rank {rank}" for rank in range(3)
    ]


@mpich
def test_ring_under_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, "-m", "torch_rpc_mpi.tools", "ring"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a tensor went around 2 ranks 100 times, ")


def test_pingpong_alone(tmp_path: Path) -> None:
    """By the script that the installation makes."""
    done = run([str(Path(sys.prefix, "bin", "torch-rpc-mpi")), "pingpong"], tmp_path)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.endswith("with worker0")
    assert [line.split()[:2] for line in lines][::10] == [["0", "bytes"], ["16.0", "MiB"]]
