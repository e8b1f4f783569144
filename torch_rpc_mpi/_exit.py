"""The end of a process that uses RPC, in the ways in which Python ends one.

Note [The order at exit]
~~~~~~~~~~~~~~~~~~~~~~~~
A process that ends without ``rpc.shutdown()`` must stop its engine before mpi4py finalises MPI, and tell its peers,
whose calls would otherwise run into their timeouts. But handlers of atexit may still use RPC; ``rpc.shutdown`` is one
in many programs. Python calls those last that were registered first, so ours is registered at the end of
``import torch``, for whatever session there will be. mpi4py finalises in a C-level exit function, which runs after all
of atexit.

Of multiprocessing's children, those that it forks (methods fork and forkserver) end without atexit, and run only its
own finalizers. Those that it spawns run these first, and atexit's handlers after them.

Imported at the end of ``import torch``, and so without anything but the standard library.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._mpi import LoadedMPI

# seconds for handlers at exit and threads that Python joins, when the job is to end: they may wait for the others
_LIMIT = 5.0
_LENGTH = 100  # of an exception's text, in what the peers are told

_last: Callable[[], None] | None = None


@atexit.register
def _at_exit() -> None:
    if _last is not None:
        _last()


def skips_atexit() -> bool:
    """Whether this process will end without the handlers of atexit and Python's other exit functions."""
    if multiprocessing.parent_process() is None:
        return False
    # Of a class of its own for each method, if it does not follow the default one.
    process = multiprocessing.current_process()
    methods = (
        method
        for method in multiprocessing.get_all_start_methods()
        if isinstance(process, multiprocessing.get_context(method).Process)  # type: ignore[attr-defined]
    )
    return next(methods, multiprocessing.get_start_method()) != "spawn"


def call_last(function: Callable[[], None]) -> None:
    """Has ``function`` called when this process ends, after the user's own handlers."""
    global _last
    _last = function
    if skips_atexit():
        multiprocessing.util.Finalize(None, function, exitpriority=100)


def before_finalize(MPI: Any, function: Callable[[], None]) -> Callable[[], None]:
    """Has ``function`` called when MPI_Finalize begins, while MPI still works. Returns what undoes that.

    MPI deletes the attributes of its COMM_SELF first.
    """
    waiting = [function]

    def deleted(*_: Any) -> None:
        if waiting:
            waiting.pop()()

    def undo() -> None:
        waiting.clear()
        if not MPI.Is_finalized() and MPI.COMM_SELF.Get_attr(key) is not None:
            MPI.COMM_SELF.Delete_attr(key)
            MPI.Comm.Free_keyval(key)

    key = MPI.Comm.Create_keyval(delete_fn=deleted)
    MPI.COMM_SELF.Set_attr(key, "torch_rpc_mpi")
    return undo


# Note [An error ends the job]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# Under MPI's launcher, a rank that ends with an exception would wait in MPI_Finalize for the others, and they for it in
# rpc.shutdown(), or for its part of the work. So it ends the job, by MPI_Abort. Not within the hook that shows the
# exception, but as late as possible: handlers at exit run, and files are written.
# How a process ends by SystemExit cannot be seen. It says goodbye, and the others' shutdown raises.


@dataclass(frozen=True)
class _Watched:
    pid: int
    whereabouts: str
    job: LoadedMPI | None  # MPI, if a launcher has started its ranks


_watched: _Watched | None = None
_hook_before = sys.excepthook
_farewell: str | None = "it shut RPC down or exited without waiting for the others"


def watch_errors(whereabouts: str, job: LoadedMPI | None) -> None:
    """From now on an exception that nobody catches ends the job, or, without one, is what the peers are told.

    Args:
        whereabouts: who and where this worker is.
        job: MPI, if a launcher has started its ranks.
    """
    global _watched, _hook_before
    if _watched is None:  # once: a hook that calls ours may have taken its place since
        _hook_before, sys.excepthook = sys.excepthook, _show_and_end
    _watched = _Watched(os.getpid(), whereabouts, job)


def is_of_a_job() -> bool:
    """Whether a launcher has started the ranks."""
    return _watched is not None and _watched.job is not None


def farewell() -> str | None:
    """Why this process leaves, for its peers; None if they are to be told nothing, because the job ends."""
    return _farewell


def _show_and_end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _hook_before(kind, error, traceback)
    if _watched is None or _watched.pid != os.getpid() or hasattr(sys, "ps1") or sys.flags.interactive:
        return
    global _farewell
    if _watched.job is None:
        text = f"{kind.__name__}: {error}".split("\n")[0]
        _farewell = f"it ended with {text[:_LENGTH]}"
        return
    from . import _C

    _farewell = None
    status = 130 if issubclass(kind, KeyboardInterrupt) else 1
    text = f"{_watched.whereabouts} ends the job with status {status}, because of this {kind.__name__}"
    _C.end_job_at_exit(_watched.job.runtime, _watched.job.handle(_watched.job.MPI.COMM_WORLD), text, status, _LIMIT)
