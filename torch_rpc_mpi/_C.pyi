"""Type stubs of the extension module; see csrc/python/."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.storage import UntypedStorage

from ._torch_api import Future, PyRRef, RpcAgent, Store, WorkerInfo

class MPIRuntime:
    """The MPI library that mpi4py has loaded, reached through the shim of its ABI."""

    def __init__(self, shim_path: str, mpi_extension_path: str) -> None: ...
    @property
    def abi(self) -> str: ...
    def initialized(self) -> bool: ...
    def finalized(self) -> bool: ...
    def thread_level(self) -> int: ...
    def initialize(self) -> None: ...
    def library_version(self) -> str: ...

class Communicator:
    """A communicator for the agent alone."""

    @staticmethod
    def duplicate(runtime: MPIRuntime, parent: int, timeout: float, companions: Companions | None) -> Communicator: ...
    @staticmethod
    def group(runtime: MPIRuntime, world: int, ranks: Sequence[int]) -> Communicator: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def allgather(self, data: bytes, timeout: float, companions: Companions | None) -> list[bytes]: ...
    def free(self) -> None: ...

class PMIServer:
    """Answers this process's MPI in a world without a launcher."""

    def __init__(
        self, store: Store, rank: int, size: int, world: str, mapping: str, timeout: float, companions: Companions
    ) -> None: ...
    @property
    def client_socket(self) -> int: ...
    def stop(self) -> None: ...
    def serve_alone(self, whereabouts: str) -> None: ...

class Companions:
    """Other processes of this host that are to form a group with this one: their ids and names."""

    def __init__(self, members: Sequence[tuple[int, str]]) -> None: ...
    def check(self, limit: float = 0.0) -> None:
        """Raises RuntimeError if one of them has ended, or does so within ``limit`` seconds."""

class InitWatchdog:
    """Reports, without the GIL, that MPI_Init is taking long, and ends the process where it cannot return."""

    def __init__(
        self, what: str, warn_after: float, abort_after: float, companions: Companions | None = None, world: str = ""
    ) -> None: ...
    def cancel(self) -> None: ...

class Neighbours:
    """How this process and the other ranks of its host wake each other."""

    def __init__(self) -> None: ...
    @property
    def address(self) -> str: ...
    @property
    def reaches_all(self) -> bool: ...
    @property
    def host(self) -> int: ...
    def ring_each_other(self) -> None: ...

class HostWatch:
    """Finds out whether the ranks of other hosts are alive."""

    def __init__(self) -> None: ...
    @property
    def address(self) -> str: ...

class AgentOptions:
    """What the agent needs of MPIRpcBackendOptions; times in seconds, sizes in bytes."""

    num_worker_threads: int
    rpc_timeout: float
    eager_limit: int
    bulk_chunk: int
    spin_time: float
    max_sleep: float
    any_source: bool
    flight_recorder_dir: str
    devices: list[torch.device]
    device_memory: int
    device_names: list[str]
    mpi_takes_device_memory: bool
    device_maps: list[tuple[dict[torch.device, torch.device], dict[torch.device, torch.device]]]
    messages_to_fail: list[str]
    messages_to_delay: dict[str, float]
    num_fail_sends: int
    def __init__(self) -> None: ...

class MPIAgent(RpcAgent):
    """The RpcAgent of backend "MPI"."""

    def __init__(
        self,
        communicator: Communicator,
        names: Sequence[str],
        hosts: Sequence[str],
        neighbours: Neighbours,
        addresses: Sequence[str],
        options: AgentOptions,
        run_function: Callable[[Any], Any],
        serialize: Callable[[Any], tuple[bytes, list[Tensor]]],
        pass_on: Callable[[Any], Any],
        plain_pickler: PlainPickler | None,
        on_worker_lost: Callable[[tuple[int, str]], object],
    ) -> None: ...
    def get_worker_info(self, worker: str | int | None = None) -> WorkerInfo: ...
    def get_worker_infos(self) -> list[WorkerInfo]: ...
    def watch_other_hosts(
        self,
        watch: HostWatch,
        neighbours: Neighbours,
        addresses: Sequence[str],
        hosts: Sequence[int],
        secret: bytes,
        heartbeat_timeout: float,
    ) -> None: ...
    def write_flight_record(self, path: str) -> str: ...
    def get_metrics(self) -> dict[str, str]: ...
    def get_debug_info(self) -> dict[str, str]: ...
    def get_device_map(self, worker: WorkerInfo) -> dict[torch.device, torch.device]: ...
    def _get_device_map(self, dst: WorkerInfo) -> dict[torch.device, torch.device]: ...
    def get_devices(self) -> list[torch.device]: ...
    def join(self, shutdown: bool = False, timeout: float = 0) -> None: ...
    def shutdown(self) -> None: ...
    def sync(self) -> None: ...
    def leave(self, farewell: str | None) -> None: ...
    def lost_workers(self) -> list[tuple[int, str]]:
        """Ranks in the order of their loss, each with the cause: if it left because of another's loss, that one's."""
    def expect_answer(self, expected: bool) -> None: ...
    def wait(self, future: Future[Any]) -> Any: ...

def finalize_at_exit(initialized: int, finalized: int, finalize: int) -> bool:
    """Has MPI's functions at these addresses called when this process ends, but in no child that it has forked. False
    if the interpreter has no room for that."""

def end_job_at_exit(runtime: MPIRuntime, world: int, text: str, status: int, limit: float) -> None: ...

class SecondInterrupt:
    """Ends the process at a second Ctrl-C if the first could not interrupt the main thread's wait for an answer."""

    def __init__(self, agent: MPIAgent, whereabouts: str, job: MPIRuntime | None, world: int) -> None: ...
    def cancel(self) -> None: ...

class TerminationNotice:
    """Has a line precede the default effect of SIGTERM, in this process alone, unless a handler takes its place."""

    def __init__(self, line: str, when_parent_ends: bool) -> None: ...
    def cancel(self) -> None: ...

# Methods of torch.futures.Future and PyRRef that let Python run the handlers of signals while they wait.
def future_wait(self: Future[Any]) -> Any: ...
def rref_local_value(self: PyRRef[Any]) -> Any: ...
def rref_to_here(self: PyRRef[Any], timeout: float = ...) -> Any: ...
def why_not_sent(tensor: Tensor, in_call: bool) -> str | None: ...
def bytes_of_storage(storage: UntypedStorage) -> Tensor: ...
def forks_made(ids: list[tuple[int, int]]) -> None:
    """Of the RRefs in the message that this thread sends next."""

def forget_autograd_worker_id(worker_id: int) -> None: ...
def message_type_names() -> list[str]: ...

# What this process may use, see csrc/host/resources.h.
def usable_cores() -> int: ...
def register_device_runtime(device_type: str, library: str, prefix: str) -> None:
    """Where the functions of runtime_functions.h are for a kind of device that torch knows as PrivateUse1."""

def find_device_runtime(device_type: str) -> str:
    """The runtime library that is used for a kind of device. Raises RuntimeError if there is none that fits."""

def can_access_peer(device_type: str, device: int, peer: int) -> bool:
    """Whether the one can use the other's memory."""

def usable_memory() -> int: ...  # bytes
def cgroup_limits() -> tuple[int | None, float | None, int | None]:
    """Memory in bytes, CPU time per time, and tasks that the cgroup allows; None for what it does not limit."""

# The entry points; documented in functions.py.

def py_rpc_builtin(
    dst: WorkerInfo, op_name: str, args: tuple[Any, ...], kwargs: dict[str, Any], rpc_timeout_seconds: float
) -> Future[Any]: ...
def py_rpc_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[Tensor],
    rpc_timeout_seconds: float,
    is_async_execution: bool,
    by_value: Callable[[], tuple[bytes, list[Tensor]]] | Literal[True] | None,
) -> Future[Any]: ...
def py_rpc_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rpc_timeout_seconds: float,
    is_async_execution: bool,
) -> Future[Any]: ...
def py_remote_builtin(
    dst: WorkerInfo, op_name: str, rpc_timeout_seconds: float, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> PyRRef[Any]: ...
def py_remote_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[Tensor],
    rpc_timeout_seconds: float,
    is_async_execution: bool,
    by_value: Callable[[], tuple[bytes, list[Tensor]]] | Literal[True] | None,
) -> PyRRef[Any]: ...
def py_remote_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    rpc_timeout_seconds: float,
    is_async_execution: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> PyRRef[Any]: ...
def send_builtin(
    dst: WorkerInfo, op_name: str, args: tuple[Any, ...], kwargs: dict[str, Any], rpc_timeout_seconds: float
) -> Future[Any]: ...
def send_python_udf(
    dst: WorkerInfo,
    pickled_python_udf: bytes,
    tensors: Sequence[Tensor],
    rpc_timeout_seconds: float,
    is_async_execution: bool,
) -> Future[Any]: ...
def send_torchscript(
    dst_worker_name: str,
    qualified_name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rpc_timeout_seconds: float,
    is_async_execution: bool,
) -> Future[Any]: ...
def to_py_jit_future(message_future: Future[Any], has_value: bool) -> Future[Any]: ...

# For the tests: the overload that a call means, found as the entry points find it, or by trying all as torch does.
def match_builtin(op_name: str, args: tuple[Any, ...], kwargs: dict[str, Any], among_all: bool) -> str: ...

RESENDABLE: bytes  # what follows the pickle of a call that may be sent again

class PlainPickler:
    """Pickles what is plain (csrc/python/pickle/plain_pickle.h): bytes, tensors and RRefs; None or () if it is not."""

    def __init__(self, reducers: Sequence[dict[type, Any]]) -> None: ...
    def dump_call(self, call: Any) -> tuple[bytes, list[Tensor], list[PyRRef[Any]]] | None: ...
    # The others are for the tests; C++ uses what they stand for.
    def dump_result(self, value: Any) -> tuple[bytes, list[Tensor], list[PyRRef[Any]]] | None: ...
    def load_call(self, data: bytes, tensors: Sequence[Tensor]) -> tuple[Any, ...]: ...
    @staticmethod
    def load_result(data: bytes, tensors: Sequence[Tensor]) -> tuple[Any, ...]: ...

class DirectCalls:
    """Calls as ``rpc_sync`` and ``rpc_async`` make them (csrc/python/direct_calls.h).

    None is returned for those that are left to torch's function; ``answer`` is called with the value of the others.
    """

    def __init__(
        self,
        agent: MPIAgent,
        pickler: Any,
        api: dict[str, Any],
        default_pickler: str,
        builtins: dict[int, str],
        async_execution: str,
        script_function: type,
    ) -> None: ...
    def sync(self, answer: Callable[[Any], Any], to: Any, func: Any, args: Any, kwargs: Any, timeout: Any) -> Any: ...
    def future(self, to: Any, func: Any, args: Any, kwargs: Any, timeout: Any) -> Future[Any] | None: ...
    def end(self) -> None: ...

# For the tests: whether a result as it was pickled is one that the caller needs no Python to read.
def is_plain_result(pickled: bytes, tensors: Sequence[Tensor]) -> bool: ...

__torch_version__: str

def future_then(self: Future[Any], callback: Callable[[Future[Any]], Any]) -> Future[Any]:
    """``torch._C.Future.then`` during a session: a callback that the engine runs begins in a clean thread state."""

def future_add_done_callback(self: Future[Any], callback: Callable[[Future[Any]], Any]) -> None:
    """As :func:`future_then`, of ``torch._C.Future.add_done_callback``."""
