"""The side of the fork server that asks for processes."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from fork_server import ForkServer


class ServerOfThisTest(ForkServer):
    """Without a process: what the server says is written to `server`."""

    def __init__(self) -> None:
        self._statuses = {}
        self._channel, self.server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def says(self, **message: int) -> None:
        self.server.send(json.dumps(message).encode())


def test_a_process_does_not_end_with_the_status_of_an_earlier_one_of_its_number() -> None:
    server = ServerOfThisTest()
    with server._channel, server.server:
        server.says(pid=7)
        earlier = server.fork([], {}, Path("output"))
        server.says(ended=7, status=0)
        assert earlier.wait(60) == 0
        server.says(pid=7)
        later = server.fork([], {}, Path("output"))
        assert later.poll() is None
        server.says(ended=7, status=1)
        assert later.wait(60) == 1
        assert earlier.poll() == 0
