"""``rpc_sync``, ``rpc_async`` and ``remote`` of ``torch.distributed.rpc``, on this package's entry points.

They take torch's arguments, and do for any RPC backend what torch's do. Where backend ``"MPI"`` runs, torch's own use
the same entry points beneath (see ``_session``), and there is no need to prefer these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_rpc import _get_current_rpc_agent, _is_current_rpc_agent_set
from torch.distributed.rpc import api, internal

from . import _C, functions

if TYPE_CHECKING:
    from torch._C import Future
    from torch._C._distributed_rpc import PyRRef, WorkerInfo

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
    call = functools.partial(_call, internal.RPCExecMode.SYNC, to, func, args, kwargs, timeout)
    agent = _get_current_rpc_agent() if _is_current_rpc_agent_set() else None
    if not isinstance(agent, _C.MPIAgent):
        return call().wait()
    return agent.wait(announced(agent, call))


def announced(agent: _C.MPIAgent, call: Callable[[], Future[Any]]) -> Future[Any]:
    """Makes a call whose future goes to ``agent.wait()`` next, which drives progress until the answer has come."""
    try:
        agent.expect_answer(True)  # in here, for a signal's handler may raise after it
        return call()
    except BaseException:
        agent.expect_answer(False)
        raise


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
    if hasattr(api._thread_local_var, "future_list"):  # inside torch's _wait_all()
        api._thread_local_var.future_list.append(future)
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
        rref._set_profiling_future(finish(rref._get_future()))
    return rref


def _call(mode: Any, *call: Any) -> Future[Any]:
    future, finish = _prepare(mode, *call)
    ended: Future[Any] = future if finish is None else finish(future)
    return ended


@api._require_initialized
def _prepare(mode: Any, to: Any, func: Any, args: Any, kwargs: Any, timeout: float) -> tuple[Any, Any]:
    """Makes the call. Returns its future or RRef, and what ends the profiler's record of it, if it has one."""
    if not callable(func):
        raise TypeError("function should be callable.")
    operator = torch.jit._builtins._find_builtin(func)  # type: ignore[no-untyped-call]
    dst = api._to_worker_info(to)  # type: ignore[no-untyped-call]
    profiled = api._get_should_profile()  # type: ignore[no-untyped-call]
    with api._enable_rpc_profiler(profiled, operator, func, mode, dst) as record:  # type: ignore[no-untyped-call]
        made = _invoke(mode is internal.RPCExecMode.REMOTE, dst, operator, func, args or (), kwargs or {}, timeout)
    return made, record._call_end_callbacks_on_future if profiled else None


def _invoke(
    as_rref: bool, dst: WorkerInfo, operator: str | None, func: Any, args: Any, kwargs: Any, timeout: float
) -> Any:
    if operator is not None:
        if as_rref:
            return functions.py_remote_builtin(dst, operator, timeout, args, kwargs)
        return functions.py_rpc_builtin(dst, operator, args, kwargs, timeout)
    is_async = hasattr(func, "_wrapped_async_rpc_function")
    if is_async and isinstance(func._wrapped_async_rpc_function, torch.jit.ScriptFunction):
        func = func._wrapped_async_rpc_function
    if isinstance(func, torch.jit.ScriptFunction):
        name = torch._jit_internal._qualified_name(func)
        if as_rref:
            return functions.py_remote_torchscript(dst.name, name, timeout, is_async, args, kwargs)
        return functions.py_rpc_torchscript(dst.name, name, args, kwargs, timeout, is_async)
    pickled, tensors = api._default_pickler.serialize(internal.PythonUDF(func, args, kwargs))
    invoke = functions.py_remote_python_udf if as_rref else functions.py_rpc_python_udf
    return invoke(dst, pickled, tensors, timeout, is_async)
