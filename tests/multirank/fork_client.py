"""Stands for a process of the fork server where one is started: under MPI's launcher.

    python -I -S fork_client.py ADDRESS ARGUMENT...

The process has the variables, working directory, output and PMI connection of this one, which ends as it does. It gets
the signals that this one gets, and is killed if this one is. See fork_server.py; this side loads nothing that takes
time.
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


def main() -> None:
    address, *arguments = sys.argv[1:]
    passed = [0, 1, 2, *(int(os.environ[name]) for name in ("PMI_FD",) if name in os.environ)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(address)
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until it is known to whom
        request(connection, arguments, os.environ, {number: number for number in passed})
        pid = json.loads(connection.recv(LARGEST))["pid"]
        for number in PASSED_ON:
            signal.signal(number, lambda received, frame: os.kill(pid, received))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status = json.loads(connection.recv(LARGEST))["status"]
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no other
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__":
    main()
