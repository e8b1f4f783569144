"""Worlds of processes that no MPI launcher has started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import launcher
import pytest
import system_calls
from launcher import Command

PROGRAM = str(Path(__file__).with_name("world_program.py"))

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(300)]
mpich = pytest.mark.skipif(launcher.is_open_mpi(), reason="Open MPI needs its launcher")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Starts processes; all must end with status 0, and as many say "ok" as there are ranks."""

    def start(commands: Sequence[Command], size: int, killed: bool = False, **environment: str) -> None:
        environment = {"RPC_TEST_SCRATCH": str(tmp_path), **environment}
        status, output = launcher.run_commands([command._replace(env=environment) for command in commands], 240)
        assert status == (-signal.SIGKILL if killed else 0), output
        assert sorted(line for line in output.splitlines() if line.endswith(": ok")) == sorted(
            f"rank {rank}: ok" for rank in range(size)
        ), output

    return start


def python(*arguments: str) -> Command:
    return Command([sys.executable, *arguments], {})


def by_hand(scenario: str, size: int, *arguments: str) -> list[Command]:
    """As in so many terminals; but the processes have torch loaded already."""
    places = [("--rank", str(rank), "--size", str(size)) for rank in range(size)]
    return [Command(["main", "world_program", *place, *arguments, scenario], {}, forked=True) for place in places]


def by_file(directory: Path) -> tuple[str, str]:
    return ("--init-method", f"file://{directory}/store")


@mpich
@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_processes_with_a_file(run: Callable[..., None], tmp_path: Path, size: int) -> None:
    run(by_hand("once", size, *by_file(tmp_path)), size)


@mpich
def test_processes_with_an_address(run: Callable[..., None]) -> None:
    """And nothing else in common."""
    address = ("--init-method", f"tcp://127.0.0.1:{free_port()}")
    run([python(PROGRAM, "--rank", str(rank), "--size", "2", *address, "once") for rank in range(2)], 2)


@mpich
def test_processes_with_torchs_variables(run: Callable[..., None]) -> None:
    run(by_hand("again", 3), 3, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


@mpich
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocessing(run: Callable[..., None], tmp_path: Path, method: str) -> None:
    run([python(PROGRAM, "--spawn", method, "--size", "4", *by_file(tmp_path), "once")], 4)


def torchrun(scenario: str, size: int, *options: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), *options, PROGRAM, scenario]


@mpich
def test_torchrun(run: Callable[..., None]) -> None:
    run([python(*torchrun("once", 3))], 3)


@mpich
def test_torchrun_with_several_sessions(run: Callable[..., None]) -> None:
    run([python(*torchrun("twice", 3))], 3)


@mpich
def test_tasks_of_slurm_without_pmi() -> None:
    """With nothing in common but what Slurm says. Two sessions."""
    step = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_NODELIST": "localhost,other[1-2]",
    }
    commands = [
        Command(["main", "world_program", "twice"], {**step, "SLURM_PROCID": str(rank), "RANK": str(rank)}, forked=True)
        for rank in range(3)
    ]
    status, output = launcher.run_commands(commands, 240)
    assert status == 0, output
    assert all(f"rank {rank}: ok" in output for rank in range(3)), output


@mpich
def test_torchrun_starts_its_workers_again(run: Callable[..., None]) -> None:
    run([python(*torchrun("fails_first", 2, "--max-restarts", "1"))], 2)


@mpich
def test_torchrun_starts_workers_again_that_waited_in_init_rpc(run: Callable[..., None]) -> None:
    """Unlike a standalone one, it keeps the store."""
    address = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()))
    again = ("--nproc-per-node", "2", "--max-restarts", "1", PROGRAM, "fails_before_init")
    run([python("-m", "torch.distributed.run", *address, *again)], 2)


@mpich
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("starter", ["torchrun", "multiprocessing"])
def test_within_a_task_of_a_launcher(tmp_path: Path, starter: str, size: int) -> None:
    """The task's own variables would make MPI take the processes for the task."""
    children = [PROGRAM, "--spawn", "spawn", "--size", str(size), *by_file(tmp_path), "once"]
    inner = torchrun("once", size) if starter == "torchrun" else children
    status, output = launcher.run_commands([Command([*launcher.mpirun(), "-n", "1", sys.executable, *inner], {})], 240)
    assert status == 0, output
    assert all(f"rank {rank}: ok" in output for rank in range(size)), output


@mpich
@pytest.mark.parametrize("nodes", ["{rank}", "odd"])
def test_several_nodes(run: Callable[..., None], tmp_path: Path, nodes: str) -> None:
    """Nodes share no memory. Ranks of a node need not follow each other."""
    commands = [
        command._replace(arguments=[*command.arguments, "--node", f"node{rank % 2 if nodes == 'odd' else rank}"])
        for rank, command in enumerate(by_hand("again", 4, *by_file(tmp_path)))
    ]
    run(commands, 4)


@mpich
@pytest.mark.parametrize(
    ("scenario", "size"),
    [("again", 3), ("late", 2), ("strangers", 3), ("mpi_first", 2), ("mpi4py_beside", 3), ("leaves", 3)],
)
def test_scenario(run: Callable[..., None], tmp_path: Path, scenario: str, size: int) -> None:
    run(by_hand(scenario, size, *by_file(tmp_path)), size)


@mpich
@pytest.mark.parametrize("method", ["file", "tcp", "env"])
def test_interrupted(run: Callable[..., None], tmp_path: Path, method: str) -> None:
    port = str(free_port())
    methods = {"file": by_file(tmp_path), "tcp": ("--init-method", f"tcp://127.0.0.1:{port}"), "env": ()}
    run(by_hand("interrupted", 2, *methods[method]), 2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


@mpich
@pytest.mark.parametrize("scenario", ["dies", "dies_in_transfer"])
def test_a_process_that_is_killed(run: Callable[..., None], tmp_path: Path, scenario: str) -> None:
    run(by_hand(scenario, 3, *by_file(tmp_path)), 3, killed=True)


def mpich_files() -> set[Path]:
    return set(Path("/dev/shm").glob("mpich_*"))


def killed_in(function: str, lost: int, size: int, *arguments: str) -> list[Command]:
    commands = by_hand("dies_in_init", size, *arguments)
    told = commands[lost].arguments
    commands[lost] = commands[lost]._replace(arguments=[*told[:-1], "--killed-in", function, told[-1]])
    return commands


@mpich
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("function", ["_world.Membership", "_meeting.await_all", "backend._describe", "_session.Agent"])
def test_a_process_that_is_killed_in_init_rpc(
    run: Callable[..., None], tmp_path: Path, function: str, lost: int
) -> None:
    """After MPI_Init, and before, in and after the first thing that all do together."""
    run(killed_in(function, lost, 3, *by_file(tmp_path)), 3, killed=True)


@mpich
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_before_mpi_init(tmp_path: Path, lost: int) -> None:
    """MPI_Init of the others has no way out: they end, with the name, and leave no files."""
    commands = killed_in("_world._initialize", lost, 3, *by_file(tmp_path))
    before = mpich_files()
    begin = time.monotonic()
    _, output = launcher.run_commands(
        [command._replace(env={"RPC_TEST_SCRATCH": str(tmp_path)}) for command in commands], 120
    )
    assert time.monotonic() - begin < 40  # of 60
    lines = [line for line in output.splitlines() if "there is no way out of MPI_Init" in line]
    assert len(lines) == 2, output
    assert all(f"rank {lost}, worker{lost} (pid " in line for line in lines), output
    end = time.monotonic() + 20
    while not mpich_files() <= before:  # those of other worlds that form beside this one are soon gone
        assert time.monotonic() < end, mpich_files() - before
        time.sleep(0.05)


@mpich
@pytest.mark.parametrize("scenario", ["dies_on_another_host", "is_silent_on_another_host"])
def test_a_process_of_another_host(run: Callable[..., None], tmp_path: Path, scenario: str) -> None:
    run(by_hand(scenario, 3, *by_file(tmp_path), "--node", "node{rank}"), 3, killed=scenario == "dies_on_another_host")


@mpich
def test_a_process_beside_one_that_is_stopped(run: Callable[..., None], tmp_path: Path) -> None:
    commands = [
        command._replace(arguments=[*command.arguments, "--node", "one" if rank == 0 else "other"])
        for rank, command in enumerate(by_hand("is_silent_beside_another", 3, *by_file(tmp_path)))
    ]
    run(commands, 3)


@mpich
@pytest.mark.parametrize(
    ("scenario", "size"), [("some_stop_for_a_while", 4), ("some_stop_for_a_while", 8), ("some_are_killed", 4)]
)
def test_processes_that_take_nothing(run: Callable[..., None], tmp_path: Path, scenario: str, size: int) -> None:
    run(by_hand(scenario, size, *by_file(tmp_path)), size, killed=scenario == "some_are_killed")


@mpich
def test_handlers_at_exit_shut_down(run: Callable[..., None], tmp_path: Path) -> None:
    run(by_hand("shuts_down_at_exit", 2, *by_file(tmp_path)), 2)


@mpich
def test_handlers_at_exit_of_spawned_children_shut_down(run: Callable[..., None], tmp_path: Path) -> None:
    run([python(PROGRAM, "--spawn", "spawn", "--size", "2", *by_file(tmp_path), "shuts_down_at_exit")], 2)


@mpich
def test_opens_no_port_on_one_host(run: Callable[..., None], tmp_path: Path) -> None:
    run(by_hand("opens_no_port", 2, *by_file(tmp_path)), 2)


@mpich
@pytest.mark.skipif(not system_calls.NUMBERS, reason="the numbers of its system calls are not known")
@pytest.mark.parametrize("call", ["pidfd_open", "process_vm_readv"])
def test_where_a_system_call_is_forbidden(run: Callable[..., None], tmp_path: Path, call: str) -> None:
    run(by_hand("dies", 3, "--forbid", call, *by_file(tmp_path)), 3, killed=True)


def without_privilege(*command: str) -> bool:
    return subprocess.run([*command, "true"], capture_output=True).returncode != 0


@mpich
@pytest.mark.skipif(without_privilege("unshare", "--mount"), reason="only root has a /dev/shm of its own")
def test_where_shared_memory_is_small(run: Callable[..., None], tmp_path: Path) -> None:
    program = [sys.executable, PROGRAM, "--spawn", "fork", "--size", "4", *by_file(tmp_path)]
    small = 'mount -t tmpfs -o size=10m tmpfs /dev/shm && exec "$@"'
    run([Command(["unshare", "--mount", "sh", "-c", small, "sh", *program, "has_too_little_shared_memory"], {})], 4)


@mpich
@pytest.mark.skipif(without_privilege("unshare", "--uts"), reason="only root may name a host")
@pytest.mark.parametrize("length", [63, 64])
def test_where_the_host_has_a_long_name(run: Callable[..., None], tmp_path: Path, length: int) -> None:
    scenario = "once" if length < 64 else "has_too_long_a_host_name"
    program = [sys.executable, PROGRAM, "--spawn", "fork", "--size", "2", *by_file(tmp_path), scenario]
    named = 'hostname "$1" && shift && exec "$@"'
    run([Command(["unshare", "--uts", "sh", "-c", named, "sh", "h" * length, *program], {})], 2)


@mpich
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_that_leaves(run: Callable[..., None], tmp_path: Path, method: str) -> None:
    run([python(PROGRAM, "--spawn", method, "--size", "3", *by_file(tmp_path), "leaves")], 3)


@pytest.mark.skipif(launcher.is_open_mpi(), reason="Open MPI leaves a file of every process that has no launcher")
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_child_alone_leaves_no_files(run: Callable[..., None], tmp_path: Path, method: str) -> None:
    run([python(PROGRAM, "--spawn", method, "--size", "1", *by_file(tmp_path), "alone")], 1)
    files = [file for file in Path(tmp_path, "files").read_text().split() if Path(file).exists()]
    assert files == []


@pytest.mark.skipif(not launcher.is_open_mpi(), reason="MPICH's launcher ends the job")
def test_a_process_that_is_killed_under_open_mpi_with_fault_tolerance(run: Callable[..., None]) -> None:
    """One failure of one peer."""
    one = [sys.executable, PROGRAM, "--rank", '"$OMPI_COMM_WORLD_RANK"', "--size", "3", "dies"]
    start = [*launcher.mpirun(), "--with-ft", "mpi", "-n", "3"]
    run([Command([*start, "sh", "-c", "exec " + " ".join(one)], {})], 3)


@pytest.mark.skipif(not launcher.is_open_mpi(), reason="MPICH needs no launcher")
def test_open_mpi_says_that_it_needs_its_launcher(run: Callable[..., None], tmp_path: Path) -> None:
    run(by_hand("no_open_mpi", 2, *by_file(tmp_path)), 2)
