"""Exceptions of remote functions: what is sent of them, and what is raised of that.

An exception travels as torch's ``RemoteException``: its type, and a text that says where it was raised and shows its
traceback. torch raises it again as ``exception_type(msg.encode("utf-8").decode("unicode_escape"))``.
"""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import cloudpickle
from torch.distributed.rpc import internal

from . import _torch_api


class FunctionMissingError(AttributeError, RuntimeError):
    """The callee lacks a name: what torch's ``to_here()`` and its ``rpc_sync`` raise then, in one."""


def describe(error: BaseException, whereabouts: str, with_traceback: bool = True) -> Any:
    """Makes what is sent of an exception.

    Args:
        error: the exception.
        whereabouts: who and where this worker is.
        with_traceback: whether to show its traceback, and those of the exceptions that it was raised from.

    Returns:
        A ``RemoteException``.
    """
    formatted = traceback.TracebackException.from_exception(error)
    what = "".join(formatted.format_exception_only())
    text = f"On {whereabouts}:\n{what}"
    if with_traceback:
        # The exception is the last thing that a traceback shows. Once is enough: each worker that an error passes
        # through would double its length.
        text += "\n" + "".join(formatted.format()).removesuffix(what)
    return of_type(type(error), text)


def pass_on(remote: Any, whereabouts: str) -> Any:
    """Makes what is sent of an exception that another worker has sent here."""
    return of_type(remote.exception_type, f"On {whereabouts}:\n{text_of(remote)}")


def of_type(kind: type[BaseException], text: str) -> Any:
    """Makes the ``RemoteException`` of which an exception of this type and with exactly this text is raised."""
    return internal.RemoteException(_escaped(text), kind)


def text_of(remote: Any) -> str:
    """The text with which a ``RemoteException`` is raised."""
    return str(_readable(remote).msg.encode("utf-8").decode("unicode_escape"))


def raise_again(remote: Any) -> None:
    """Raises the exception."""
    _torch_api.handle_exception(_readable(remote))


def short_text(kind: type[BaseException], value: Any) -> str:
    """Type and text of an exception that was raised here, on the way to becoming part of another text."""
    if not isinstance(value, BaseException):  # not made yet
        return f"{kind.__qualname__}: {value}"
    return "".join(traceback.format_exception_only(kind, value)).strip()


def reduce(remote: Any) -> tuple[Any, ...]:
    """Pickles a ``RemoteException`` such that it arrives even where its type does not."""
    return _receive, (remote.msg, _pickled(remote.exception_type))


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def _readable(remote: Any) -> Any:
    """What torch can read: its own workers (TensorPipe's) do not escape the text that they send."""
    try:
        if remote.msg.isascii():
            remote.msg.encode("utf-8").decode("unicode_escape")
            return remote
    except UnicodeDecodeError:
        pass
    return of_type(remote.exception_type, remote.msg)


def _pickled(kind: type[BaseException]) -> bytes | None:
    for dumps in (pickle.dumps, cloudpickle.dumps):
        try:
            return bytes(dumps(kind))
        except Exception:  # by value, then; and if it cannot be sent at all, the text tells
            continue
    return None


def _receive(msg: str, pickled: bytes | None) -> Any:
    """What :func:`reduce` pickled, here a ``RuntimeError`` if the type is not to be had or would drop the text."""
    kind: Any = RuntimeError
    if pickled is not None:
        try:
            kind = pickle.loads(pickled)
        except Exception:  # whatever importing its module raises
            kind = RuntimeError
    remote = internal.RemoteException(msg, kind)
    text = text_of(remote)
    try:
        error = kind(text)
    except Exception:  # torch says that it cannot be made
        return remote
    keeps_text = isinstance(error, Exception) and (text in error.args or text in str(error))
    return remote if keeps_text else internal.RemoteException(msg, RuntimeError)
