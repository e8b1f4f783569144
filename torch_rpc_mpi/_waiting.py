"""Waits of torch that let no signal through: while C++ waits, Python runs no handler."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def interruptibly(work: Callable[[], T]) -> T:
    """Runs ``work``, which waits in C++, and the handlers of signals that come meanwhile.

    For that, in Python's main thread, ``work`` runs in a thread of its own. When a handler raises, it is left alone.

    Returns:
        What ``work`` returns.

    Raises:
        BaseException: what ``work`` raises, or a handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="rpc_mpi_wait", daemon=True).start()
    return outcome.result()
