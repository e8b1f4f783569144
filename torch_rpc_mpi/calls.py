"""``rpc_sync``, ``rpc_async`` and ``remote`` of ``torch.distributed.rpc``, on this package's entry points.

They take torch's arguments, and do for any RPC backend what torch's do. Where backend ``"MPI"`` runs, torch's own use
the same entry points beneath (see ``_hooks``), and there is no need to prefer these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.rpc import internal

from . import _C, _torch_api, functions

if TYPE_CHECKING:
    from ._torch_api import Future, PyRRef, WorkerInfo

__all__ = ["remote", "rpc_async", "rpc_sync"]

UNSET_RPC_TIMEOUT = functions.UNSET_RPC_TIMEOUT


def rpc_sync(
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> Any:
    """Runs ``func`` at worker ``to`` and returns its result (``torch.distributed.rpc.rpc_sync``).

    Args:
        to: the callee: its name, its id (rank), or its ``WorkerInfo``.
        func: a builtin operator, a TorchScript function, or any callable.
        args, kwargs: its arguments.
        timeout: seconds until the call fails; 0 for never, -1 for the timeout that ``init_rpc`` was given.

    Raises:
        RuntimeError: RPC is not initialized, there is no such worker, or the call failed or ran out of time.
        TypeError: ``func`` is not callable, or something in the arguments cannot be sent.
        Exception: what ``func`` raised; see docs/entry_points.md.
    """
    return answer_to(functools.partial(_call, internal.RPCExecMode.SYNC, to, func, args, kwargs, timeout))


def answer_to(call: Callable[[], Future[Any]]) -> Any:
    """Makes a call and waits for its answer; where backend "MPI" runs, this thread drives progress meanwhile."""
    agent = _torch_api.get_current_rpc_agent() if _torch_api.is_current_rpc_agent_set() else None
    if not isinstance(agent, _C.MPIAgent):
        return call().wait()
    try:
        agent.expect_answer(True)  # in here, for a signal's handler may raise after it
        future = call()
    except BaseException:
        agent.expect_answer(False)
        raise
    return agent.wait(future)


def rpc_async(
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> Future[Any]:
    """Runs ``func`` at worker ``to`` (``torch.distributed.rpc.rpc_async``); arguments as for :func:`rpc_sync`.

    Returns:
        The future of its result. Its ``wait()`` raises what :func:`rpc_sync` would.
    """
    future = _call(internal.RPCExecMode.ASYNC, to, func, args, kwargs, timeout)
    if hasattr(_torch_api.waiting_for_all, "future_list"):  # inside torch's _wait_all()
        _torch_api.waiting_for_all.future_list.append(future)
    return future


def remote(
    to: str | int | WorkerInfo,
    func: Callable[..., Any],
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    timeout: float = UNSET_RPC_TIMEOUT,
) -> PyRRef[Any]:
    """Runs ``func`` at worker ``to`` and leaves the result there (``torch.distributed.rpc.remote``).

    Arguments as for :func:`rpc_sync`.

    Returns:
        An RRef to the result. Its ``to_here()`` raises what :func:`rpc_sync` would.
    """
    rref: PyRRef[Any]
    rref, finish = _prepare(internal.RPCExecMode.REMOTE, to, func, args, kwargs, timeout)
    if finish is not None:
        _torch_api.set_profiling_future(rref, finish(_torch_api.future_of_rref(rref)))
    return rref


def _call(mode: Any, *call: Any) -> Future[Any]:
    future, finish = _prepare(mode, *call)
    ended: Future[Any] = future if finish is None else finish(future)
    return ended


@_torch_api.require_initialized
def _prepare(mode: Any, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> tuple[Any, Any]:
    """Makes the call. Returns its future or RRef, and what ends the profiler's record of it, if it has one."""
    if not callable(func):
        raise TypeError("function should be callable.")
    operator = _torch_api.find_builtin(func)
    dst = _torch_api.TO_WORKER_INFO.current(to)
    profiled = _torch_api.should_profile()
    with _torch_api.enable_rpc_profiler(profiled, operator, func, mode, dst) as record:
        made = _invoke(mode is internal.RPCExecMode.REMOTE, dst, operator, func, args or (), kwargs or {}, timeout)
    return made, _torch_api.end_of_record(record) if profiled else None


def _invoke(
    as_rref: bool, dst: WorkerInfo, operator: str | None, func: Any, args: Any, kwargs: Any, timeout: float
) -> Any:
    if operator is not None:
        if as_rref:
            return functions.py_remote_builtin(dst, operator, timeout, args, kwargs)
        return functions.py_rpc_builtin(dst, operator, args, kwargs, timeout)
    wrapped = _torch_api.async_execution(func)
    is_async = wrapped is not None
    if isinstance(wrapped, torch.jit.ScriptFunction):
        func = wrapped
    if isinstance(func, torch.jit.ScriptFunction):
        name = _torch_api.qualified_name(func)
        if as_rref:
            return functions.py_remote_torchscript(dst.name, name, timeout, is_async, args, kwargs)
        return functions.py_rpc_torchscript(dst.name, name, args, kwargs, timeout, is_async)
    pickled, tensors = _torch_api.DEFAULT_PICKLER.current.serialize(internal.PythonUDF(func, args, kwargs))
    invoke = functions.py_remote_python_udf if as_rref else functions.py_rpc_python_udf
    return invoke(dst, pickled, tensors, timeout, is_async)
