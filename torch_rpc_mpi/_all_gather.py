"""torch's all-gather over RPC, which a lost worker ends here.

``rpc.shutdown()`` and torch's barriers wait for the other workers by it: everybody calls the worker that leads, and
waits on a Python event until the leader calls back. torch waits without a limit, also for a worker that will never
come.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

from torch.distributed.rpc.constants import DEFAULT_SHUTDOWN_TIMEOUT, UNSET_RPC_TIMEOUT

from . import _C, _torch_api, _waiting
from ._torch_api import ALL_GATHER, DELETE_RREFS, WAIT_ALL_WORKERS, Place

# seconds that a wait goes on when a worker is lost. The leader lets all go at once: one that it has let go may leave,
# and be known to have left, before the leader's message to another one has arrived.
_GRACE = 0.25
_NAMED = 8  # of the workers that take part, in the text of an error


class Watch:
    """Watches over the all-gathers of a session. Its methods stand in for functions of torch's."""

    def __init__(self, agent: _C.MPIAgent) -> None:
        self._agent = agent
        self._ended = False
        self._torchs_all_gather = ALL_GATHER.current
        self._torchs_wait_all_workers = WAIT_ALL_WORKERS.current
        self._torchs_delete_rrefs = DELETE_RREFS.current

    def replacements(self) -> dict[Place, Any]:
        """What to put in torch's places while the session lasts."""
        return {
            ALL_GATHER: self._all_gather,
            WAIT_ALL_WORKERS: self._wait_all_workers,
            DELETE_RREFS: self._delete_rrefs,
            # torch counts the rounds for ever. Of its own, each session counts from 0: a worker that left an earlier
            # one ungracefully has counted fewer, and all would wait for each other.
            _torch_api.ALL_GATHER_SEQUENCE_ID: {},
            _torch_api.ALL_GATHER_STATES: defaultdict(_States),
        }

    def end(self) -> None:
        """Ends the waits of other threads."""
        self._ended = True

    def _all_gather(
        self, obj: Any, worker_names: Collection[str] | None = None, timeout: float = UNSET_RPC_TIMEOUT
    ) -> Any:
        if self._ended:  # somebody has put this back after the session
            return self._torchs_all_gather(obj, worker_names, timeout)
        workers = [info for info in self._agent.get_worker_infos() if not worker_names or info.name in worker_names]
        why_hopeless = functools.partial(self._why_hopeless, {info.id: info.name for info in workers})
        before, _this_thread.why_hopeless = _this_thread.why_hopeless, why_hopeless
        try:
            if why_hopeless() is not None:
                raise _Hopeless
            return self._torchs_all_gather(obj, worker_names, timeout)
        except Exception as error:
            if (why := why_hopeless()) is None:
                raise
            if isinstance(error, _Hopeless):
                raise RuntimeError(why) from None
            raise RuntimeError(f"{why}\n{error}") from error  # a call of torch's failed: of that, or of something else
        finally:
            _this_thread.why_hopeless = before

    def _why_hopeless(self, workers: dict[int, str]) -> str | None:
        """Why an all-gather of these workers, by rank, cannot succeed any more."""
        reason = next((reason for rank, reason in self._agent.lost_workers() if rank in workers), None)
        if reason is None and self._ended:
            reason = "RPC was shut down on this worker meanwhile"
        if reason is None:
            return None
        if _this_thread.shuts_down:
            return _no_graceful_shutdown(reason)
        names = sorted(workers.values())
        others = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
        return f"An all-gather over RPC of {', '.join(map(repr, names[:_NAMED]))}{others} is not possible: {reason}"

    def _wait_all_workers(self, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
        """As torch's, which also logs the error: to log its first one, torch imports SymPy, which takes seconds."""
        if self._ended:
            self._torchs_wait_all_workers(timeout)
            return
        before, _this_thread.shuts_down = _this_thread.shuts_down, True
        try:
            ALL_GATHER.current(None, timeout=timeout)
        finally:
            _this_thread.shuts_down = before

    def _delete_rrefs(self) -> None:
        """What ``rpc.shutdown()`` does next: waits until the owners of RRefs know that they are no longer used here."""
        _waiting.interruptibly(self._torchs_delete_rrefs, None if self._ended else self._raise_if_lost)

    def _raise_if_lost(self) -> None:
        for _, reason in self._agent.lost_workers():
            raise RuntimeError(_no_graceful_shutdown(reason))


def _no_graceful_shutdown(reason: str) -> str:
    # In the words of MpiAgent::join, which is the last that rpc.shutdown() waits for.
    return (
        f"A graceful shutdown of RPC is not possible: {reason}. RPC ends here without the others; "
        "rpc.shutdown(graceful=False) in its place waits for nobody"
    )


class _Hopeless(Exception):
    """Gets out of torch's function; the caller sees another exception."""


class _ThisThread(threading.local):
    """What the all-gather that this thread waits in is about."""

    why_hopeless: Callable[[], str | None] | None = None
    shuts_down: bool = False


_this_thread = _ThisThread()


class _Signal(threading.Event):
    """The event that torch waits on."""

    def wait(self, timeout: float | None = None) -> bool:
        deadline = time.monotonic() + (threading.TIMEOUT_MAX if timeout is None else timeout)
        while not super().wait(min(_waiting.LOOK_INTERVAL, max(deadline - time.monotonic(), 0))):
            if _this_thread.why_hopeless is not None and _this_thread.why_hopeless() is not None:
                if super().wait(_GRACE):
                    return True
                raise _Hopeless
            if time.monotonic() >= deadline:
                return False
        return True


class _States(_torch_api.AllGatherStates):  # type: ignore[misc]
    """torch's record of one all-gather."""

    def __init__(self) -> None:
        super().__init__()
        self.proceed_signal = _Signal()
