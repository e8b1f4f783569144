"""What a program can learn of faults: the workers that are lost, and what the flight recorder has seen."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from . import _session
    from ._torch_api import WorkerInfo

__all__ = ["on_worker_lost", "write_flight_record"]

OnWorkerLost = Callable[["WorkerInfo", str], object]

logger = logging.getLogger("torch_rpc_mpi")

# Of the process, in the order of their registration; they stay when a session ends.
_callbacks: OrderedDict[int, OnWorkerLost] = OrderedDict()


def on_worker_lost(callback: OnWorkerLost) -> RemovableHandle:
    """Calls ``callback(worker, reason)`` for each worker that can no longer be called.

    That is one that has died, one that left without a graceful ``rpc.shutdown()``, and one whose messages make no
    sense. It is called once for each worker and session, in a thread of the engine, at about the time at which the
    calls to that worker fail. In it, other workers can be called. What it raises is logged.

    Args:
        callback: takes the ``WorkerInfo`` of the worker, and the reason, which is the text of the calls' errors. It
            holds for this and later sessions of this process, and is not told of workers that were lost before.

    Returns:
        A handle, whose ``remove()`` takes the callback back.
    """
    handle = RemovableHandle(_callbacks)
    _callbacks[handle.id] = callback
    return handle


def tell_of_loss(worker: WorkerInfo, reason: str) -> None:
    """Calls those who want to know."""
    for callback in list(_callbacks.values()):
        try:
            callback(worker, reason)
        except Exception:
            logger.exception("a callback of on_worker_lost raised, for %s", worker.name)


def write_flight_record(path: str | os.PathLike[str] = "") -> str:
    """Writes what the flight recorder has seen, and what this worker is doing now, as JSON.

    Args:
        path: of the file; by default the next one in the directory of option ``flight_recorder_dir``.

    Raises:
        RuntimeError: RPC over MPI is not running in this process, the file cannot be written, or no path was given and
            there is no directory.

    Returns:
        The path of the file. What it says is described in docs/faults.md.
    """
    return _agent().write_flight_record(os.fspath(path))


def _agent() -> _session.Agent:
    from . import _session  # it imports the extension, which needs MPI to be loaded

    agent = _session.current_agent()
    if agent is None:
        raise RuntimeError("RPC over MPI is not running in this process: call rpc.init_rpc(name, backend='MPI') first")
    return agent
