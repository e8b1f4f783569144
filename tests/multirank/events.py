"""Where the ranks of one launch meet: events and counters that the launcher serves on a Unix socket.

Independent of the backend under test, so that a case can wait for another rank instead of sleeping, also while RPC is
down. (torch's TCPStore would do, but its waits cannot be woken when a rank fails, and each one that runs out logs.)
"""

from __future__ import annotations

import contextlib
import threading
from multiprocessing.connection import Client, Connection, Listener


class Events:
    """Keys that are signalled once, with a value. A scope that has failed wakes everyone who waits in it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._values: dict[tuple[str, str], str] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._failed: dict[str, str] = {}

    def signal(self, scope: str, key: str, value: str) -> None:
        with self._changed:
            self._values[scope, key] = value
            self._changed.notify_all()

    def fail(self, scope: str, who: str) -> None:
        with self._changed:
            self._failed.setdefault(scope, who)
            self._changed.notify_all()

    def count(self, scope: str, key: str) -> int:
        with self._changed:
            self._counts[scope, key] = self._counts.get((scope, key), 0) + 1
            return self._counts[scope, key]

    def wait(self, scope: str, key: str, timeout: float) -> tuple[str, str]:
        """What came: ("signalled", value), ("failed", who) or ("timeout", "")."""
        with self._changed:
            self._changed.wait_for(lambda: (scope, key) in self._values or scope in self._failed, timeout)
            if (scope, key) in self._values:
                return "signalled", self._values[scope, key]
            return ("failed", self._failed[scope]) if scope in self._failed else ("timeout", "")


class EventServer:
    """Serves one Events object until closed; every connection has a thread, and one request at a time."""

    def __init__(self, address: str) -> None:
        self._events = Events()
        self._listener = Listener(address, family="AF_UNIX", backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept(),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError), connection:  # the rank ended
            while True:
                method, *arguments = connection.recv()
                connection.send(getattr(self._events, method)(*arguments))

    def close(self) -> None:
        self._listener.close()


class EventClient:
    """A rank's side. One connection per thread, as a wait occupies its connection."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._thread = threading.local()

    def __call__(self, method: str, *arguments: object) -> object:
        if not hasattr(self._thread, "connection"):
            self._thread.connection = Client(self._address, family="AF_UNIX")
        self._thread.connection.send((method, *arguments))
        return self._thread.connection.recv()
