"""What lives from ``init_rpc`` to ``shutdown`` on the Python side of the agent.

Imports the extension; import this module only once MPI is loaded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch.distributed.rpc import internal

from . import _C, _all_gather, _exit, _hooks, _mpi, _pickler, _remote_errors, faults
from ._tensorpipe import TranslatedOptions
from ._torch_api import RpcBackendOptions, Store, TensorPipeAgent
from .options import MPIRpcBackendOptions

_WAKING_LIMIT = 0.5  # seconds

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


class StandInAgent(Agent):
    """The agent of a session that was asked for as TensorPipe's. To those who look it is what they expect.

    ``isinstance(agent, TensorPipeAgent)`` looks at ``__class__`` where the type is another: so it holds wherever the
    name comes from, and no class of torch's is replaced. ``type(agent)`` tells the truth, and C++ looks at that.
    """

    __class__ = property(lambda self: TensorPipeAgent)

    is_static_group = True  # torch's shutdown asks for it

    def __init__(self, options: RpcBackendOptions, store: Store, *arguments: Any) -> None:
        """Takes what the program has given to ``init_rpc``, the store of the rendezvous, and what every agent takes."""
        Agent.__init__(self, *arguments)
        self._options, self.store = options, store

    def _get_backend_options(self) -> RpcBackendOptions:
        return self._options


def agent_class(options: MPIRpcBackendOptions, store: Store) -> Callable[..., Agent]:
    """What makes the agent of a session with these options."""
    if isinstance(options, TranslatedOptions):
        return functools.partial(StandInAgent, options.original, store)
    return Agent


@dataclass
class _Session:
    agent: Agent
    pid: int
    hooks: _hooks.Hooks
    second_interrupt: _C.SecondInterrupt
    termination: _C.TerminationNotice
    all_gathers: _all_gather.Watch
    forget_finalize: Callable[[], None]


_current: _Session | None = None


def begin(agent: Agent, pickler: _pickler.RpcPickler | None, whereabouts: str, mpi: _mpi.LoadedMPI) -> None:
    """Starts the session of ``agent``, which has not started yet.

    Args:
        agent: the agent.
        pickler: what pickles the calls of this process from now on; None for torch's.
        whereabouts: who and where this worker is, for the text of errors.
        mpi: the MPI that it uses.
    """
    global _current
    # First: should the handler of a signal raise in what follows, agent.shutdown() puts back what was replaced by then.
    second_interrupt = _C.SecondInterrupt(
        agent, whereabouts, mpi.runtime if _exit.is_of_a_job() else None, mpi.handle(mpi.MPI.COMM_WORLD)
    )
    termination = _C.TerminationNotice(_exit.termination_line(), _exit.speaks_when_parent_ends())
    forget_finalize = _exit.before_finalize(mpi.MPI, functools.partial(_leave_before_finalize, agent, whereabouts))
    all_gathers, hooks = _all_gather.Watch(agent), _hooks.Hooks(agent, pickler)
    _current = _Session(agent, os.getpid(), hooks, second_interrupt, termination, all_gathers, forget_finalize)
    hooks.make(all_gathers.replacements())


def current_agent() -> Agent | None:
    """The agent of the session that this process is in."""
    return None if _current is None else _current.agent


def tell_of_loss(loss: tuple[int, str]) -> None:
    """Told by the engine: the rank of a worker that was lost, and why."""
    agent = current_agent()
    if agent is not None:
        faults.tell_of_loss(agent.get_worker_info(loss[0]), loss[1])


def end(agent: Agent) -> None:
    """Ends the session of ``agent``; does nothing when it has ended."""
    global _current
    session = _current
    if session is None or session.agent is not agent:
        return
    _current = None
    session.second_interrupt.cancel()
    session.termination.cancel()
    session.all_gathers.end()
    session.hooks.undo()
    session.forget_finalize()


def make_run_function(whereabouts: str) -> Callable[[Any], Any]:
    """Makes what runs the functions that peers call.

    It does what ``_run_function`` of ``torch.distributed.rpc.internal`` does, but the text of an exception arrives as
    it was, and names rank and host.

    Args:
        whereabouts: who and where this worker is, for the text of exceptions that its callers see.
    """

    def run_function(python_udf: Any) -> Any:
        try:
            if isinstance(python_udf, AttributeError):
                raise python_udf
            result = python_udf.func(*python_udf.args, **python_udf.kwargs)
        except Exception as error:
            result = _remote_errors.describe(error, whereabouts)
            if error is python_udf:
                result = result._replace(exception_type=_remote_errors.FunctionMissingError)
            with contextlib.suppress(Exception):  # the caller gets it whatever becomes of stderr
                print(_remote_errors.text_of(result), file=sys.stderr)
        return result

    return run_function


def make_serialize(serialize: Callable[[Any], _pickler.Pickled], whereabouts: str) -> Callable[[Any], _pickler.Pickled]:
    """Makes what pickles the results of functions that peers call, or instead the reason why one cannot be pickled.

    Args:
        serialize: what pickles values.
        whereabouts: as for :func:`make_run_function`.
    """

    def serialize_result(value: Any) -> _pickler.Pickled:
        try:
            return serialize(value)
        except Exception as error:
            if isinstance(value, internal.RemoteException):  # of a type that cannot be sent
                return serialize(value._replace(exception_type=RuntimeError))
            return serialize(_remote_errors.describe(error, whereabouts, with_traceback=False))

    return serialize_result


def _leave_before_finalize(agent: Agent, whereabouts: str) -> None:
    logger.warning(
        "torch_rpc_mpi: MPI.Finalize() ends the RPC session of %s, whose calls fail from now on. Call rpc.shutdown() "
        "before it.",
        whereabouts,
    )
    agent.leave("it has called MPI.Finalize() before rpc.shutdown()")


# See Note [The order at exit]. Set once, not per session: it finds the session that is current then, and keeps no agent
# alive.
def _leave_at_exit() -> None:
    session = _current
    # A child made by os.fork() inherits this hook, but neither the engine's threads nor the right to MPI.
    if session is None or session.pid != os.getpid():
        return
    try:
        waited = int(session.agent.get_metrics().get("agent.client_active_calls", 0)) > 0
        before = _whereabouts_of_other_threads()
        session.agent.leave(_exit.farewell())
        session.forget_finalize()
        if waited:
            _let_other_threads_wake(before)
    except Exception:
        logger.warning("torch_rpc_mpi: the agent could not leave its group at exit", exc_info=True)


_exit.call_last(_leave_at_exit)


def _whereabouts_of_other_threads() -> dict[int, tuple[FrameType, int]]:
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    return {thread: (frame, frame.f_lasti) for thread, frame in frames.items()}


def _let_other_threads_wake(before: dict[int, tuple[FrameType, int]]) -> None:
    """Gives daemon threads that waited for an answer the time to see the error that they have got instead.

    One that would ask for the GIL only when the interpreter has gone would be unwound through torch's code, and abort
    the process. No event tells who has woken, hence the limit, for those that wait for something else.
    """
    deadline = time.monotonic() + _WAKING_LIMIT
    while time.monotonic() < deadline:
        now = _whereabouts_of_other_threads()
        if not any(now.get(thread) == place for thread, place in before.items()):
            return
        time.sleep(0.001)
