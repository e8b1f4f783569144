"""The fork server, with programs that need no torch."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fork_client import PASSED_ON, request
from fork_server import ForkedProcess, ForkServer, ServerEnded
from harness import eventually
from launcher import FORK

LIMIT = 60.0  # seconds
SERVER = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import fork_server
arguments = fork_server.serve(sys.argv[1])
if arguments is not None:
    exec(arguments[0])
"""
WAIT = "import sys, time; print('waits', flush=True); time.sleep(600)"

Fork = Callable[..., ForkedProcess]


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with contextlib.closing(ForkServer([sys.executable, "-c", SERVER], {"OF_THE_SERVER": "1"})) as started:
        yield started


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "output"


def waits(output: Path) -> None:
    eventually(lambda: output.exists() and "waits" in output.read_text(), "the program runs")


def has_ended(pid: int) -> bool:
    return not psutil.pid_exists(pid)


def test_processes_end_with_statuses_of_their_own(server: ForkServer, output: Path) -> None:
    processes = [server.fork([f"sys.exit({status})"], {}, output) for status in (3, 0, 5)]
    assert [process.wait(LIMIT) for process in processes] == [3, 0, 5]
    killed = server.fork(["import os; os.kill(os.getpid(), 9)"], {}, output)
    assert killed.wait(LIMIT) == -signal.SIGKILL
    assert killed.poll() == -signal.SIGKILL


def test_variables_and_output_are_those_of_the_request(server: ForkServer, output: Path) -> None:
    output.write_text("before\n")
    program = "import os; print(sorted(os.environ.items()), os.environ['OF_THE_REQUEST'], sys.stdin.read(), flush=True)"
    assert server.fork([program], {"OF_THE_REQUEST": "2"}, output).wait(LIMIT) == 0
    assert output.read_text() == "before\n[('OF_THE_REQUEST', '2'), ('OF_THE_SERVER', '1')] 2 \n"


def test_a_process_that_runs_has_no_status(server: ForkServer, output: Path) -> None:
    process = server.fork([WAIT], {}, output)
    waits(output)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(LIMIT) == -signal.SIGTERM


def test_processes_do_not_outlive_the_server(output: Path) -> None:
    server = ForkServer([sys.executable, "-c", SERVER], {})
    process = server.fork([WAIT], {}, output)
    waits(output)
    server.close()
    eventually(lambda: has_ended(process.pid), "the process is killed")
    with pytest.raises(ServerEnded):
        process.wait(LIMIT)


def test_processes_do_not_outlive_a_server_that_is_killed(server: ForkServer, output: Path) -> None:
    process = server.fork([WAIT], {}, output)
    waits(output)
    server._process.kill()
    with pytest.raises(ServerEnded, match="status -9"):
        process.wait(LIMIT)
    eventually(lambda: has_ended(process.pid), "the process is killed")


@pytest.mark.parametrize("server_says", [False, True], ids=["before it has asked", "before it has read the answer"])
def test_one_that_goes_away_harms_nobody(server: ForkServer, output: Path, server_says: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(server.address)
        if server_says:
            request(connection, [WAIT], {}, {})
            assert select.select([connection], [], [], LIMIT)[0]
    assert server.fork(["sys.exit(3)"], {}, output).wait(LIMIT) == 3


def test_a_server_that_cannot_start_says_why(output: Path) -> None:
    with contextlib.closing(ForkServer([sys.executable, "-c", "raise ValueError('on purpose')"], {})) as server:
        server.await_start()
        with pytest.raises(ServerEnded, match=r"status 1. Its output(.|\n)*ValueError: on purpose"):
            server.fork(["pass"], {}, output)
        assert not server.runs()


class TestClient:
    """Of the launcher."""

    @pytest.fixture
    def start(self, server: ForkServer, output: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
        clients = []

        def start_client(program: str, **more: object) -> subprocess.Popen:
            with output.open("ab") as file:
                command = [*FORK, server.address, program]
                clients.append(
                    subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, cwd=tmp_path, **more)
                )
            return clients[-1]

        yield start_client
        for client in clients:
            client.kill()
            client.wait()

    def test_its_process_has_what_is_its_own(
        self, start: Callable[..., subprocess.Popen], output: Path, tmp_path: Path
    ) -> None:
        """And the connection to the launcher, at its number."""
        launcher, connection = socket.socketpair()
        with launcher:
            with connection:
                number = connection.fileno()
                program = "import os; print(os.getcwd(), os.environ['OF_THE_RANK'], flush=True)\n"
                program += "os.write(int(os.environ['PMI_FD']), b'hello')"
                env = {"OF_THE_RANK": "7", "PMI_FD": str(number)}
                client = start(program, env=env, pass_fds=[number])
            assert client.wait(LIMIT) == 0, output.read_text()
            launcher.settimeout(LIMIT)
            assert launcher.recv(100) == b"hello"
            assert launcher.recv(100) == b""  # and nobody has it any more
        assert output.read_text() == f"{tmp_path} 7\n"

    @pytest.mark.parametrize("status", [0, 3, -signal.SIGKILL, -signal.SIGABRT])
    def test_it_ends_as_its_process_does(self, start: Callable[..., subprocess.Popen], status: int) -> None:
        end = f"sys.exit({status})" if status >= 0 else f"import os; os.kill(os.getpid(), {-status})"
        assert start(end).wait(LIMIT) == status

    @pytest.mark.parametrize("number", PASSED_ON)
    def test_signals_are_passed_on(
        self, start: Callable[..., subprocess.Popen], output: Path, number: signal.Signals
    ) -> None:
        client = start(f"import signal; signal.signal({int(number)}, lambda number, frame: sys.exit(9))\n{WAIT}")
        waits(output)
        client.send_signal(number)
        assert client.wait(LIMIT) == 9

    def test_it_says_that_the_server_has_ended(
        self, start: Callable[..., subprocess.Popen], server: ForkServer, output: Path
    ) -> None:
        client = start(WAIT)
        waits(output)
        server._process.kill()
        assert client.wait(LIMIT) == 1
        assert "the fork server has ended before it has told the status" in output.read_text()

    def test_its_process_is_killed_with_it(self, start: Callable[..., subprocess.Popen], output: Path) -> None:
        client = start("import os; print(os.getpid())\n" + WAIT)
        waits(output)
        client.kill()
        client.wait(LIMIT)
        eventually(lambda: has_ended(int(output.read_text().split()[0])), "the process is killed")
