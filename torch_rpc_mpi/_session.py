"""What lives from ``init_rpc`` to ``shutdown`` on the Python side of the agent.

Imports the extension; import this module only once MPI is loaded.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.rpc import internal

from . import _C

logger = logging.getLogger("torch_rpc_mpi")


class Agent(_C.MPIAgent):
    """The agent, whose shutdown also ends the Python side of the session.

    torch calls ``shutdown`` on what ``_get_current_rpc_agent()`` returns. That is this very object as long as it is
    alive, which the session sees to; hence no function of torch needs to be replaced to learn of the end.
    """

    def shutdown(self) -> None:
        try:
            super().shutdown()
        finally:
            end(self)


@dataclass
class _Session:
    agent: Agent
    pid: int
    run_function: Callable[[Any], Any]  # ours
    replaced: Callable[[Any], Any]  # what it stands in for


_current: _Session | None = None


def begin(agent: Agent, whereabouts: str) -> None:
    """Starts the session of ``agent``. Call before the agent starts: torch then looks up ``_run_function`` once.

    Args:
        agent: the agent, not started yet.
        whereabouts: who and where this worker is, for the text of exceptions that its callers see.
    """
    global _current
    session = _Session(agent, os.getpid(), _make_run_function(whereabouts), internal._run_function)
    internal._run_function = session.run_function
    _current = session


def end(agent: Agent) -> None:
    """Ends the session of ``agent``; does nothing when it has ended."""
    global _current
    session = _current
    if session is None or session.agent is not agent:
        return
    _current = None
    # Not if someone has put theirs on top of ours since.
    if internal._run_function is session.run_function:
        internal._run_function = session.replaced


def _make_run_function(whereabouts: str) -> Callable[[Any], Any]:
    def _run_function(python_udf: Any) -> Any:
        """Torch's ``_run_function`` of ``torch.distributed.rpc.internal``, but its error text names rank and host."""
        try:
            if isinstance(python_udf, AttributeError):
                raise python_udf
            result = python_udf.func(*python_udf.args, **python_udf.kwargs)
        except Exception as error:
            text = f"On {whereabouts}:\n{error!r}\n{traceback.format_exc()}"
            print(text, file=sys.stderr)
            result = internal.RemoteException(text, type(error))
        return result

    return _run_function


# Note [Leaving without shutdown]
# A process that ends without rpc.shutdown() must stop its engine before mpi4py finalises MPI, and tell its peers, whose
# calls would otherwise run into their timeouts. mpi4py finalises in a C-level exit function, which runs after all of
# atexit. Registered once, not per session: it finds the session that is current then, and keeps no agent alive.
@atexit.register
def _leave_at_exit() -> None:
    session = _current
    # A child made by os.fork() inherits this hook, but neither the engine's threads nor the right to MPI.
    if session is None or session.pid != os.getpid():
        return
    try:
        session.agent.leave()
    except Exception:
        logger.warning("torch_rpc_mpi: the agent could not leave its group at exit", exc_info=True)
