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

import torch
from torch.distributed.rpc import internal

from . import _C, _all_gather, _exit, _mpi, _pickler, _remote_errors, _torch_api, calls, faults
from . import functions as entry_points
from ._tensorpipe import TranslatedOptions
from ._torch_api import Place, Replacements, RpcBackendOptions, Store, TensorPipeAgent, WorkerInfo
from .functions import UNSET_RPC_TIMEOUT
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
    replaced: Replacements
    second_interrupt: _C.SecondInterrupt
    termination: _C.TerminationNotice
    all_gathers: _all_gather.Watch
    forget_finalize: Callable[[], None]
    direct_calls: _C.DirectCalls
    workers: dict[str, WorkerInfo]


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
    _current = _Session(
        agent,
        os.getpid(),
        Replacements(),
        second_interrupt,
        termination,
        _all_gather.Watch(agent),
        forget_finalize,
        _make_direct_calls(agent, pickler),
        {worker.name: worker for worker in agent.get_worker_infos()},
    )
    _current.replaced.make(_hooks_into_api(_current, pickler))
    _current.replaced.make(_hooks_into_futures())
    _current.replaced.make(_current.all_gathers.replacements())


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
    session.replaced.undo()
    # What has stood in torch's places may be called still: by threads that have looked it up, or because somebody has
    # put it back. It makes the calls of a later session as torch's own does.
    session.direct_calls.end()
    session.workers.clear()
    session.forget_finalize()


def _hooks_into_api(session: _Session, pickler: _pickler.RpcPickler | None) -> dict[Place, Any]:
    """What makes ``rpc_sync``, ``rpc_async``, ``remote`` and the RRefs' proxies use our entry points and our pickler.

    All of them pickle and send through these names of ``torch.distributed.rpc.api``; the functions themselves stay as
    they are, as TorchScript knows them.
    """
    hooks: dict[Place, Any] = {
        _torch_api.TO_WORKER_INFO: _make_to_worker_info(session.workers, _torch_api.TO_WORKER_INFO.current),
        _torch_api.INVOKE_RPC: _make_invoke_rpc(session.direct_calls, _torch_api.INVOKE_RPC.current),
        _torch_api.INVOKE_RPC_BUILTIN: _invoke_rpc_builtin,
        _torch_api.INVOKE_REMOTE_BUILTIN: _invoke_remote_builtin,
        _torch_api.INVOKE_REMOTE_PYTHON_UDF: entry_points.py_remote_python_udf,
        _torch_api.INVOKE_RPC_TORCHSCRIPT: entry_points.py_rpc_torchscript,
        _torch_api.INVOKE_REMOTE_TORCHSCRIPT: _invoke_remote_torchscript,
    }
    if pickler is not None:
        hooks |= {
            _torch_api.INTERNAL_RPC_PICKLER: pickler,  # what _use_rpc_pickler() goes back to
            _torch_api.DEFAULT_PICKLER: pickler,
            _torch_api.INVOKE_RPC_PYTHON_UDF: entry_points.py_rpc_python_udf,
        }
    return hooks


def _hooks_into_futures() -> dict[Place, Any]:
    """Two changes of what futures and RRefs do.

    Their waits let Python run the handlers of signals meanwhile. Each callback of a future begins and ends in a clean
    thread state where the engine runs it.
    """
    return {
        _torch_api.FUTURE_ADD_DONE_CALLBACK: _C.future_add_done_callback,
        _torch_api.FUTURE_THEN: _C.future_then,
        _torch_api.FUTURE_WAIT: _C.future_wait,
        _torch_api.RREF_LOCAL_VALUE: _C.rref_local_value,
        _torch_api.RREF_TO_HERE: _C.rref_to_here,
    }


def _make_to_worker_info(
    workers: dict[str, WorkerInfo], torchs: Callable[[Any], WorkerInfo]
) -> Callable[[Any], WorkerInfo]:
    """torch's ``_to_worker_info``, which asks the agent each time, with the workers known by their names."""

    @functools.wraps(torchs)
    def _to_worker_info(to: Any) -> WorkerInfo:
        worker = workers.get(to) if type(to) is str else None
        return torchs(to) if worker is None else worker

    return _to_worker_info


def _make_direct_calls(agent: Agent, pickler: _pickler.RpcPickler | None) -> _C.DirectCalls:
    """What makes most calls: see Note [Direct calls] in csrc/python/direct_calls.h."""
    return _C.DirectCalls(
        agent,
        None if pickler is None or pickler.always_by_value else pickler,
        _torch_api.DEFAULT_PICKLER.namespace,
        _torch_api.DEFAULT_PICKLER.name,
        _torch_api.builtin_names(),
        _torch_api.ASYNC_EXECUTION,
        torch.jit.ScriptFunction,
    )


class _Answer:
    """What ``rpc_sync`` calls ``wait()`` of, at once."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def wait(self) -> Any:
        return self._value


def _make_invoke_rpc(direct: _C.DirectCalls, torchs: Callable[..., Any]) -> Callable[..., Any]:
    """torch's ``_invoke_rpc``, but most calls are made without it, and those of ``rpc_sync`` are awaited in here.

    This thread drives progress itself meanwhile.
    """
    sync, answer_of, future_of = internal.RPCExecMode.SYNC, direct.sync, direct.future

    @functools.wraps(torchs)
    def _invoke_rpc(
        to: Any, func: Any, rpc_type: Any, args: Any = None, kwargs: Any = None, rpc_timeout: Any = UNSET_RPC_TIMEOUT
    ) -> Any:
        if rpc_type is not sync:
            future = future_of(to, func, args, kwargs, rpc_timeout)
            return torchs(to, func, rpc_type, args, kwargs, rpc_timeout) if future is None else future
        answer = answer_of(_Answer, to, func, args, kwargs, rpc_timeout)
        if answer is None:
            call = functools.partial(torchs, to, func, rpc_type, args, kwargs, rpc_timeout)
            answer = _Answer(calls.answer_to(call))
        return answer

    return _invoke_rpc


def _invoke_rpc_builtin(dst: Any, name: str, timeout: float, *args: Any, **kwargs: Any) -> Any:
    return entry_points.py_rpc_builtin(dst, name, args, kwargs, timeout)


def _invoke_remote_builtin(dst: Any, name: str, timeout: float, *args: Any, **kwargs: Any) -> Any:
    return _C.py_remote_builtin(dst, name, timeout, args, kwargs)


def _invoke_remote_torchscript(dst: str, name: str, timeout: float, is_async: bool, *args: Any, **kwargs: Any) -> Any:
    return entry_points.py_remote_torchscript(dst, name, timeout, is_async, args, kwargs)


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
