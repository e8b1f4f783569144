"""Finds what in an object cannot be pickled, for the error that names it."""

from __future__ import annotations

import contextlib
import pickle
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.distributed.rpc import internal

from . import _C

# Objects looked at: enough for any error that a person will read, and an end for graphs without one.
_BUDGET = 2000


def explain(obj: Any, error: Exception, dump: Callable[[Any], object]) -> Exception:
    """Makes the error for ``obj``, whose pickling failed with ``error``.

    Args:
        obj: a ``PythonUDF``, or a result.
        error: what pickling raised.
        dump: pickles an object, to see whether it can be.

    Returns:
        An exception of the same type if it can be made of a text, and that text has the path of the culprit, such as
        ``args[0].config.lock``.
    """
    if isinstance(obj, internal.PythonUDF):
        roots = [("function", obj.func), *_items("args", obj.args), *_entries("kwargs", obj.kwargs)]
    else:
        roots = [("result", obj)]
    whole = ("the call" if len(roots) > 1 else "the result", obj)
    try:
        path, culprit = _search(roots, dump, set(), [_BUDGET]) or whole
    except RecursionError:
        path, culprit = whole
    # A tensor that pickles in a way of its own, and fails, may have nothing to send in the first place.
    why = _C.why_not_sent(culprit, True) if isinstance(culprit, Tensor) else None
    text = f"{path} (of type {name_of(type(culprit))}) cannot be sent to another worker: {why or error}"
    try:
        return type(error)(text)
    except Exception:  # a type that takes other arguments
        return pickle.PicklingError(text)


def name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _search(
    candidates: list[tuple[str, Any]], dump: Callable[[Any], object], seen: set[int], budget: list[int]
) -> tuple[str, Any] | None:
    for path, candidate in candidates:
        if id(candidate) in seen or budget[0] <= 0:
            continue
        seen.add(id(candidate))
        budget[0] -= 1
        try:
            dump(candidate)
        except Exception:
            return _search(list(_parts(path, candidate)), dump, seen, budget) or (path, candidate)
    return None


def _items(path: str, sequence: Any) -> Iterator[tuple[str, Any]]:
    for index, value in enumerate(sequence):
        yield f"{path}[{index}]", value


def _entries(path: str, mapping: Any) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        yield f"{path}[{key!r}]", value


def _parts(path: str, obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, with the paths by which a user knows it."""
    if isinstance(obj, Tensor) and type(obj).__module__.partition(".")[0] == "torch":
        return  # torch knows what is inside of its own
    if isinstance(obj, dict):
        yield from _entries(path, obj)
    elif isinstance(obj, tuple) and hasattr(obj, "_fields"):
        yield from ((f"{path}.{field}", value) for field, value in zip(obj._fields, obj, strict=True))
    elif isinstance(obj, (list, tuple, set, frozenset)):
        yield from _items(path, obj)
    elif isinstance(obj, types.MethodType):
        yield f"{path}.__self__", obj.__self__
    elif isinstance(obj, types.FunctionType):
        for name, cell in zip(obj.__code__.co_freevars, obj.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # it has no value yet
                yield f"{path}'s variable {name!r}", cell.cell_contents
        yield from _items(f"{path}.__defaults__", obj.__defaults__ or ())
        for name in obj.__code__.co_names:
            if name in obj.__globals__:
                yield f"{path}'s global {name!r}", obj.__globals__[name]
    else:
        for name in _attributes(obj):
            with contextlib.suppress(Exception):  # the object's own code may refuse
                yield f"{path}.{name}", getattr(obj, name)


def _attributes(obj: Any) -> list[str]:
    names: list[str] = []
    with contextlib.suppress(Exception):
        names += vars(obj)
    for kind in type(obj).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    return names
