"""A process that has torch loaded and forks others from itself: importing torch takes seconds, a fork milliseconds.

`python ranks.py serve` becomes such a process; the launcher starts it and asks it for ranks. Each goes on in ranks.py
as if it had been started with the arguments of the request: that is its `__main__`, and its end is an ordinary end of
the interpreter. What processes that are started one by one do not have in common is the same in all of one server: the
seed of hashes, and where libraries and functions lie in memory.

For ranks that MPI's launcher starts, that is fork_client.py, which asks for one in its place.

Each process has a connection to the server, of packets. A request is {"arguments", "env", "directory", "descriptors"},
and with it come the descriptors that get those numbers; the answers are {"pid"} and, when the process has ended,
{"status"}. A process whose connection is closed before that is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fork_client import LARGEST, answer, request

START_LIMIT = 120.0  # importing torch on a busy machine
LIMIT = 20.0  # for what takes no time
WAITING = 64  # connections that are not yet accepted
MOST_DESCRIPTORS = 8
_PR_SET_PDEATHSIG = 1


class ServerEnded(Exception):
    """The server has ended, although it is still wanted."""


class ForkServer:
    """The side of who asks: starts the server, which ends when this is closed, or the process that has made it ends.

    Args:
        command: calls `serve` with the descriptor that is added to it.
        env: the variables of the server and of its processes.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._env = dict(env)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server runs)
        self._directory = tempfile.TemporaryDirectory(prefix="rpc-server-")
        self.address = f"{self._directory.name}/server"
        with _socket() as listener:
            listener.bind(self.address)
            listener.listen(WAITING)
            self._process = subprocess.Popen(
                [*command, str(listener.fileno())],
                env=self._env,
                stdin=subprocess.PIPE,  # whose end is the server's
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # a Ctrl-C is the affair of who asks
            )

    def runs(self) -> bool:
        return self._process.poll() is None

    def await_start(self) -> None:
        """Returns when it serves: it has closed a connection that asks for nothing."""
        with _socket() as connection, contextlib.suppress(ConnectionError):  # an end is for fork() to tell
            connection.connect(self.address)
            connection.shutdown(socket.SHUT_WR)
            if not select.select([connection], [], [], START_LIMIT)[0]:
                raise self.end()

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        self._directory.cleanup()

    def end(self) -> ServerEnded:
        """What there is to raise when it does not serve any more, or not in time."""
        self._process.kill()
        status = self._process.wait()
        if self._log.closed:
            return ServerEnded("it has been closed")
        self._log.seek(0)
        return ServerEnded(f"It ended with status {status}. Its output:\n{self._log.read().decode()}")

    def fork(
        self, arguments: Sequence[str], env: Mapping[str, str], output: Path, errors: Path | None = None
    ) -> ForkedProcess:
        """Forks a process with these arguments, more variables, and its output appended to a file, or to two."""
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(_socket())
            try:
                connection.connect(self.address)
                with open(os.devnull, "rb") as nothing, output.open("ab") as out, (errors or output).open("ab") as err:
                    descriptors = {0: nothing.fileno(), 1: out.fileno(), 2: err.fileno()}
                    request(connection, arguments, {**self._env, **env}, descriptors)
            except ConnectionError as error:
                raise self.end() from error
            process = ForkedProcess(self, connection)
            undo.pop_all()
        return process


class ForkedProcess:
    """A process of a server, with some of what subprocess.Popen has."""

    def __init__(self, server: ForkServer, connection: socket.socket) -> None:
        self._server, self._connection = server, connection
        self.returncode: int | None = None
        self.pid = self._answer("pid", START_LIMIT)
        if self.pid is None:
            raise server.end()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._answer("status", 0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self.returncode = self._answer("status", timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def _answer(self, kind: str, timeout: float) -> int | None:
        """None if there is none within so many seconds. The status is the last."""
        if self._connection.fileno() < 0:
            raise self._server.end()
        if not select.select([self._connection], [], [], timeout)[0]:
            return None
        value = answer(self._connection, kind)
        if value is None or kind == "status":
            self._connection.close()
        if value is None:
            raise self._server.end()
        return value


def serve(descriptor: str) -> list[str] | None:
    """The server's side. Returns the arguments in each process that it forks, and None in the server when it ends."""
    with _Server(socket.socket(fileno=int(descriptor))) as server:
        asked = server.serve()
    if asked is None:
        return None
    message, descriptors = asked
    os.setsid()  # as every process of a launch
    numbers = message["descriptors"]
    beyond = max(numbers, default=0) + 1  # out of the way of the numbers that they get
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, beyond) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(moved, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(message["env"])
    os.chdir(message["directory"])
    sys.argv[1:] = message["arguments"]
    return message["arguments"]


def run_as_main(program: str, arguments: Sequence[str], path: str | None = None) -> None:
    """Runs a program as its own `__main__`, as `python PATH` and `python -c` do. The first argument is its name."""
    sys.argv[:] = arguments
    this = sys.modules["__main__"]  # noqa: F841 (kept, as its names would go with it)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    if path is not None:
        main.__file__ = path
    exec(compile(program, path or "<string>", "exec", dont_inherit=True), main.__dict__)


class _Server:
    """Owns what a child must not keep: leaving it closes that."""

    def __init__(self, listener: socket.socket) -> None:
        self._owned = contextlib.ExitStack()
        self._listener = self._owned.enter_context(listener)
        self._ended = self._owned.enter_context(_children_that_end())
        self._selector = self._owned.enter_context(selectors.DefaultSelector())
        for source in (sys.stdin, self._ended, self._listener):
            self._selector.register(source, selectors.EVENT_READ)
        self._connections: dict[int, socket.socket] = {}  # by the pid of each process that runs

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *error: object) -> None:
        for connection in self._connections.values():
            connection.close()
        self._owned.close()

    def serve(self) -> tuple[dict, list[int]] | None:
        """Returns in each child what is asked of it, and the descriptors that come with it; None when it is to end."""
        while True:
            ready = [key.fileobj for key, _ in self._selector.select()]
            if self._ended in ready:
                self._ended.recv(4096)
                self._reap()
            for pid, connection in self._connections.items():
                if connection in ready:  # nobody waits for the process any more
                    self._selector.unregister(connection)
                    os.kill(pid, signal.SIGKILL)
            if sys.stdin in ready:
                for pid in self._connections:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                return None
            if self._listener in ready and (asked := self._fork()):
                return asked

    def _fork(self) -> tuple[dict, list[int]] | None:
        connection, _ = self._listener.accept()
        connection.settimeout(LIMIT)
        packet, descriptors = b"", []
        with contextlib.suppress(ConnectionError, TimeoutError):
            packet, descriptors, _, _ = socket.recv_fds(connection, LARGEST, MOST_DESCRIPTORS)
        connection.settimeout(None)
        if not packet:  # it asks for nothing, or its process has ended
            connection.close()
            return None
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server:
                os._exit(1)
            connection.close()
            return json.loads(packet), descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        self._connections[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ)
        _send(connection, pid=pid)
        return None

    def _reap(self) -> None:
        while self._connections:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._connections.pop(pid) as connection:
                with contextlib.suppress(KeyError):  # it is so already
                    self._selector.unregister(connection)
                _send(connection, status=os.waitstatus_to_exitcode(status))


def _send(connection: socket.socket, **message: int) -> None:
    with contextlib.suppress(ConnectionError):  # nobody is there any more
        connection.send(json.dumps(message).encode())


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextlib.contextmanager
def _children_that_end() -> Iterator[socket.socket]:
    """A socket that can be read when a child has ended. A child that leaves this has the handlers of a new one."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with receiver, sender:
        signal.set_wakeup_fd(sender.fileno())
        try:
            yield receiver
        finally:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, before)
