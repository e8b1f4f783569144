"""What MPI takes for granted of this system, and what is done before MPI_Init where that does not hold.

MPI itself would end the process there, with a signal or an error of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

SHARED_MEMORY = Path("/dev/shm")

# Bytes for each rank of a host, as MPICH 5.0.2 takes them in its default configuration: cells for small messages, and
# the receive buffers of UCX's posix transport, also where no message goes that way.
_CELLS, _CELL_BYTES = 64, 16_640
_UCX_BYTES = 4_340_000

_LONGEST_HOST_NAME = 63  # characters that MPICH 5.0 takes


# What keeps MPICH from process_vm_readv.
_WITHOUT_READING_MEMORY = {"MPIR_CVAR_CH4_CMA_ENABLE": "0"}
# What keeps UCX from listening at two ports of every network for ranks of other hosts, where there are none.
_WITHIN_ONE_HOST = {"UCX_TLS": "sm,self"}
# Over plain Ethernet. With UCX a send to a process that has just died crashes this one (MPICH 5.0), and large messages
# take longer.
_BETWEEN_HOSTS = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}

# What tells that a host has a faster network than Ethernet: InfiniBand, EFA, Slingshot, Omni-Path.
_FAST_NETWORKS = ("sys/class/infiniband/*", "sys/class/cxi/*", "dev/cxi*", "dev/hfi1*")
# By which a user chooses what MPI takes.
_CHOOSES_NETWORK = re.compile(r"MPIR_CVAR_CH4_NETMOD$|UCX_|FI_")


@contextlib.contextmanager
def default_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that the user has not set, for MPI_Init alone: what this process starts does not get them."""
    ours = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def process_space() -> str:
    """Where process ids mean the same: a boot of a system, and a namespace of it. Empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def how_it_ended(status: int) -> str:
    """What became of a process, as Popen has its status."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"has ended with status {status}"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a rank finds on its host."""

    shared_memory: int | None = None  # bytes free in /dev/shm, before MPI has taken its own; None: not known
    reads_memory: bool = True  # of other processes
    chooses_network: bool = False  # has a fast one, or its user has said what to take

    @classmethod
    def here(cls, root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> Limits:
        try:
            state = os.statvfs(SHARED_MEMORY)
            shared_memory = state.f_bavail * state.f_frsize
        except OSError:
            shared_memory = None
        chooses = has_fast_network(root) or any(map(_CHOOSES_NETWORK.match, environ))
        return cls(shared_memory, can_read_memory(), chooses)


def has_fast_network(root: Path = Path("/")) -> bool:
    """Whether this host has a faster one than Ethernet."""
    return any(True for pattern in _FAST_NETWORKS for _ in root.glob(pattern))


def mpi_settings(library: str, ranks: Sequence[Limits], nodes: int) -> dict[str, str]:
    """Variables for ``default_environment`` during MPI_Init.

    Args:
        library: the whole text of MPI_Get_library_version.
        ranks: all, as far as they are known.
        nodes: on how many nodes these are; 0: not known.
    """
    settings = {}
    if not all(rank.reads_memory for rank in ranks):
        settings.update(_WITHOUT_READING_MEMORY)
    if nodes == 1:
        settings.update(_WITHIN_ONE_HOST)
    elif nodes > 1 and "ofi" in _network_modules(library) and not any(rank.chooses_network for rank in ranks):
        settings.update(_BETWEEN_HOSTS)
    return settings


def _network_modules(library: str) -> list[str]:
    """Of MPICH; the first is its default."""
    device = re.search(r"MPICH Device:[ \t]*ch4:(.+)", library)
    return re.split(r"[, ]+", device[1].strip()) if device else []


_source = ctypes.create_string_buffer(1)  # at the same address in a process and those that it forks


def can_read_memory(process: int | None = None) -> bool:
    """Whether process_vm_readv is allowed, by which MPICH 5.0 reads large messages of a host; it does not look itself.

    Filters of system calls, as containers have them, refuse it even for the process itself. Where the kernel's Yama
    refuses it for other processes, MPICH finds out by itself.

    Args:
        process: this one (None), or its parent, which has forked it.
    """
    target = ctypes.create_string_buffer(1)

    def vector(buffer: ctypes.Array[ctypes.c_char]) -> ctypes.Array[ctypes.c_size_t]:
        return (ctypes.c_size_t * 2)(ctypes.addressof(buffer), 1)  # struct iovec: address and bytes

    read = ctypes.CDLL(None).process_vm_readv
    read.restype = ctypes.c_ssize_t
    return bool(read(process or os.getpid(), ctypes.byref(vector(target)), 1, ctypes.byref(vector(_source)), 1, 0) == 1)


def host_name_problem(library: str, host: str) -> str | None:
    """Why this MPI does not start on a host of this name.

    Args:
        library: the whole text of MPI_Get_library_version.
    """
    if not re.match(r"MPICH Version:\s*5\.", library) or len(os.fsencode(host)) <= _LONGEST_HOST_NAME:
        return None
    return (
        f"the name of this host has {len(os.fsencode(host))} characters, and MPICH takes at most {_LONGEST_HOST_NAME}: "
        f"MPI_Init would end the process. Give the host or container a shorter name (`hostname`, `docker run "
        f"--hostname`) than {host!r}"
    )


def needed_shared_memory(library: str, ranks: int, environ: Mapping[str, str] = os.environ) -> int:
    """Bytes that ``ranks`` of one host need in /dev/shm; 0 for an MPI of which that is not known."""
    modules = _network_modules(library)
    if not modules or ranks < 2:
        return 0
    cells = environ.get("MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS", "")
    needed = (int(cells) if cells.isdigit() else _CELLS) * _CELL_BYTES
    if environ.get("MPIR_CVAR_CH4_NETMOD", modules[0]) == "ucx":
        needed += _UCX_BYTES
    return ranks * needed


class _Rank(Protocol):
    """What is to be known of each rank."""

    @property
    def node(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def limits(self) -> Limits: ...


def check_shared_memory(library: str, ranks: Sequence[_Rank]) -> None:
    """Raises RuntimeError, the same on all ranks, when those of a node have too little shared memory."""
    for node in dict.fromkeys(rank.node for rank in ranks):
        here = [rank for rank in ranks if rank.node == node]
        needed = needed_shared_memory(library, len(here))
        known = [rank.limits.shared_memory for rank in here if rank.limits.shared_memory is not None]
        if known and min(known) < needed:
            size = 2 * needed >> 20
            raise RuntimeError(
                f"init_rpc failed on all ranks because {SHARED_MEMORY} of host {here[0].host} has "
                f"{min(known) / 2**20:.1f} MiB free, and MPI's {len(here)} ranks there need {needed / 2**20:.1f} MiB: "
                f"they would end with SIGBUS. Make it larger (`mount -o remount,size={size}M {SHARED_MEMORY}`, "
                f"`docker run --shm-size={size}m`), remove files that nobody uses from it, or start at most "
                f"{min(known) * len(here) // needed} ranks there."
            )
