"""MPI as a backend of ``torch.distributed.rpc``.

Installing the package is enough: ``import torch`` registers backend ``"MPI"``, so that
``torch.distributed.rpc.init_rpc(name, backend="MPI")`` works as written. Importing this package does the same where
torch's plug-in loading is switched off (``TORCH_DEVICE_BACKEND_AUTOLOAD=0``).

Neither import loads MPI or the extension; the first ``init_rpc`` of backend ``"MPI"`` does.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING

import torch  # noqa: F401  (the extension needs torch's libraries loaded; without torch this is the clear error)

from . import _register

if TYPE_CHECKING:
    from ._devices import register_device_runtime
    from .calls import remote, rpc_async, rpc_sync
    from .faults import on_worker_lost, write_flight_record
    from .functions import as_asyncio
    from .options import MPIRpcBackendOptions

__all__ = [
    "MPIRpcBackendOptions",
    "__version__",
    "as_asyncio",
    "is_available",
    "on_worker_lost",
    "register_device_runtime",
    "remote",
    "rpc_async",
    "rpc_sync",
    "write_flight_record",
]

_LAZY = {
    "MPIRpcBackendOptions": "options",
    "as_asyncio": "functions",
    "on_worker_lost": "faults",
    "register_device_runtime": "_devices",
    "remote": "calls",
    "rpc_async": "calls",
    "rpc_sync": "calls",
    "write_flight_record": "faults",
}

__version__ = "0.1.0"


def is_available() -> bool:
    """Whether backend ``"MPI"`` is registered with torch and its parts are installed.

    Looks only: whether mpi4py then finds an MPI library shows when ``init_rpc`` loads it.
    """
    return _register.is_registered() and all(
        importlib.util.find_spec(name) is not None for name in ("torch_rpc_mpi._C", "mpi4py")
    )


def __getattr__(name: str) -> object:
    # Lazy, because `import torch` runs this file in every process, RPC or not.
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register.autoload()
