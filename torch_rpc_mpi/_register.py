"""Makes backend ``"MPI"`` known to ``torch.distributed.rpc``.

``autoload`` is the ``torch.backends`` entry point: torch calls it at the end of ``import torch``, in every process of
every environment where the package is installed. Hence the rules of this module: it imports neither mpi4py nor the
extension, nothing outside the standard library before torch itself is there, and it never raises.
"""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _hints

if TYPE_CHECKING:
    from ._torch_api import RpcAgent
    from .options import MPIRpcBackendOptions

BACKEND_NAME = "MPI"
RENDEZVOUS_SCHEME = "mpi"

logger = logging.getLogger("torch_rpc_mpi")

# This package's: testing.py adds one.
_ours = {BACKEND_NAME}

# Set on our init_rpc; survives functools.wraps of a package that wraps it again.
_WRAPPER_MARK = "_torch_rpc_mpi_wrapper"


def autoload() -> None:
    """Registers the backend. An error is logged, because raising it would break ``import torch``.

    Safe to call twice, and while ``import torch_rpc_mpi`` or ``import torch`` is still under way.
    """
    try:
        register()
    except Exception:
        logger.warning(
            'torch_rpc_mpi could not register backend "MPI" with torch.distributed.rpc; everything else of torch works '
            "as before. Check that this torch is the one that torch_rpc_mpi was installed for.",
            exc_info=True,
        )


def register() -> None:
    """Registers the backend, its ``mpi://`` rendezvous and our ``init_rpc``; does nothing where torch has no RPC."""
    rpc = _rpc_module()
    if rpc is None:
        return
    from . import _exit, _torch_api  # noqa: F401 (see Note [The order at exit] in _exit)

    registry = rpc.backend_registry
    if not registry.backend_registered(BACKEND_NAME):
        registry.register_backend(BACKEND_NAME, _construct_options, _init_backend)
    elif not is_registered():
        logger.warning(
            'another package has registered an RPC backend "MPI" before torch_rpc_mpi (%s); torch_rpc_mpi stays '
            "inactive. Uninstall one of the two.",
            registry.BackendType[BACKEND_NAME].value,
        )
        return
    _register_rendezvous()
    _synchronize_backend_type(rpc)
    _hints.watch_spawned_child()
    if not hasattr(rpc.init_rpc, _WRAPPER_MARK):
        _torch_api.INIT_RPC.set(_wrap_init_rpc(rpc.init_rpc))


def register_further(
    name: str, construct_options: Callable[..., MPIRpcBackendOptions], init_backend: Callable[..., RpcAgent]
) -> None:
    """Registers another backend of this package, which ``init_rpc`` treats as it does ``"MPI"``."""
    import torch.distributed.rpc as rpc

    registry: Any = rpc.backend_registry
    if not registry.backend_registered(name):
        registry.register_backend(name, construct_options, init_backend)
        _synchronize_backend_type(rpc)
    _ours.add(name)


def is_registered() -> bool:
    """Whether torch's backend ``"MPI"`` is this package's."""
    rpc = _rpc_module()
    if rpc is None or not rpc.backend_registry.backend_registered(BACKEND_NAME):
        return False
    handler = rpc.backend_registry.BackendType[BACKEND_NAME].value.init_backend_handler
    # By name, because the package may have been imported a second time (a test that cleared sys.modules).
    return getattr(handler, "__module__", None) == __name__


def _rpc_module() -> ModuleType | None:
    import torch.distributed

    if not torch.distributed.is_available():
        return None
    import torch.distributed.rpc as rpc

    return rpc if rpc.is_available() else None


def _construct_options(*args: Any, **kwargs: Any) -> MPIRpcBackendOptions:
    from . import backend

    return backend.construct_options(*args, **kwargs)


def _init_backend(*args: Any, **kwargs: Any) -> RpcAgent:
    from . import backend

    return backend.init_backend(*args, **kwargs)


def _rendezvous(url: str, **kwargs: Any) -> Any:
    from ._rendezvous import rendezvous

    return rendezvous(url, **kwargs)


def _register_rendezvous() -> None:
    # From the module, not from torch.distributed, where a function of the same name hides it.
    from torch.distributed.rendezvous import register_rendezvous_handler

    from . import _torch_api

    if not _torch_api.has_rendezvous_handler(RENDEZVOUS_SCHEME):
        register_rendezvous_handler(RENDEZVOUS_SCHEME, _rendezvous)  # type: ignore[no-untyped-call]


def _synchronize_backend_type(rpc: ModuleType) -> None:
    from . import _torch_api

    # register_backend() builds a new enum and rebinds it in backend_registry only. With the old one in rpc, even a
    # plain TensorPipe init_rpc() fails, because its default backend is no member of the new enum.
    _torch_api.BACKEND_TYPE.set(rpc.backend_registry.BackendType)


def _current_member(rpc: ModuleType, backend: Any) -> Any:
    """The member of today's BackendType for one that was obtained before somebody registered another backend."""
    registry = rpc.backend_registry
    if (
        isinstance(backend, enum.Enum)
        and isinstance(backend.value, registry.BackendValue)
        and registry.backend_registered(backend.name)
    ):
        return registry.BackendType[backend.name]
    return backend


def _wrap_init_rpc(original: Callable[..., None]) -> Callable[..., None]:
    """Torch's ``init_rpc`` that also knows backend ``"MPI"`` by name and takes rank and world size from MPI."""

    @functools.wraps(original)
    def init_rpc(
        name: Any,
        backend: Any = None,
        rank: Any = -1,
        world_size: Any = None,
        rpc_backend_options: Any = None,
    ) -> None:
        import torch.distributed.rpc as rpc

        _synchronize_backend_type(rpc)
        backend = _current_member(rpc, backend)
        ours = _which_of_ours(backend, rpc_backend_options)
        if ours is not None:
            from . import backend as implementation

            backend = rpc.backend_registry.BackendType[ours]
            name, rank, world_size, rpc_backend_options = implementation.prepare(
                name, rank, world_size, rpc_backend_options
            )
        else:
            _hints.check_name(backend, _ours)
        try:
            original(name, backend=backend, rank=rank, world_size=world_size, rpc_backend_options=rpc_backend_options)
        except ValueError as error:
            if ours is None:
                _hints.explain_forgotten_backend(error)
            raise

    setattr(init_rpc, _WRAPPER_MARK, True)
    return init_rpc


def _which_of_ours(backend: Any, options: Any) -> str | None:
    if backend is None:
        from .options import MPIRpcBackendOptions

        return BACKEND_NAME if isinstance(options, MPIRpcBackendOptions) else None
    name = backend.name if isinstance(backend, enum.Enum) else backend
    return name if isinstance(name, str) and name in _ours else None  # any other string stays torch's TypeError
