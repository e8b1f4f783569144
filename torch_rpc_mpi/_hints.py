"""Remedies for slips that end in an error of torch's or Python's, which does not know of this package.

Imported at the end of ``import torch``, and so without anything but the standard library.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any


def check_name(backend: Any, ours: Iterable[str]) -> None:
    """Raises TypeError, as torch does, for a backend that only means one of ours."""
    for name in ours:
        if isinstance(backend, str) and backend != name and backend.upper() == name:
            raise TypeError(f'init_rpc: there is no backend {backend!r}. Write backend="{name}", in capitals.')


def explain_forgotten_backend(error: ValueError) -> None:
    """Raises the error of torch's ``env://`` with the remedy, if a launcher of MPI's ranks started this process."""
    from . import _launchers

    launcher = _launchers.find_launcher()
    if launcher is None or "environment variable" not in str(error):
        return
    raise ValueError(
        f'{error}. {launcher.name} has started this program, but init_rpc was not told backend="MPI", which needs no '
        'address. Say init_rpc(name, backend="MPI"), or start the program as it is with `python -m torch_rpc_mpi '
        "script.py` in the place of `python script.py`."
    ) from error


_watched = False


def watch_spawned_child() -> None:
    """Has a spawned process say what to do where it does not find a function of the notebook that started it.

    Such a process has a ``__main__`` without a file; that of a program has the program's.
    """
    global _watched
    # multiprocessing does not know of a parent yet when the child reads what it is to run.
    if not _watched and "--multiprocessing-fork" in sys.orig_argv and not hasattr(sys.modules["__main__"], "__file__"):
        show_before = sys.excepthook

        def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
            show_before(kind, error, traceback)
            missing = re.search(r"Can't get attribute '(\w+)' on <module '__main__'", str(error))
            if kind is AttributeError and missing:
                print(
                    f"torch_rpc_mpi: {missing[1]} is defined in a notebook or an interactive session, of which a "
                    "spawned process knows nothing. Put it into a file (`%%writefile worker.py`) and import it from "
                    f"there (`from worker import {missing[1]}`).",
                    file=sys.stderr,
                )

        sys.excepthook, _watched = show, True
