"""The calls that are made through torch's own entry points and through ours, and must end alike."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from torch._C import _distributed_rpc as torchs
from torch.distributed.rpc.internal import PythonUDF, _internal_rpc_pickler

from torch_rpc_mpi import functions


class Torchs:
    """torch's private entry points, with the arguments of ours."""

    @staticmethod
    def rpc_builtin(dst: Any, name: str, args: Any, kwargs: Any, timeout: float) -> Any:
        return torchs._invoke_rpc_builtin(dst, name, timeout, *args, **kwargs)

    rpc_python_udf = staticmethod(torchs._invoke_rpc_python_udf)
    rpc_torchscript = staticmethod(torchs._invoke_rpc_torchscript)

    @staticmethod
    def remote_builtin(dst: Any, name: str, timeout: float, args: Any, kwargs: Any) -> Any:
        return torchs._invoke_remote_builtin(dst, name, timeout, *args, **kwargs)

    remote_python_udf = staticmethod(torchs._invoke_remote_python_udf)

    @staticmethod
    def remote_torchscript(dst: str, name: str, timeout: float, is_async: bool, args: Any, kwargs: Any) -> Any:
        return torchs._invoke_remote_torchscript(dst, name, timeout, is_async, *args, **kwargs)


class Ours:
    """The functions of torch_rpc_mpi."""

    rpc_builtin = staticmethod(functions.py_rpc_builtin)
    rpc_python_udf = staticmethod(functions.py_rpc_python_udf)
    rpc_torchscript = staticmethod(functions.py_rpc_torchscript)
    remote_builtin = staticmethod(functions.py_remote_builtin)
    remote_python_udf = staticmethod(functions.py_remote_python_udf)
    remote_torchscript = staticmethod(functions.py_remote_torchscript)


def serialize(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[bytes, list[Tensor]]:
    return _internal_rpc_pickler.serialize(PythonUDF(function, args, kwargs))


# The functions called. Their module must be importable at the callee.


def scale(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor


def raises(kind: type[Exception]) -> None:
    raise kind("of the function")


class Unloadable:
    """Pickles at the callee, but does not unpickle at the caller."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


@rpc.functions.async_execution
def later(to: str, x: Tensor) -> torch.futures.Future[Tensor]:
    return rpc.rpc_async(to, scale, args=(x,))


@torch.jit.script
def script_scale(x: Tensor, factor: float = 2.0) -> Tensor:
    return x * factor


@torch.jit.script
def script_pair(x: Tensor) -> tuple[list[int], dict[str, Tensor]]:
    return x.size(), {"x": x}


@torch.jit.script
def script_raises(x: Tensor) -> Tensor:
    if x.numel() > 0:
        raise ValueError("of the script")
    return x


def qualified(function: Any) -> str:
    return torch._jit_internal._qualified_name(function)


class Call(NamedTuple):
    """A call as data, made with either set of functions.

    `kind` is builtin, udf or script. `remote` is False where torch leaves nothing to compare: an RRef to the result of
    an operator that fails, or that has two results, never gets a value nor an error, and to_here() waits for ever.
    `typed` is False where torch cannot send the RRef to its owner, as asking for its type does: the owner refuses what
    it then keeps for ever. `raises` is the type that the function raises: ours keep it and its text, torch's keep two
    types, and put the type's name before the text.
    """

    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    timeout: float = -1.0
    is_async: bool = False
    remote: bool = True
    typed: bool = True
    raises: type[Exception] | None = None

    def start(self, api: Any, dst: Any) -> Any:
        """Through rpc: returns the future."""
        if self.kind == "builtin":
            return api.rpc_builtin(dst, self.target, self.args, self.kwargs, self.timeout)
        if self.kind == "udf":
            return api.rpc_python_udf(
                dst, *serialize(self.target, *self.args, **self.kwargs), self.timeout, self.is_async
            )
        return api.rpc_torchscript(dst.name, self.target, self.args, self.kwargs, self.timeout, self.is_async)

    def create(self, api: Any, dst: Any) -> Any:
        """Through remote: returns the RRef."""
        if self.kind == "builtin":
            return api.remote_builtin(dst, self.target, self.timeout, self.args, self.kwargs)
        if self.kind == "udf":
            return api.remote_python_udf(
                dst, *serialize(self.target, *self.args, **self.kwargs), self.timeout, self.is_async
            )
        return api.remote_torchscript(dst.name, self.target, self.timeout, self.is_async, self.args, self.kwargs)


_X = torch.arange(6.0).reshape(2, 3)
_ME = "to be replaced by the caller's name"

CASES = {
    "add a number": Call("builtin", "aten::add", (_X, 1)),
    "add a tensor": Call("builtin", "aten::add", (_X, _X)),
    "add with a keyword": Call("builtin", "aten::add", (_X, _X), {"alpha": 3}),
    "add keywords only": Call("builtin", "aten::add", (), {"self": _X, "other": _X}),
    "add numbers": Call("builtin", "aten::add", (1, 2)),
    "add texts": Call("builtin", "aten::add", ("a", "b")),
    "add lists": Call("builtin", "aten::add", ([1], [2])),
    "add a tensor of one": Call("builtin", "aten::add", (torch.tensor(2), torch.tensor(3))),
    "sum over a dimension": Call("builtin", "aten::sum", (_X, [1]), {"keepdim": True}),
    "sum over an int dimension": Call("builtin", "aten::sum", (_X, 1)),
    "max": Call("builtin", "aten::max", (_X,)),
    "max of two": Call("builtin", "aten::max", (_X, _X)),
    "max over a dimension": Call("builtin", "aten::max", (_X, 1), remote=False),
    "split evenly": Call("builtin", "aten::split", (_X, 1)),
    "split by sizes": Call("builtin", "aten::split", (_X, [1, 1])),
    "cat": Call("builtin", "aten::cat", ([_X, _X], 1)),
    "clamp": Call("builtin", "aten::clamp", (_X,), {"min": 1, "max": 3.5}),
    "clamp to tensors": Call("builtin", "aten::clamp", (_X, _X)),
    "zeros of a dtype": Call("builtin", "aten::zeros", ([2, 3],), {"dtype": torch.int64}),
    "where": Call("builtin", "aten::where", (_X > 2, _X, 0.0)),
    "item": Call("builtin", "aten::item", (torch.tensor(4),), typed=False),
    "in place": Call("builtin", "aten::add_", (_X.clone(), 1)),
    "not of aten": Call("builtin", "prim::Print", (_X,)),
    "no namespace": Call("builtin", "add", (_X,)),
    "too few arguments": Call("builtin", "aten::add", (_X,)),
    "unknown keyword": Call("builtin", "aten::add", (_X, 1), {"beta": 1}),
    "one overload, wrong type": Call("builtin", "aten::relu", ("text",)),
    "arguments of no type known": Call("builtin", "aten::add", (object, Ellipsis)),
    "operator fails": Call("builtin", "aten::mm", (_X, _X), remote=False),
    "builtin, no timeout": Call("builtin", "aten::add", (_X, 1), timeout=0.0),
    "function": Call("udf", scale, (_X,)),
    "function with a keyword": Call("udf", scale, (_X,), {"factor": 3.0}),
    "function of structures": Call("udf", dict, ([("a", [1, (_X, None)])],)),
    "function raises ValueError": Call("udf", raises, (ValueError,), raises=ValueError),
    "function raises KeyError": Call("udf", raises, (KeyError,), raises=KeyError),
    "function raises OSError": Call("udf", raises, (OSError,), raises=OSError),
    "function, wrong arguments": Call("udf", scale, (), raises=TypeError),
    "function, no timeout": Call("udf", scale, (_X,), timeout=0.0),
    "function, async execution": Call("udf", later, (_ME, _X), is_async=True),
    "function, async execution of another": Call("udf", scale, (_X,), is_async=True),
    "result does not load": Call("udf", Unloadable),
    # Whether the RRef of a call that times out has a value depends on which answer comes first.
    "function times out": Call("udf", time.sleep, (0.4,), timeout=0.05, remote=False),
    "script": Call("script", qualified(script_scale), (_X,)),
    "script with a keyword": Call("script", qualified(script_scale), (_X,), {"factor": 3.0}),
    "script of structures": Call("script", qualified(script_pair), (_X,), typed=False),
    "script raises": Call("script", qualified(script_raises), (_X,)),
    "script, wrong type": Call("script", qualified(script_scale), ("text",)),
    "script, too few arguments": Call("script", qualified(script_scale)),
    "script, unknown keyword": Call("script", qualified(script_scale), (_X,), {"nope": 1}),
    "no such script": Call("script", "__torch__.no.such_function", (_X,)),
    "no qualified name": Call("script", "", (_X,)),
}

# What differs from one call to the next in a text.
_VARYING = re.compile(
    r'File "[^"]*", line \d+|0x[0-9a-f]+|GloballyUniqueId\([^)]*\)|\b\d+\s?ms\b|RPC ran for more than.*|localId=\d+'
)


def show(value: Any) -> Any:
    """A value that can be compared and printed."""
    if isinstance(value, Tensor):
        return value.dtype, value.device, tuple(value.shape), value.requires_grad, value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [show(item) for item in value]
    if isinstance(value, dict):
        return {key: show(item) for key, item in value.items()}
    return type(value), _VARYING.sub("…", repr(value))


def attempt(action: Callable[[], Any], raises: type[Exception] | None = None) -> Any:
    """How it ends. What a function raises must be of its type, or name it before the text, as torch's do."""
    try:
        return show(action())
    except Exception as error:
        kind, text = type(error), str(error)
        if raises is not None and "On WorkerInfo(" in text and "Traceback (most recent call last)" in text:
            named = f"{raises.__name__}: " in text.split("On WorkerInfo(")[0]
            return "in a callback" if "the callback: " in text else "raised", kind is raises or named
        return kind, _VARYING.sub("…", text).splitlines()[:3]


def outcome(call: Call, api: Any, dst: Any) -> dict[str, Any]:
    """How a call ends through rpc and through remote, and what the future and the RRef say of themselves."""
    call = call._replace(args=tuple(rpc.get_worker_info().name if arg is _ME else arg for arg in call.args))
    result: dict[str, Any] = {}
    result["future"] = attempt(lambda: _of_future(call.start(api, dst), call.raises))
    if call.remote:
        result["rref"] = attempt(lambda: _of_rref(call.create(api, dst), call.typed))
    return result


def _of_future(future: Any, raises: type[Exception] | None) -> tuple[Any, ...]:
    value = attempt(future.wait, raises)
    chained = attempt(future.then(lambda done: done.wait()).wait, raises)
    return str(type(future)), value, attempt(future.value, raises), chained, future.done()


def _of_rref(rref: Any, typed: bool) -> tuple[Any, ...]:
    value = attempt(lambda: rref.to_here(20.0))
    local = attempt(rref.local_value)
    kind = attempt(rref._get_type) if typed else None
    return str(type(rref)), value, local, rref.is_owner(), rref.owner_name(), kind
