"""The end of a process that uses RPC, in the ways in which Python ends one.

Note [The order at exit]
~~~~~~~~~~~~~~~~~~~~~~~~
A process that ends without ``rpc.shutdown()`` must stop its engine before MPI is finalised, and tell its peers,
whose calls would otherwise run into their timeouts. But handlers of atexit may still use RPC; ``rpc.shutdown`` is one
in many programs. Python calls those last that were registered first, so ours is registered at the end of
``import torch``, for whatever session there will be. MPI is finalised in a C-level exit function, of ours or, if the
program has imported mpi4py.MPI itself, of mpi4py, which runs after all of atexit.

Of multiprocessing's children, those that it forks (methods fork and forkserver) end without atexit, and run only its
own finalizers. Those that it spawns run these first, and atexit's handlers after them.

Imported at the end of ``import torch``, and so without anything but the standard library.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import multiprocessing.util
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from . import _launchers

if TYPE_CHECKING:
    from ._mpi import LoadedMPI

# seconds for handlers at exit and threads that Python joins, when the job is to end: they may wait for the others
_LIMIT = 5.0
_LENGTH = 100  # of an exception's text, in what the peers are told

_last: Callable[[], None] | None = None
_end_of_launch: Callable[[], None] | None = None


@atexit.register
def _at_exit() -> None:
    if _last is not None:
        _last()
    if _end_of_launch is not None:
        _end_of_launch()


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


def finalize_in_no_forked_child(extension: ModuleType, rc: Any, mpi: ctypes.CDLL) -> None:
    """Before the import of mpi4py.MPI: has MPI finalised when this process ends in mpi4py's place, see _C.

    Not if mpi4py would not: the program has told it so, or MPI was initialised by another who will finalise it. Nor if
    variables of the environment tell mpi4py, which go before what is set here.

    Args:
        extension: torch_rpc_mpi._C.
        rc: mpi4py.rc, which is told then.
        mpi: the library that mpi4py will load.
    """
    told = {"MPI4PY_RC_INITIALIZE", "MPI4PY_RC_FINALIZE"} & os.environ.keys()
    if told or rc.initialize not in (True, "yes") or rc.finalize not in (None, True, "yes"):
        return
    names = ("MPI_Initialized", "MPI_Finalized", "MPI_Finalize")
    functions = [ctypes.cast(getattr(mpi, name), ctypes.c_void_p).value for name in names]
    initialized = ctypes.c_int()
    mpi.MPI_Initialized(ctypes.byref(initialized))
    if not initialized.value and extension.finalize_at_exit(*functions):
        rc.finalize = False


# Note [An error ends the job]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~~~
# Under MPI's launcher, a rank that ends with an exception would wait in MPI_Finalize for the others, and they for it in
# rpc.shutdown(), or for its part of the work. So it ends the job, by MPI_Abort. Not within the hook that shows the
# exception, but as late as possible: handlers at exit run, and files are written.
# How a process ends by SystemExit cannot be seen, but by `python -m torch_rpc_mpi`. It says goodbye, and the others'
# shutdown raises.


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


def termination_line() -> str:
    """What this worker says when SIGTERM ends it."""
    who = "this worker" if _watched is None else _watched.whereabouts
    # The causes: a scheduler's log has no other line that tells them.
    return (
        f"torch_rpc_mpi: {who} is ended by SIGTERM: its job was cancelled or preempted, or its time is over, or a "
        "launcher ends it after another rank. A handler (signal.signal(signal.SIGTERM, ...)) can save what is needed "
        "before."
    )


def speaks_when_parent_ends() -> bool:
    """Whether that is to be said also where the signal comes from the parent.

    A launcher ends all ranks of a host at once, of which one speaks. A parent of multiprocessing, such as mp.spawn's,
    ends its own children, and knows why.
    """
    return multiprocessing.parent_process() is None and _launchers.is_first_of_host()


def farewell() -> str | None:
    """Why this process leaves, for its peers; None if they are to be told nothing, because the job ends."""
    return _farewell


def _show_and_end(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _hook_before(kind, error, traceback)
    if _watched is None or _watched.pid != os.getpid() or _is_interactive():
        return
    if _watched.job is None:
        global _farewell
        print(f"torch_rpc_mpi: {_watched.whereabouts} ends with this {kind.__name__}", file=sys.stderr)
        text = f"{kind.__name__}: {error}".split("\n")[0]
        _farewell = f"it ended with {text[:_LENGTH]}"
        return
    _end_job(_watched.job, _watched.whereabouts, _status_of(kind), f"this {kind.__name__}")


def _status_of(kind: type[BaseException]) -> int:
    return 130 if issubclass(kind, KeyboardInterrupt) else 1


def _is_interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _end_job(job: LoadedMPI, whereabouts: str, status: int, why: str) -> None:
    global _farewell
    from . import _C

    _farewell = None
    text = f"{whereabouts} ends the job with status {status}, because of {why}"
    _C.end_job_at_exit(job.runtime, job.handle(job.MPI.COMM_WORLD), text, status, _LIMIT)


# Note [An error before MPI]
# ~~~~~~~~~~~~~~~~~~~~~~~~~~
# A rank that ends before it has begun MPI leaves the others in MPI_Init, where they wait for it; some launchers end the
# job then, MPICH's does not. `python -m torch_rpc_mpi` sees how its program ends, and tells such launchers to end the
# job: by the command of PMI-1 that MPI_Abort would send.


def program_raised(error: BaseException) -> None:
    """Told of what ends the program of this process, before it is shown."""
    if _watched is None and not _is_interactive():
        _end_launch(_status_of(type(error)), f"this {type(error).__name__}")


def program_exited(code: object) -> None:
    """Told of the argument of the SystemExit that ends the program. Ranks that need this one are to end as well."""
    status = 0 if code is None else code & 0xFF if isinstance(code, int) else 1
    if status == 0 or _is_interactive():
        return
    if _watched is None:
        _end_launch(status, "its exit")
    elif _watched.job is None:
        global _farewell
        _farewell = f"it exited with status {status}"
    else:
        from . import _torch_api

        if _torch_api.is_current_rpc_agent_set():
            _end_job(_watched.job, _watched.whereabouts, status, "its exit")


def _end_launch(status: int, why: str) -> None:
    launcher = _launchers.find_launcher()
    if launcher is None or launcher.expected_size == 1 or _launchers.is_claimed_by_another():
        return
    whereabouts = f"rank {launcher.rank} (on host {socket.gethostname()})"
    from . import _mpi

    if _mpi.is_initialized():  # by the program
        _end_job(_mpi.open_library(), whereabouts, status, why)
        return

    ended = threading.Event()

    def end() -> None:
        print(f"torch_rpc_mpi: {whereabouts} ends with status {status}, because of {why}", file=sys.stderr, flush=True)
        _launchers.end_job(status)
        ended.set()

    def end_at_exit() -> None:
        with contextlib.suppress(Exception):  # it is whatever the program has put there
            sys.stdout.flush()
        limit.cancel()
        limit.join()  # one that has begun
        if not ended.is_set():
            end()

    global _end_of_launch
    limit = threading.Timer(_LIMIT, end)
    limit.daemon = True
    limit.start()
    _end_of_launch = end_at_exit
