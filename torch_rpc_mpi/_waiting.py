"""Waits of torch that let no signal through: while C++ waits, Python runs no handler."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOOK_INTERVAL = 0.05  # seconds between looks at what may end a wait, where no event tells of it


def interruptibly(work: Callable[[], T], look: Callable[[], None] | None = None) -> T:
    """Runs ``work``, which waits in C++, and the handlers of signals that come meanwhile.

    For that, in Python's main thread, ``work`` runs in a thread of its own. When a handler raises, it is left alone.

    Args:
        work: the function that waits.
        look: what is called again and again while ``work`` waits, in whatever thread; it ends the wait by raising.

    Returns:
        What ``work`` returns.

    Raises:
        BaseException: what ``work`` raises, or a handler, or ``look``.
    """
    if look is None and threading.current_thread() is not threading.main_thread():
        return work()
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=run, name="rpc_mpi_wait", daemon=True).start()
    except RuntimeError:  # there is none for this process, or, from Python 3.12 on, none in handlers at exit
        return work()
    # No wait without an end: a signal that comes just before it would be served only after it.
    while not concurrent.futures.wait([outcome], LOOK_INTERVAL).done:
        if look is not None:
            look()
    return outcome.result()
