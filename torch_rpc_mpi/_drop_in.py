"""The switch by which requests for TensorPipe are served by backend ``"MPI"``, for programs that do not know of it.

It is on where the environment says so, as ``python -m torch_rpc_mpi`` has it do for the program, and for the processes
that this starts; else nothing here is in use. What such a request then means is in ``_tensorpipe``.

Imported at the end of ``import torch``, and so without anything but the standard library.
"""

from __future__ import annotations

import enum
import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("torch_rpc_mpi")

VARIABLE = "TORCH_RPC_MPI_DROP_IN"
TENSORPIPE = "TENSORPIPE"  # torch's name of the backend

_MARK = "_torch_rpc_mpi_drop_in"  # on what stands in torch's places
_WIRES = "_torch_rpc_mpi_wires"

_told: set[str] = set()


def is_on(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether requests for TensorPipe are MPI's."""
    value = environ.get(VARIABLE, "")
    if value not in ("", "0", "1", *_told):
        _told.add(value)
        logger.warning(
            '%s=%r has no meaning, so that TensorPipe stays TensorPipe: 1 switches backend "MPI" on for it, 0 or '
            "nothing off",
            VARIABLE,
            value,
        )
    return value == "1"


def switch_on() -> None:
    """For this process, in which ``torch_rpc_mpi`` is registered, and those that it starts."""
    os.environ[VARIABLE] = "1"
    replace_in_torch()


def asks_for_tensorpipe(backend: Any, options: Any) -> bool:
    """Whether arguments of ``init_rpc`` mean TensorPipe, which is torch's default."""
    import torch.distributed.rpc as rpc

    if backend is None:
        return options is None or isinstance(options, rpc.TensorPipeRpcBackendOptions)
    return isinstance(backend, enum.Enum) and backend.name == TENSORPIPE


def replace_in_torch() -> None:
    """What ``init_rpc`` alone cannot see to: calls past it, and options that cannot be read once they are made."""
    from . import _torch_api

    for place, wrap in (
        (_torch_api.INIT_BACKEND, _wrap_init_backend),
        (_torch_api.TENSORPIPE_OPTIONS_INIT, _wrap_options_init),
    ):
        if not hasattr(place.current, _MARK):
            wrapper = wrap(place.current)
            setattr(wrapper, _MARK, True)
            place.set(wrapper)


def _wrap_init_backend(torchs: Callable[..., Any]) -> Callable[..., Any]:
    """What makes the agent of every backend: ``init_rpc`` ends there, and some call it by themselves."""

    @functools.wraps(torchs)
    def init_backend(backend: Any, *args: Any, **kwargs: Any) -> Any:
        if not (is_on() and asks_for_tensorpipe(backend, None)):
            return torchs(backend, *args, **kwargs)
        from . import _tensorpipe

        return _tensorpipe.init_backend(*args, **kwargs)

    return init_backend


def _wrap_options_init(torchs: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(torchs)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        torchs(self, *args, **kwargs)
        setattr(self, _WIRES, [name for name in ("_transports", "_channels") if kwargs.get(name)])

    return __init__


def wires_of(options: Any) -> list[str]:
    """Which of TensorPipe's ways to reach others were given to options, that do not show them themselves."""
    names: list[str] = getattr(options, _WIRES, [])
    return names
