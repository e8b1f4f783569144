"""The ranks of a session while it forms: what one of them does, all do, and an error on one is raised on all."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from . import _C


class Group(NamedTuple):
    """Made by each rank for itself; what it does is collective."""

    communicator: _C.Communicator
    companions: _C.Companions | None  # None under a launcher, that looks after the ranks
    node: str  # this rank's
    limit: float  # seconds

    def on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result of ``work``. If it failed anywhere, raises on all ranks, naming which."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = error
        text = None if failure is None else f"{type(failure).__name__}: {failure} (on {socket.gethostname()})"
        data = self.communicator.allgather(pickle.dumps((result, text)), self.limit, self.companions)
        outcomes = [pickle.loads(of_one) for of_one in data]
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
        if failed:
            self.communicator.free()
            raise RuntimeError("init_rpc failed on all ranks because of\n  " + "\n  ".join(failed)) from failure
        return [result for result, _ in outcomes]
