"""Waits in C++ that let signals through, and what else may end them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from unit_fakes import RunPython

from torch_rpc_mpi import _waiting


def in_another_thread(work: Callable[[], object]) -> object:
    results: list[object] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return results[0]


def fail() -> None:
    raise ValueError("on purpose")


def test_the_result_is_that_of_the_work() -> None:
    assert _waiting.interruptibly(lambda: 7) == 7
    assert _waiting.interruptibly(lambda: 7, lambda: None) == 7
    with pytest.raises(ValueError, match="on purpose"):
        _waiting.interruptibly(fail)
    with pytest.raises(ValueError, match="on purpose"):
        _waiting.interruptibly(fail, lambda: None)


def test_a_look_may_end_the_wait() -> None:
    go = threading.Event()
    with pytest.raises(ValueError, match="on purpose"):
        _waiting.interruptibly(go.wait, fail)
    error = in_another_thread(lambda: _waiting.interruptibly(go.wait, fail))
    assert isinstance(error, ValueError)
    go.set()


def test_looks_go_on_until_the_work_ends() -> None:
    go, looks = threading.Event(), []

    def look() -> None:
        looks.append(1)
        if len(looks) == 3:
            go.set()

    assert _waiting.interruptibly(lambda: go.wait(60), look)
    assert len(looks) == 3


def test_waits_at_exit(run_python: RunPython) -> None:
    """Where Python starts no more threads from version 3.12 on; rpc.shutdown is a handler of many programs."""
    handler = "atexit.register(lambda: print(_waiting.interruptibly(lambda: 7)))"
    assert run_python(f"import atexit\nfrom torch_rpc_mpi import _waiting\n{handler}\n") == "7\n"
