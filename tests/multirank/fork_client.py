"""Stands for a process of the fork server where one is started: under MPI's launcher.

    python -I -S fork_client.py ADDRESS ARGUMENT...

The process has the variables, working directory, input, output and PMI connection of this one, which ends as it does.
It gets the signals that this one gets, and is killed if this one is. See fork_server.py; this side loads nothing that
takes time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence

LARGEST = 1 << 17  # bytes of a message
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def request(
    connection: socket.socket, arguments: Sequence[str], env: Mapping[str, str], descriptors: Mapping[int, int]
) -> None:
    """Asks for a process.

    Args:
        descriptors: of this process, by the number that each gets in the new one.
    """
    message = {
        "arguments": list(arguments),
        "env": dict(env),
        "directory": os.getcwd(),
        "descriptors": list(descriptors),
    }
    socket.send_fds(connection, [json.dumps(message).encode()], list(descriptors.values()))


def answer(connection: socket.socket, kind: str) -> int | None:
    """The next one of the server, which is of this kind; None if the server has ended."""
    packet = b""
    with contextlib.suppress(ConnectionError):
        packet = connection.recv(LARGEST)
    return json.loads(packet)[kind] if packet else None


def await_answer(connection: socket.socket, kind: str) -> int:
    value = answer(connection, kind)
    if value is None:
        sys.exit(f"fork_client.py: the fork server has ended before it has told the {kind} of a process")
    return value


def main() -> None:
    address, *arguments = sys.argv[1:]
    passed = [0, 1, 2]
    if "PMI_FD" in os.environ:
        passed.append(int(os.environ["PMI_FD"]))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until it is known to whom
        request(connection, arguments, os.environ, {number: number for number in passed})
        pid = await_answer(connection, "pid")

        def pass_on(number: int, frame: object) -> None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)

        for number in PASSED_ON:
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status = await_answer(connection, "status")
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # its number may be another's from now on
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other
            signal.signal(-status, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-status])
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
