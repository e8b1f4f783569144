"""What TensorPipe's options and agent are to backend ``"MPI"``, where ``_drop_in`` gives it TensorPipe's requests."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed.rpc as rpc
from torch.distributed.constants import default_pg_timeout

from . import _drop_in, _launch, backend
from ._option_checks import Option
from ._rendezvous import DEFAULT_URL
from ._torch_api import DEFAULT_NUM_WORKER_THREADS, DEFAULT_RPC_TIMEOUT, RpcBackendOptions, Store
from .options import MPIRpcBackendOptions

if TYPE_CHECKING:
    from ._torch_api import RpcAgent


logger = logging.getLogger("torch_rpc_mpi")


def _any(option: Option, value: object) -> object:
    return value


# torch waits so long for the others of a group. A program that was written for that may come late to init_rpc.
_PATIENCE = default_pg_timeout.total_seconds()
_INIT_TIMEOUT = MPIRpcBackendOptions.table["init_timeout"]
_ORIGINAL = Option("original", "TensorPipeRpcBackendOptions", None, "", "What the program has given.", _any)


def init_timeout() -> float:
    """Seconds that a program waits for the others which does not know of our option of this name."""
    return MPIRpcBackendOptions().init_timeout if _INIT_TIMEOUT.environment in os.environ else _PATIENCE


class TranslatedOptions(MPIRpcBackendOptions):
    """The options that do what TensorPipe's say, which are kept for those who ask the agent for them."""

    table: ClassVar = MPIRpcBackendOptions.table | {_ORIGINAL.name: _ORIGINAL}

    original: rpc.TensorPipeRpcBackendOptions

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)


def translated(options: Any, rank: Any, world_size: Any) -> TranslatedOptions:
    """The options of a request for TensorPipe, with its place in the group.

    Raises:
        TypeError: they are not TensorPipe's.
        ValueError: the request is one that backend "MPI" cannot serve.
    """
    if not world_size:
        raise ValueError(
            "init_rpc was called without world_size, which means a dynamic group to TensorPipe: one whose workers come "
            'and go. Here backend "MPI" serves TensorPipe\'s requests, and its groups are static. Give init_rpc the '
            "number of workers as world_size, or run this program over TensorPipe."
        )
    if options is None:
        options = rpc.TensorPipeRpcBackendOptions()
    if not isinstance(options, RpcBackendOptions):
        raise TypeError("Argument rpc_backend_options must be an instance of RpcBackendOptions")
    if not isinstance(options, rpc.TensorPipeRpcBackendOptions):
        raise TypeError(f"`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`. {options}")
    if rank == 0 and (wires := _drop_in.wires_of(options)):
        logger.warning(
            "torch_rpc_mpi: %s of TensorPipeRpcBackendOptions are ignored: this program's RPC goes over MPI, which "
            "chooses itself how it reaches each worker",
            " and ".join(wires),
        )
    # What the program leaves to torch is left to this backend's defaults, and so to its environment variables.
    given = {
        "num_worker_threads": _unless(DEFAULT_NUM_WORKER_THREADS, options.num_worker_threads),
        "rpc_timeout": _unless(DEFAULT_RPC_TIMEOUT, options.rpc_timeout),
        "init_method": _init_method(options.init_method, rank, world_size),
        "init_timeout": init_timeout(),
        "device_maps": options.device_maps,
        "devices": options.devices,
    }
    return TranslatedOptions(**{name: value for name, value in given.items() if value is not None}, original=options)


def _unless(default: Any, value: Any) -> Any:
    return None if value == default else value


def _init_method(given: str, rank: Any, world_size: Any) -> str:
    """Where a launcher brings the ranks together they need no address, and one such as localhost may be wrong."""
    place = backend.integer("rank", -1 if rank is None else rank), backend.integer("world_size", world_size)
    if not _launch.through_store(*_launch.complete(*place)):
        return DEFAULT_URL
    return backend.without_torchs_default(given)


def init_backend(
    store: Store, name: str, rank: int, world_size: int | None, rpc_backend_options: RpcBackendOptions
) -> RpcAgent:
    """What backend TENSORPIPE's handler is to torch."""
    options = translated(rpc_backend_options, rank, world_size)
    return backend.init_backend(store, name, rank, world_size, options)
