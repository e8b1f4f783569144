"""Things that may end or stop a process, tried in a child that is forked for it."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from .._system import how_it_ended

_PR_SET_PDEATHSIG = 1  # of prctl
_LAST_LINES, _FRAMES = 6, 3  # of what a child that failed has printed, and of where it was
_STACK = "(most recent call first):"  # faulthandler's
_STACK_LIMIT = 5.0  # seconds, to print it


class Tell(Protocol):
    """Tells the parent what was found, and the step that comes next; empty: the same."""

    def __call__(self, found: dict[str, Any], next_step: str) -> None: ...


@dataclass
class Trial:
    """What a child has told, and what became of it."""

    found: dict[str, Any] = field(default_factory=dict)
    step: str = ""  # the one that was under way at last
    failure: str = ""  # empty: none
    output: str = ""

    @property
    def said(self) -> str:
        """What it has printed at last, and where it was, if it was killed."""
        text, _, stack = self.output.partition(_STACK)
        return " | ".join(_lines(text)[-_LAST_LINES:] + _lines(stack)[:_FRAMES])


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def run(body: Callable[[Tell], None], limit: float) -> Trial:
    """Runs ``body`` in a child, for at most ``limit`` seconds.

    Forked and not started anew: importing torch takes seconds, and an MPI launcher's descriptors stay as they are. So
    this is for a process that has not loaded MPI and uses no threads of torch's.
    """
    trial = Trial()
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output, open(reader, "rb") as pipe:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _be_child(body, writer, output.fileno(), parent)
        os.close(writer)
        expired = not _read(trial, pipe.fileno(), time.monotonic() + limit)
        if expired:
            os.kill(pid, signal.SIGABRT)  # at which faulthandler shows where it hangs
            if not _read(trial, pipe.fileno(), time.monotonic() + _STACK_LIMIT):
                os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        trial.output = output.read().decode(errors="replace")
    if expired:
        trial.failure = f"it did not end within {limit:.0f} s"
    elif "error" in trial.found:
        trial.failure = trial.found.pop("error")
    elif status != 0:
        trial.failure = f"the process {how_it_ended(status)}"
    return trial


def _read(trial: Trial, pipe: int, deadline: float) -> bool:
    """Takes what the child tells, until it has ended. Returns False if it has not by then."""
    text = b""
    while True:
        if not select.select([pipe], [], [], max(deadline - time.monotonic(), 0))[0]:
            return False
        data = os.read(pipe, 1 << 16)
        if not data:
            return True
        *lines, text = (text + data).split(b"\n")
        for line in lines:
            found, next_step = json.loads(line)
            trial.found.update(found)
            trial.step = next_step or trial.step


def _be_child(body: Callable[[Tell], None], writer: int, output: int, parent: int) -> None:
    """Never returns."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        faulthandler.enable(2)

        def tell(found: dict[str, Any], next_step: str) -> None:
            data = json.dumps([found, next_step]).encode() + b"\n"
            while data:
                data = data[os.write(writer, data) :]

        try:
            body(tell)
            # Nothing of Python's, which is the parent's; but MPICH tells its launcher in a handler of C's that it ends.
            ctypes.CDLL(None).exit(0)
        except Exception as error:
            tell({"error": f"{type(error).__name__}: {error}"}, "")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
