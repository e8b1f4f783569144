"""How calls and results become bytes: as torch pickles them, and by value what that cannot send.

Note [By reference and by value]
Python pickles functions and classes by name. That fails here for those that have none (lambdas, closures, local
classes), and at the callee for those of ``__main__`` that its script lacks. The first kind is pickled with cloudpickle
at once, which sends their code. The second goes by name too; a callee that misses a name says so before anything has
run, and the call is sent again by value.

Note [RRefs and failed attempts]
Sending an RRef makes a fork that its owner knows of, and that only arrival ends. Here an RRef is therefore pickled as a
number, and forked when its message is complete: an attempt that fails leaves nothing behind. For the same reason a
callee looks for missing names before it takes up any RRef of such a message.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import pickletools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Literal

import cloudpickle
import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from torch.distributed.rpc import internal
from torch.storage import TypedStorage, UntypedStorage

from . import _C, _remote_errors, _torch_api, _unsendable

Pickled = tuple[bytes, list[Tensor]]
_Parts = tuple[bytes, list[Tensor], list[Any]]  # without its RRefs, which are forked when it is complete

_MAIN = b"__main__"
_MISSING = object()
_KEPT_IN_COPY = 1 << 16  # bytes of a pickle that a second attempt may need


class _Tables(threading.local):
    """What is out of band in the message that this thread pickles or unpickles: tensors and RRefs, by number."""

    tensors: list[Tensor] | None = None  # where it is pickled; received ones are in torch's own table
    rrefs: list[Any] | None = None  # RRefs where it is pickled, their forks where it is unpickled
    is_call: bool = True  # or else a result, for which torch has further demands


_sending = _Tables()
_receiving = _Tables()


class MissingInMain(Exception):
    """The callee's ``__main__`` lacks a name that the caller's has. It leads to a second attempt, by value.

    What a call with RRefs unpickles to at such a callee: returned, not raised, for torch tidies up only after what it
    expects.
    """


class Resendable(bytes):
    """A pickled call that names something of ``__main__``.

    Attributes:
        by_value: what pickles the same call again, as it was when it was pickled first: a function; or True, if
            :func:`again` does, given this pickle and its tensors. See csrc/python/by_value.h.
    """

    by_value: Callable[[], Pickled] | Literal[True] = True


# What messages refer to by name: module-level functions, which every pickler sends by reference.


def _receive_tensor(index: int) -> Tensor:
    tensor: Tensor = _torch_api.tensor_tables.recv_tables[index]
    return tensor


def _receive_storage(index: int) -> UntypedStorage:
    return _receive_tensor(index).untyped_storage()


def _receive_typed_storage(storage: UntypedStorage, dtype: torch.dtype) -> TypedStorage:
    return _torch_api.typed_storage(storage, dtype)


def _receive_rref(index: int) -> Any:
    assert _receiving.rrefs is not None
    fork = _receiving.rrefs[index]
    return _torch_api.rref_of_fork(fork) if isinstance(fork, tuple) else fork


def _receive_script_module(data: bytes) -> Any:
    return torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]


def _fail(kind: type[Exception], text: str) -> None:
    raise kind(text)


def _load(data: bytes, forks: list[Any], names_main: bool) -> Any:
    with _tables(_receiving, rrefs=forks):
        if names_main and (missing := _missing_name(data)):
            for index in range(len(forks)):
                _receive_rref(index)  # taken up and let go of: the second attempt has forks of its own
            return MissingInMain(missing)
        return pickle.loads(data)


def missing_in_main(result: BaseException, data: bytes) -> str | None:
    """What to tell the caller for a second attempt, if that helps: called where ``data`` unpickled to an exception."""
    if isinstance(result, MissingInMain):
        return str(result)
    return _missing_name(data) if data.endswith(_C.RESENDABLE) else None


def again(data: bytes, tensors: list[Tensor]) -> Pickled:
    """Pickles a call by value that was pickled as ``data``, with these tensors and no RRefs."""
    current = _torch_api.DEFAULT_PICKLER.current
    return (current if isinstance(current, RpcPickler) else RpcPickler()).again(data, tensors, [])


def _missing_name(data: bytes) -> str | None:
    """The error for a name in the pickle that ``__main__`` does not have here, if there is one."""
    texts: list[str | None] = []  # those pushed, the last ones last
    memo: dict[int, str | None] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PROTO", "FRAME"):
            continue
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else None
            continue
        if opcode.name in ("BINGET", "LONG_BINGET"):
            texts.append(memo.get(int(argument or 0)))
            continue
        if opcode.name == "STACK_GLOBAL" and texts[-2:-1] == ["__main__"]:
            target: Any = sys.modules["__main__"]
            for part in str(texts[-1]).split("."):
                if not hasattr(target, part):
                    return f"Can't get attribute {texts[-1]!r} on {sys.modules['__main__']}"
                target = getattr(target, part)
        texts.append(argument if isinstance(argument, str) else None)
    return None


@contextmanager
def _tables(side: threading.local, **tables: list[Any] | bool) -> Iterator[None]:
    """Sets tables of this thread, ours or torch's; unpickling may pickle, so they nest."""
    before = {name: getattr(side, name, _MISSING) for name in tables}
    for name, table in tables.items():
        setattr(side, name, table)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is _MISSING:
                delattr(side, name)
            else:
                setattr(side, name, value)


def _out_of_band(tensor: Tensor) -> int:
    assert _sending.tensors is not None
    if (why := _C.why_not_sent(tensor, _sending.is_call)) is not None:
        raise TypeError(why)
    _sending.tensors.append(tensor)
    return len(_sending.tensors) - 1


def _reduce_tensor(tensor: Tensor) -> tuple[Any, ...]:
    return _receive_tensor, (_out_of_band(tensor),)


def _reduce_storage(storage: UntypedStorage) -> tuple[Any, ...]:
    # Among the message's tensors, those of the same storage share it at the receiver too.
    return _receive_storage, (_out_of_band(_C.bytes_of_storage(storage)),)


def _reduce_typed_storage(storage: TypedStorage) -> tuple[Any, ...]:
    return _receive_typed_storage, (_torch_api.untyped_storage_of(storage), storage.dtype)


def _reduce_rref(rref: Any) -> tuple[Any, ...]:
    assert _sending.rrefs is not None
    _sending.rrefs.append(rref)
    return _receive_rref, (len(_sending.rrefs) - 1,)


def _reduce_script_module(module: torch.jit.ScriptModule) -> tuple[Any, ...]:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return _receive_script_module, (buffer.getvalue(),)


def _refuse(obj: Any) -> tuple[Any, ...]:
    raise TypeError(f"cannot pickle {_unsendable.name_of(type(obj))!r} object")  # as Python words it


_OURS: dict[type, Callable[[Any], Any]] = {
    Tensor: _reduce_tensor,
    UntypedStorage: _reduce_storage,
    TypedStorage: _reduce_typed_storage,
    _torch_api.PyRRef: _reduce_rref,
    rpc.RRef: _reduce_rref,
    internal.RemoteException: _remote_errors.reduce,
    # cloudpickle would send an open file as a StringIO of what is in it (and sys.stdout as that of the callee), and a
    # memoryview as bytes.
    io.TextIOWrapper: _refuse,
    memoryview: _refuse,
}


class _ByValue(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, which sends all of ``__main__`` by value, unless its names are to be tried by reference."""

    def __init__(self, file: io.BytesIO, reducers: dict[type, Callable[[Any], Any]], main_by_name: bool) -> None:
        super().__init__(file)
        self._reducers = reducers
        self._main_by_name = main_by_name

    def dump(self, obj: Any) -> None:
        try:
            super().dump(obj)
        except pickle.PicklingError as error:
            if isinstance(error.__cause__, RecursionError):
                raise error.__cause__ from None
            raise

    def reducer_override(self, obj: Any) -> Any:
        reduce = self._reducers.get(type(obj))
        if reduce is None and isinstance(obj, torch.jit.ScriptModule):
            reduce = _reduce_script_module
        if reduce is None and self._main_by_name and _is_name_of_main(obj):
            return NotImplemented
        return super().reducer_override(obj) if reduce is None else reduce(obj)


def _is_name_of_main(obj: Any) -> bool:
    if not isinstance(obj, (FunctionType, type)) or obj.__module__ != "__main__":
        return False
    target: Any = sys.modules["__main__"]
    for part in obj.__qualname__.split("."):
        target = getattr(target, part, None)
    return target is obj


class RpcPickler(_torch_api.InternalRPCPickler):  # type: ignore[misc]
    """Pickles what goes to other workers.

    Args:
        always_by_value: whether to use cloudpickle for everything (``pickler="cloudpickle"``), not only for what
            Python's own pickle cannot send (``pickler="auto"``). Either sends importable names by reference.
    """

    def __init__(self, always_by_value: bool = False) -> None:
        super().__init__()
        self.always_by_value = always_by_value
        # Other parts of torch register theirs (RemoteModule) with the one instance that they know.
        self._registered = (copyreg.dispatch_table, *map(_torch_api.reducers_of, (_torch_api.torchs_pickler, self)))
        self.plain = _C.PlainPickler(list(self._registered))
        self._table: dict[type, Callable[[Any], Any]] = {}
        self._table_of = (0, 0, 0)  # how many reducers of each origin there were when it was made; none is ever removed

    def serialize(self, obj: Any) -> Pickled:
        """Pickles a call (a ``PythonUDF``) or a result, with its tensors apart.

        Raises:
            TypeError, AttributeError, RuntimeError or pickle.PicklingError: something in it cannot be sent; the text
                names it and the path to it.
            RecursionError: it is nested too deeply.
        """
        if self.always_by_value:
            return self._by_value(obj)
        if isinstance(obj, internal.PythonUDF):
            return self.serialize_call(obj, self.plain.dump_call(obj))
        try:  # plain results do not come here: see csrc/python/function_runner.cpp
            data, tensors, rrefs = self._by_reference(obj)
        except RecursionError:
            raise  # by value it would go no deeper
        except Exception:
            return self._by_value(obj)
        return _complete(data, rrefs, False), tensors

    def serialize_call(self, call: Any, plain: _Parts | None) -> Pickled:
        """The same of a call, given what :attr:`plain` has made of it: its pickle, or None if that cannot."""
        try:
            data, tensors, rrefs = plain or self._by_reference(call)
        except RecursionError:
            raise
        except Exception:
            data, tensors, rrefs = self._dump_by_value(call, main_by_name=True)
        if _MAIN not in data:
            return _complete(data, rrefs, False), tensors
        message = Resendable(_complete(data, rrefs, True))
        if rrefs or len(data) > _KEPT_IN_COPY:
            message.by_value = lambda: self.again(data, tensors, rrefs)
        return message, tensors

    def _reducers(self, obj: Any) -> dict[type, Callable[[Any], Any]]:
        pythons, torchs, mine = self._registered
        origin = (len(pythons), len(torchs), len(mine))
        if self._table_of != origin:
            self._table = {**pythons, **_OURS, **torchs, **mine}
            self._table_of = origin
        if isinstance(obj, torch.jit.ScriptModule):
            return {**self._table, type(obj): _reduce_script_module}
        return self._table

    def _by_reference(self, obj: Any) -> _Parts:
        tensors: list[Tensor] = []
        rrefs: list[Any] = []
        buffer = io.BytesIO()
        pickler = pickle.Pickler(buffer)
        pickler.dispatch_table = self._reducers(obj)
        with _tables(_sending, tensors=tensors, rrefs=rrefs, is_call=isinstance(obj, internal.PythonUDF)):
            pickler.dump(obj)
        return buffer.getvalue(), tensors, rrefs

    def _by_value(self, obj: Any) -> Pickled:
        data, tensors, rrefs = self._dump_by_value(obj, main_by_name=False)
        return _complete(data, rrefs, False), tensors

    def _dump_by_value(self, obj: Any, main_by_name: bool) -> _Parts:
        is_call = isinstance(obj, internal.PythonUDF)
        try:
            return self._dump(obj, main_by_name, is_call)
        except RecursionError:
            raise  # as Python raises it; there is no path that anybody would read
        except Exception as error:
            raise _unsendable.explain(obj, error, lambda part: self._dump(part, main_by_name, is_call)) from error

    def _dump(self, obj: Any, main_by_name: bool, is_call: bool) -> _Parts:
        tensors: list[Tensor] = []
        rrefs: list[Any] = []
        buffer = io.BytesIO()
        with _tables(_sending, tensors=tensors, rrefs=rrefs, is_call=is_call):
            _ByValue(buffer, self._reducers(obj), main_by_name).dump(obj)
        return buffer.getvalue(), tensors, rrefs

    def again(self, data: bytes, tensors: list[Tensor], rrefs: list[Any]) -> Pickled:
        """Pickles a call by value that was pickled as ``data``, with these tensors and RRefs."""
        try:
            with _tables(_receiving, rrefs=rrefs), _tables(_torch_api.tensor_tables, recv_tables=tensors):
                obj = pickle.loads(data)
            return self._by_value(obj)
        except Exception as error:
            # The call that goes out is one that brings the error back, of the same type.
            return self._by_value(internal.PythonUDF(_fail, (type(error), str(error)), {}))


def _complete(data: bytes, rrefs: list[Any], names_main: bool) -> bytes:
    """The message: `data`, around it what `_load` needs, if it needs anything. Forks the RRefs."""
    if not rrefs:
        return data + _C.RESENDABLE if names_main else data
    forks = [_torch_api.fork_rref(rref) for rref in rrefs]
    _C.forks_made([_torch_api.id_of_fork(fork) for fork in forks])
    return pickle.dumps(_Loader(data, forks, names_main))


class _Loader:
    """Pickles as a call of `_load`."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, self._arguments
