"""Stand-ins for mpi4py and for the compiled extension, for tests of the Python side alone.

The fake mpi4py is a package on disk, so that importing it goes through the real import system. The fake extension's
agent is torch's TensorPipeAgent for a world of one rank.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed.rpc as rpc
from torch._C import _distributed_rpc
from torch._C._distributed_c10d import HashStore

RunPython = Callable[..., str]

_MPI4PY = """
__version__ = {version!r}

class rc:
    initialize = True
    finalize = None
    threads = "untouched"
    thread_level = "untouched"
"""

_MPI = """
import mpi4py

thread_level_at_import = mpi4py.rc.thread_level
events = []

class Comm:
    def __init__(self, name, rank=0, size=1, inter=False):
        self.name, self.rank, self.size, self.inter = name, rank, size, inter
    def Get_rank(self): return self.rank
    def Get_size(self): return self.size
    def Is_inter(self): return self.inter
    def py2f(self): return 11
    handle = 22
    attributes = {}
    @staticmethod
    def Create_keyval(delete_fn): return delete_fn
    @staticmethod
    def Free_keyval(key): pass
    def Set_attr(self, key, value): self.attributes[key] = value
    def Get_attr(self, key): return self.attributes.get(key)
    def Delete_attr(self, key): key(self, key, self.attributes.pop(key))

class Intracomm(Comm): pass
class Intercomm(Comm): pass

COMM_NULL = Comm("null")
COMM_WORLD = Intracomm("world")
COMM_SELF = Intracomm("self")
finalized = False
initialized = True

def Is_finalized(): return finalized
def Is_initialized(): return initialized
def Get_library_version(): return "Fake MPI 1.0"
def _sizeof(what): return 4
"""


def write_mpi4py(directory: Path, *, version: str = "4.1.2", prologue: str = "", **settings: Any) -> None:
    """Makes a package mpi4py in ``directory``. ``prologue`` runs when mpi4py.MPI is imported."""
    package = directory / "mpi4py"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(_MPI4PY.format(version=version))
    lines = [f"{name} = {value!r}\n" for name, value in settings.items()]
    (package / "MPI.py").write_text(textwrap.dedent(prologue) + _MPI + "".join(lines))


class Watchdog:
    """Records what was asked of it, and whether mpi4py.MPI was imported while it watched."""

    made: ClassVar[list[Watchdog]] = []

    def __init__(self, what: str, warn_after: float, abort_after: float) -> None:
        self.what, self.warn_after, self.abort_after = what, warn_after, abort_after
        self.imported_before = "mpi4py.MPI" in sys.modules
        self.cancelled = False
        Watchdog.made.append(self)

    def cancel(self) -> None:
        self.cancelled = True


class Runtime:
    """MPIRuntime of an MPI in perfect order; tests change the class's attributes."""

    level = 3
    is_initialized = True

    def __init__(self, shim_path: str, mpi_extension_path: str) -> None:
        self.shim_path, self.mpi_extension_path = shim_path, mpi_extension_path

    def initialized(self) -> bool:
        return self.is_initialized

    def thread_level(self) -> int:
        return self.level

    def library_version(self) -> str:
        return "Fake  MPI 1.0, package: none\nbuilt for tests\n"


class Communicator:
    """A world in which all ranks send the same as this one."""

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.rank = 0
        self.freed = 0

    @staticmethod
    def duplicate(runtime: Runtime, parent: int, timeout: float, companions: None) -> Communicator:
        return Communicator()

    def allgather(self, data: bytes, timeout: float, companions: None) -> list[bytes]:
        return [data] * self.size

    def free(self) -> None:
        self.freed += 1


class Neighbours:
    address = "here"
    reaches_all = False
    host = 0


class SecondInterrupt:
    def __init__(self, agent: Any, whereabouts: str, job: Any, world: int) -> None:
        pass

    def cancel(self) -> None:
        pass


class TerminationNotice:
    def __init__(self, line: str, when_parent_ends: bool) -> None:
        pass

    def cancel(self) -> None:
        pass


class AgentOptions:
    """Any attribute can be set."""


class Agent(rpc.TensorPipeAgent):
    """TensorPipe's agent behind the interface of MPIAgent."""

    def __init__(
        self,
        communicator: Communicator,
        names: list[str],
        hosts: list[str],
        neighbours: Any,
        addresses: list[str],
        options: Any,
        run_function: Any,
        serialize: Any,
        pass_on: Any,
        plain_pickler: Any,
        on_worker_lost: Any,
    ) -> None:
        self.names, self.hosts, self.options = names, hosts, options
        self.run_function, self.serialize, self.pass_on = run_function, serialize, pass_on
        self.on_worker_lost = on_worker_lost
        super().__init__(HashStore(), names[0], 0, 1, rpc.TensorPipeRpcBackendOptions(), {}, [])

    def expect_answer(self, expected: bool) -> None:
        pass

    def wait(self, future: Any) -> Any:
        return future.wait()

    def leave(self, farewell: str | None) -> None:
        print(f"the agent leaves: {farewell}", flush=True)
        rpc.TensorPipeAgent.shutdown(self)  # its threads may not be running when the process ends

    def lost_workers(self) -> list[tuple[int, str]]:
        return []


class DirectCalls:
    """Leaves all calls to torch's function."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def sync(self, *call: Any) -> None:
        return None

    def future(self, *call: Any) -> None:
        return None

    def end(self) -> None:
        pass


def send_without_second_attempt(invoke: Callable[..., Any]) -> Callable[..., Any]:
    """torch's entry point behind the signature of ours."""

    def send(dst: Any, pickled: bytes, tensors: Any, timeout: float, is_async: bool, by_value: Any) -> Any:
        return invoke(dst, pickled, tensors, timeout, is_async)

    return send


def make_extension(directory: Path) -> ModuleType:
    """A fake torch_rpc_mpi._C that lies, with its shims, in ``directory``."""
    from torch_rpc_mpi import _C as real

    extension = ModuleType("torch_rpc_mpi._C")
    extension.__file__ = str(directory / "_C.so")
    for abi in ("mpich", "openmpi", "standard"):
        (directory / f"_mpi_shim_{abi}.so").touch()
    members = {
        "InitWatchdog": Watchdog,
        "finalize_at_exit": lambda initialized, finalized, finalize: False,
        "MPIRuntime": type("Runtime", (Runtime,), {}),
        "Communicator": Communicator,
        "AgentOptions": AgentOptions,
        "Neighbours": Neighbours,
        "MPIAgent": Agent,
        "SecondInterrupt": SecondInterrupt,
        "TerminationNotice": TerminationNotice,
        "future_add_done_callback": vars(torch._C.Future)["add_done_callback"],
        "future_then": vars(torch._C.Future)["then"],
        "future_wait": vars(torch._C.Future)["wait"],
        "rref_local_value": vars(_distributed_rpc.PyRRef)["local_value"],
        "rref_to_here": vars(_distributed_rpc.PyRRef)["to_here"],
        "forget_autograd_worker_id": lambda worker_id: None,
        "forks_made": lambda ids: None,
        "py_rpc_python_udf": send_without_second_attempt(_distributed_rpc._invoke_rpc_python_udf),
        "py_remote_python_udf": send_without_second_attempt(_distributed_rpc._invoke_remote_python_udf),
        "DirectCalls": DirectCalls,
        "PlainPickler": real.PlainPickler,
        "RESENDABLE": real.RESENDABLE,
        "why_not_sent": real.why_not_sent,
        "bytes_of_storage": real.bytes_of_storage,
        "__torch_version__": torch.__version__,
    }
    for name, value in members.items():
        setattr(extension, name, value)
    return extension


def install_extension(directory: Path) -> ModuleType:
    """Makes the fake the extension of this process."""
    import torch_rpc_mpi

    extension = make_extension(directory)
    sys.modules["torch_rpc_mpi._C"] = extension
    torch_rpc_mpi._C = extension  # type: ignore[attr-defined]
    return extension
