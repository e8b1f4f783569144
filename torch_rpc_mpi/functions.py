"""The entry points beneath ``rpc_sync``, ``rpc_async`` and ``remote``.

These are the functions of torch's ``torch/csrc/distributed/rpc/python_functions.h``, which torch's library does not
export, with their arguments in their order and Python names. They do for any RPC backend what torch's private
``torch._C._distributed_rpc._invoke_*`` do, and find the overload of a builtin operator faster; see
docs/entry_points.md.

Arguments that several of them have:

- ``dst``: the worker, as ``torch.distributed.rpc.get_worker_info(name)`` returns it.
- ``rpc_timeout_seconds``: seconds until the call fails; 0 for never, -1 for the timeout that ``init_rpc`` was given.
- ``op_name``: a builtin operator by its qualified name, such as ``"aten::add"``.
- ``pickled_python_udf``, ``tensors``: a ``PythonUDF(function, args, kwargs)`` of ``torch.distributed.rpc.internal`` as
  ``_internal_rpc_pickler.serialize()`` of that module returns it.
- ``qualified_name``: a scripted function, as ``torch._jit_internal._qualified_name(function)`` returns it.
- ``is_async_execution``: whether the function is one of ``torch.distributed.rpc.functions.async_execution``, so that
  the future it returns, not the function, makes the result.

Every function raises ``RuntimeError`` if RPC is not initialized. What fails later (at the callee, on the way, by
timeout) is raised by ``wait()`` of the future, or ``to_here()`` of the RRef, that was returned.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import _C

if TYPE_CHECKING:
    from torch import Tensor

    from ._torch_api import Future, PyRRef, WorkerInfo

__all__ = [
    "as_asyncio",
    "py_remote_builtin",
    "py_remote_python_udf",
    "py_remote_torchscript",
    "py_rpc_builtin",
    "py_rpc_python_udf",
    "py_rpc_torchscript",
    "send_builtin",
    "send_python_udf",
    "send_torchscript",
    "to_py_jit_future",
]

UNSET_RPC_TIMEOUT = -1.0


def py_rpc_builtin(
    dst: WorkerInfo,
    op_name: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
) -> Future[Any]:
    """Runs a builtin operator at a worker (``pyRpcBuiltin``).

    Raises:
        RuntimeError: there is no such operator, or no overload of it takes these arguments.
        TypeError: a tensor among the arguments cannot be sent.

    Returns:
        The future of the operator's result.
    """
    return _C.py_rpc_builtin(dst, op_name, tuple(args), dict(kwargs or {}), rpc_timeout_seconds)


def py_rpc_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[Tensor],
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
    is_async_execution: bool = False,
) -> Future[Any]:
    """Runs a Python function at a worker (``pyRpcPythonUdf``).

    Returns:
        The future of the function's result. What the function raised, its ``wait()`` raises too, of the same type
        where that can be made from a text, else as ``RuntimeError``; see docs/entry_points.md.
    """
    by_value = getattr(pickled_python_udf, "by_value", None)
    return _C.py_rpc_python_udf(
        dst, pickled_python_udf, list(tensors), rpc_timeout_seconds, is_async_execution, by_value
    )


def py_rpc_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
    is_async_execution: bool = False,
) -> Future[Any]:
    """Runs a TorchScript function at a worker, which must have it too (``pyRpcTorchscript``).

    Raises:
        RuntimeError: the function is not known here, the arguments do not fit its schema, or there is no such worker.
        TypeError: a tensor among the arguments cannot be sent.

    Returns:
        The future of the function's result, of the type that the function declares: scripts can wait for it.
    """
    return _C.py_rpc_torchscript(
        dst_worker_name, qualified_name, tuple(args), dict(kwargs or {}), rpc_timeout_seconds, is_async_execution
    )


def py_remote_builtin(
    dst: WorkerInfo,
    op_name: str,
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> PyRRef[Any]:
    """Runs a builtin operator at a worker and keeps its result there (``pyRemoteBuiltin``).

    Raises:
        RuntimeError: there is no such operator, or no overload of it takes these arguments.
        TypeError: a tensor among the arguments cannot be sent.

    Returns:
        An RRef to the result; the worker owns it, this process too if it is the worker.
    """
    return _C.py_remote_builtin(dst, op_name, rpc_timeout_seconds, tuple(args), dict(kwargs or {}))


def py_remote_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[Tensor],
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
    is_async_execution: bool = False,
) -> PyRRef[Any]:
    """Runs a Python function at a worker and keeps its result there (``pyRemotePythonUdf``).

    Returns:
        An RRef to the result. An exception of the function is raised by ``to_here()``.
    """
    by_value = getattr(pickled_python_udf, "by_value", None)
    return _C.py_remote_python_udf(
        dst, pickled_python_udf, list(tensors), rpc_timeout_seconds, is_async_execution, by_value
    )


def py_remote_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
    is_async_execution: bool = False,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> PyRRef[Any]:
    """Runs a TorchScript function at a worker and keeps its result there (``pyRemoteTorchscript``).

    Raises:
        RuntimeError: the function is not known here, the arguments do not fit its schema, or there is no such worker.
        TypeError: a tensor among the arguments cannot be sent.

    Returns:
        An RRef to the result, of the type that the function declares.
    """
    return _C.py_remote_torchscript(
        dst_worker_name, qualified_name, rpc_timeout_seconds, is_async_execution, tuple(args), dict(kwargs or {})
    )


def send_builtin(
    dst: WorkerInfo,
    op_name: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
) -> Future[Any]:
    """The first half of :func:`py_rpc_builtin`: returns the future of the response, for :func:`to_py_jit_future`."""
    return _C.send_builtin(dst, op_name, tuple(args), dict(kwargs or {}), rpc_timeout_seconds)


def send_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[Tensor],
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
    is_async_execution: bool = False,
) -> Future[Any]:
    """The first half of :func:`py_rpc_python_udf`: returns the future of the response, for :func:`to_py_jit_future`."""
    return _C.send_python_udf(dst, pickled_python_udf, list(tensors), rpc_timeout_seconds, is_async_execution)


def send_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    rpc_timeout_seconds: float = UNSET_RPC_TIMEOUT,
    is_async_execution: bool = False,
) -> Future[Any]:
    """The call of :func:`py_rpc_torchscript`: returns the future of the response, for :func:`to_py_jit_future`.

    That makes a future of a Python object of it, which scripts, unlike those of ``py_rpc_torchscript``, cannot await.
    """
    return _C.send_torchscript(
        dst_worker_name, qualified_name, tuple(args), dict(kwargs or {}), rpc_timeout_seconds, is_async_execution
    )


def to_py_jit_future(message_future: Future[Any], has_value: bool = True) -> Future[Any]:
    """Makes the future of a response that of the Python object in it (``toPyJitFuture``).

    Args:
        message_future: what a ``send_*`` function of this module returned.
        has_value: False for a future that only signals completion: its value is None, and the response is not looked
            into. A failed call raises nevertheless; what a Python function raised is part of the response and does not.

    Returns:
        A future with the devices of ``message_future``, completed by the thread that completes that.
    """
    return _C.to_py_jit_future(message_future, has_value)


def as_asyncio(future: Future[Any]) -> asyncio.Future[Any]:
    """Makes a future of torch awaitable in the running event loop.

    ``value = await as_asyncio(rpc.rpc_async(...))`` waits without blocking the loop. Cancelling the result gives up
    waiting; the call itself cannot be taken back.

    Args:
        future: what ``rpc_async``, a function of this module, or ``torch.futures`` returned.

    Raises:
        RuntimeError: no event loop is running in this thread.

    Returns:
        A future of the running loop, with the value or the exception of ``future``.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if result.done():  # cancelled
            return
        if error is None:
            result.set_result(value)
        else:
            result.set_exception(error)

    def pass_on(done: Future[Any]) -> None:
        value, error = None, None
        try:
            value = done.wait()
        except BaseException as raised:
            error = raised
        # The loop may have ended meanwhile; then nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, value, error)

    future.add_done_callback(pass_on)
    return result
