"""What is private in torch, and the places where its functions are replaced: no other module touches either.

What is relied on, and that it is so, tests/unit/test_torch_api.py says name by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed.rpc as rpc
from torch._C import Future as Future
from torch._C import _distributed_rpc
from torch._C._distributed_c10d import FileStore as FileStore
from torch._C._distributed_c10d import HashStore as HashStore
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store
from torch._C._distributed_c10d import TCPStore as TCPStore
from torch._C._distributed_rpc import PyRRef as PyRRef
from torch._C._distributed_rpc import RpcAgent as RpcAgent
from torch._C._distributed_rpc import RpcBackendOptions as RpcBackendOptions
from torch._C._distributed_rpc import TensorPipeAgent as TensorPipeAgent
from torch._C._distributed_rpc import WorkerInfo as WorkerInfo
from torch.distributed.rendezvous import _rendezvous_handlers
from torch.distributed.rpc import api, backend_registry, internal
from torch.storage import TypedStorage, UntypedStorage


class Place(NamedTuple):
    """A name of a module or class of torch, where torch looks for it at each use."""

    owner: Any
    name: str

    @property
    def namespace(self) -> Any:
        """Where torch looks for it: a dict by name."""
        return vars(self.owner)

    @property
    def current(self) -> Any:
        return self.namespace[self.name]

    def set(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


class Replacements:
    """What stands in torch's places until :meth:`undo`."""

    def __init__(self) -> None:
        self._made: list[tuple[Place, Any, Any]] = []

    def make(self, ours: dict[Place, Any]) -> None:
        for place, value in ours.items():
            self._made.append((place, value, place.current))
            place.set(value)

    def undo(self) -> None:
        for place, ours, torchs in self._made:
            if place.current is ours:  # not if somebody has put theirs in its place since
                place.set(torchs)
        self._made.clear()


# Registration
BACKEND_TYPE = Place(rpc, "BackendType")
INIT_RPC = Place(rpc, "init_rpc")
INIT_BACKEND = Place(backend_registry, "init_backend")
TENSORPIPE_OPTIONS_INIT = Place(rpc.TensorPipeRpcBackendOptions, "__init__")

# Calls
INVOKE_RPC = Place(api, "_invoke_rpc")
INVOKE_RPC_BUILTIN = Place(api, "_invoke_rpc_builtin")
INVOKE_RPC_PYTHON_UDF = Place(api, "_invoke_rpc_python_udf")
INVOKE_RPC_TORCHSCRIPT = Place(api, "_invoke_rpc_torchscript")
INVOKE_REMOTE_BUILTIN = Place(api, "_invoke_remote_builtin")
INVOKE_REMOTE_PYTHON_UDF = Place(api, "_invoke_remote_python_udf")
INVOKE_REMOTE_TORCHSCRIPT = Place(api, "_invoke_remote_torchscript")
TO_WORKER_INFO = Place(api, "_to_worker_info")
DEFAULT_PICKLER = Place(api, "_default_pickler")
INTERNAL_RPC_PICKLER = Place(api, "_internal_rpc_pickler")

# Futures and RRefs
FUTURE_ADD_DONE_CALLBACK = Place(Future, "add_done_callback")
FUTURE_THEN = Place(Future, "then")
FUTURE_WAIT = Place(Future, "wait")
RREF_LOCAL_VALUE = Place(PyRRef, "local_value")
RREF_TO_HERE = Place(PyRRef, "to_here")

# Shutdown
ALL_GATHER = Place(api, "_all_gather")
ALL_GATHER_SEQUENCE_ID = Place(api, "_all_gather_sequence_id")
ALL_GATHER_STATES = Place(api, "_all_gather_sequence_id_to_states")
DELETE_RREFS = Place(api, "_delete_all_user_and_unforked_owner_rrefs")
WAIT_ALL_WORKERS = Place(api, "_wait_all_workers")

# Rendezvous. The module; a function of the same name hides it in torch.distributed.
RENDEZVOUS_TCP_STORE = Place(sys.modules["torch.distributed.rendezvous"], "TCPStore")

# The rest is used as it is.
ASYNC_EXECUTION = "_wrapped_async_rpc_function"
DEFAULT_INIT_METHOD = _distributed_rpc._DEFAULT_INIT_METHOD
DEFAULT_NUM_WORKER_THREADS = _distributed_rpc._DEFAULT_NUM_WORKER_THREADS
DEFAULT_RPC_TIMEOUT = _distributed_rpc._DEFAULT_RPC_TIMEOUT_SEC
AllGatherStates: Any = api.AllGatherStates
InternalRPCPickler: Any = internal._InternalRPCPickler
enable_rpc_profiler: Callable[..., Any] = api._enable_rpc_profiler
builtin_names: Callable[[], dict[int, str]] = torch.jit._builtins._get_builtin_table
find_builtin: Callable[[Any], str | None] = torch.jit._builtins._find_builtin
get_current_rpc_agent = _distributed_rpc._get_current_rpc_agent
handle_exception: Callable[[Any], None] = internal._handle_exception
is_current_rpc_agent_set = _distributed_rpc._is_current_rpc_agent_set
qualified_name: Callable[[Any], str] = torch._jit_internal._qualified_name
require_initialized = api._require_initialized
reset_current_rpc_agent: Callable[[], None] = _distributed_rpc._reset_current_rpc_agent
should_profile: Callable[[], bool] = api._get_should_profile
tensor_tables = internal._thread_local_tensor_tables
torchs_pickler: Any = internal._internal_rpc_pickler
waiting_for_all = api._thread_local_var


def init_rpc_states(agent: RpcAgent) -> None:
    api._init_rpc_states(agent)  # type: ignore[no-untyped-call]


def has_rendezvous_handler(scheme: str) -> bool:
    return scheme in _rendezvous_handlers


def end_of_record(record: Any) -> Callable[[Future[Any]], Future[Any]]:
    """What ends a profiler's record when a future completes; it returns the future to wait for."""
    end: Callable[[Future[Any]], Future[Any]] = record._call_end_callbacks_on_future
    return end


def async_execution(function: Any) -> Any:
    """The function that ``rpc.functions.async_execution`` wraps in this one; None for any other."""
    return getattr(function, ASYNC_EXECUTION, None)


def reducers_of(pickler: Any) -> dict[type, Callable[[Any], Any]]:
    """Those that were registered with it."""
    reducers: dict[type, Callable[[Any], Any]] = pickler._class_reducer_dict
    return reducers


def untyped_storage_of(storage: TypedStorage) -> UntypedStorage:
    return storage._untyped_storage


def typed_storage(storage: UntypedStorage, dtype: torch.dtype) -> TypedStorage:
    """One, without torch's warning that typed storages are deprecated."""
    return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def fork_rref(rref: PyRRef[Any]) -> tuple[Any, ...]:
    """What :func:`rref_of_fork` makes another RRef to the same value of, once, at any worker."""
    return rref._serialize()


def id_of_fork(fork: tuple[Any, ...]) -> tuple[int, int]:
    return fork[3], fork[4]


def rref_of_fork(fork: tuple[Any, ...]) -> PyRRef[Any]:
    return PyRRef._deserialize(fork)


def future_of_rref(rref: PyRRef[Any]) -> Future[Any]:
    return rref._get_future()


def set_profiling_future(rref: PyRRef[Any], future: Future[Any]) -> None:
    rref._set_profiling_future(future)
