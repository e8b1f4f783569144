"""What stands in the places of torch's functions while a session lasts.

Imports the extension; import this module only once MPI is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.rpc import internal

from . import _C, _pickler, _torch_api, calls
from . import functions as entry_points
from ._torch_api import Place, Replacements, WorkerInfo
from .functions import UNSET_RPC_TIMEOUT


class Hooks:
    """Those of one session: nothing is replaced before :meth:`make`."""

    def __init__(self, agent: _C.MPIAgent, pickler: _pickler.RpcPickler | None) -> None:
        """Takes the agent, and what pickles the calls of this process; None for torch's."""
        self._pickler = pickler
        self._direct = _make_direct_calls(agent, pickler)
        self._workers = {worker.name: worker for worker in agent.get_worker_infos()}
        self._replaced = Replacements()

    def make(self, others: dict[Place, Any]) -> None:
        """Puts them, and these others, in torch's places."""
        self._replaced.make(self._into_api())
        self._replaced.make(_into_futures())
        self._replaced.make(others)

    def undo(self) -> None:
        self._replaced.undo()
        # They may be called still: by threads that have looked one up, or because somebody has put it back. In a later
        # session they do what torch's own do.
        self._direct.end()
        self._workers.clear()

    def _into_api(self) -> dict[Place, Any]:
        """What makes ``rpc_sync``, ``rpc_async``, ``remote`` and the RRefs' proxies use our entry points and pickler.

        All of them pickle and send through these names of ``torch.distributed.rpc.api``; the functions themselves stay
        as they are, as TorchScript knows them.
        """
        hooks: dict[Place, Any] = {
            _torch_api.TO_WORKER_INFO: _make_to_worker_info(self._workers, _torch_api.TO_WORKER_INFO.current),
            _torch_api.INVOKE_RPC: _make_invoke_rpc(self._direct, _torch_api.INVOKE_RPC.current),
            _torch_api.INVOKE_RPC_BUILTIN: _invoke_rpc_builtin,
            _torch_api.INVOKE_REMOTE_BUILTIN: _invoke_remote_builtin,
            _torch_api.INVOKE_REMOTE_PYTHON_UDF: entry_points.py_remote_python_udf,
            _torch_api.INVOKE_RPC_TORCHSCRIPT: entry_points.py_rpc_torchscript,
            _torch_api.INVOKE_REMOTE_TORCHSCRIPT: _invoke_remote_torchscript,
        }
        if self._pickler is not None:
            hooks |= {
                _torch_api.INTERNAL_RPC_PICKLER: self._pickler,  # what _use_rpc_pickler() goes back to
                _torch_api.DEFAULT_PICKLER: self._pickler,
                _torch_api.INVOKE_RPC_PYTHON_UDF: entry_points.py_rpc_python_udf,
            }
        return hooks


def _into_futures() -> dict[Place, Any]:
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


def _make_direct_calls(agent: _C.MPIAgent, pickler: _pickler.RpcPickler | None) -> _C.DirectCalls:
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
