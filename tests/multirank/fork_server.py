"""A process that has torch loaded and forks others from itself: importing torch takes seconds, a fork milliseconds.

`python ranks.py serve` becomes such a process; the launcher starts it and asks it for ranks. Each goes on in ranks.py
as if it had been started with the arguments of the request: that is its `__main__`, and its end is an ordinary end of
the interpreter. What processes that are started one by one do not have in common is the same in all of one server: the
seed of hashes, and where libraries and functions lie in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

LARGEST = 1 << 17  # bytes of a message
START_LIMIT = 120.0  # importing torch on a busy machine


class ServerEnded(Exception):
    """The server has ended, although it is still wanted."""


class ForkServer:
    """The side of who asks: starts the server, which ends when this side of the channel does.

    Args:
        command: calls `serve` with the descriptor that is added to it.
        env: the variables of the server.

    A message is a packet. The server says {"ready"} first. A request is {"arguments", "env", "output"}, its answer
    {"pid"}; and when a process has ended, the server says {"ended": pid, "status"}.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server runs)
        self._statuses: dict[int, int] = {}
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # a Ctrl-C is the affair of who asks
            )
        self._await("ready")

    def runs(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._channel.close()
        self._process.wait()
        self._log.close()

    def fork(self, arguments: Sequence[str], env: Mapping[str, str], output: Path) -> ForkedProcess:
        """Forks a process with these arguments, more variables, and its output appended to a file."""
        request = {"arguments": list(arguments), "env": dict(env), "output": str(output)}
        self._channel.send(json.dumps(request).encode())
        pid = self._await("pid")["pid"]
        self._statuses.pop(pid, None)  # of an earlier process of this number
        return ForkedProcess(self, pid)

    def status(self, pid: int, timeout: float) -> int | None:
        """The status with which a process has ended; None if it runs on for so many seconds."""
        while pid not in self._statuses and select.select([self._channel], [], [], timeout)[0]:
            self._receive()
        return self._statuses.get(pid)

    def _await(self, kind: str) -> dict:
        while select.select([self._channel], [], [], START_LIMIT)[0]:
            message = self._receive()
            if kind in message:
                return message
        self._process.kill()
        raise ServerEnded(f"the server said nothing for {START_LIMIT:g} s. {self._end()}")

    def _receive(self) -> dict:
        packet = self._channel.recv(LARGEST)
        if not packet:
            raise ServerEnded(self._end())
        message = json.loads(packet)
        if "ended" in message:
            self._statuses[message["ended"]] = message["status"]
        return message

    def _end(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        return f"The server ended with status {status}. Its output:\n{self._log.read().decode()}"


class ForkedProcess:
    """A process of a server, with some of what subprocess.Popen has."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.status(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        if self.returncode is None:
            self.returncode = self._server.status(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode


def serve(descriptor: str) -> list[str] | None:
    """The server's side. Returns the arguments in each process that it forks, and None in the server when it ends."""
    channel = socket.socket(fileno=int(descriptor))
    with channel, selectors.DefaultSelector() as selector, _children_that_end() as ended:
        selector.register(channel, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        _send(channel, ready=True)
        while True:
            ready = [key.fileobj for key, _ in selector.select()]
            if ended in ready:
                ended.recv(4096)
                for pid, status in _reap():
                    _send(channel, ended=pid, status=status)
            if channel in ready:
                packet = channel.recv(LARGEST)
                if not packet:
                    return None
                request = json.loads(packet)
                pid = os.fork()
                if pid == 0:
                    break
                _send(channel, pid=pid)
    os.setsid()  # as every process of a launch
    os.environ.update(request["env"])
    output = os.open(request["output"], os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.argv[1:] = request["arguments"]
    return request["arguments"]


def _send(channel: socket.socket, **message: object) -> None:
    channel.send(json.dumps(message).encode())


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


def _reap() -> Iterator[tuple[int, int]]:
    """Pid and status, as of subprocess.Popen, of each child that has ended."""
    with contextlib.suppress(ChildProcessError):  # there is none
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)
