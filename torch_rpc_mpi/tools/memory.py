"""What this host lets a process have of its memory, and how ranks share it.

Each fact is made of values that somebody else has read, so that every host can be imagined.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from .. import _system
from .._system import SHARED_MEMORY, Limits
from .facts import Fact, Resources, Status, count_text, size_text, text_of
from .place import Place

# A process that has imported torch and is in a session takes about 300 MB.
_MEMORY_OF_A_RANK = 512 << 20
# As MPICH and Intel MPI, Open MPI and their libraries name files in shared memory.
_OF_MPI = re.compile(r"mpich|Intel_MPI|(vader|sm)_segment|ucx_shm|psm")
_UNLIMITED = resource.RLIM_INFINITY


def shared_memory(limits: Limits, library: str, place: Place, cores: int | None) -> Fact:
    """Args: the text of MPI_Get_library_version, empty if not known; usable cores."""
    key, free, ranks = "shared_memory", limits.shared_memory, place.ranks_here
    if free is None:
        remedy = f"mount one (`mount -t tmpfs tmpfs {SHARED_MEMORY}`): without it ranks of a host cannot share memory"
        return Fact(key, f"there is no {SHARED_MEMORY}", Status.PROBLEM, remedy)
    value = f"{size_text(free)} free in {SHARED_MEMORY}"
    wanted = ranks or max(cores or 0, 2)
    needed = _system.needed_shared_memory(library, wanted)
    if needed == 0:
        return Fact(key, value + (", needed by one rank alone: nothing" if ranks == 1 and library else ""))
    value += f", MPI needs {size_text(needed)} for {wanted} ranks"
    if free >= needed:
        return Fact(key, value)
    size = 2 * needed >> 20
    remedy = (
        f"make it larger (`mount -o remount,size={size}M {SHARED_MEMORY}`, `docker run --shm-size={size}m`, in "
        "Kubernetes an emptyDir of medium Memory), remove what nobody uses from it, or start at most "
        f"{count_text(max(free * wanted // needed, 1), 'rank')} here"
    )
    # What UCX takes is more than MPI cannot do without. It looks for room first, but ranks that look at the same time
    # end with SIGBUS; hence init_rpc refuses where it forms the world.
    least = _system.needed_shared_memory(library, wanted, {"MPIR_CVAR_CH4_NETMOD": "ofi"})
    certain = ranks is not None and (place.by_store or free < least)
    return Fact(key, value, Status.PROBLEM if certain else Status.WARNING, remedy)


def leftovers(files: Mapping[Path, int], used: Callable[[Path], bool]) -> Fact:
    """Files that MPI processes have left in shared memory, because they were killed.

    Args:
        files: of MPI, by their names, and their bytes.
        used: whether a process has one of them mapped.
    """
    left = {file: size for file, size in files.items() if not used(file)}
    if not left:
        return Fact("leftovers", f"none in {SHARED_MEMORY}")
    value = f"{count_text(len(left), 'file')} of MPI processes that have ended, {size_text(sum(left.values()))}"
    example = f"{SHARED_MEMORY}/{next(iter(left)).name}"
    return Fact("leftovers", f"{value}, such as {example}", Status.NOTE, "remove them while no job of yours runs here")


def memory_reading(own: bool, others: bool, yama: str, filtered: bool) -> Fact:
    """Whether ranks may read each other's memory.

    Args:
        own, others: whether this process, and a child of it, may read this process's.
        yama: the kernel's ptrace_scope; empty: it has none.
        filtered: whether system calls of this process are filtered (seccomp).
    """
    key = "process_vm_readv"
    if own and others:
        return Fact(key, "allowed" + (f", although Yama restricts ptrace ({yama})" if yama not in ("", "0") else ""))
    cost = "large tensors of ranks of one host are copied twice"
    if not own:
        by = "a filter of system calls (seccomp)" if filtered else "this system"
        return Fact(
            key,
            f"refused by {by}; {cost}",
            Status.WARNING,
            "`docker run --cap-add=SYS_PTRACE`, or a seccomp profile that allows it. Until then call init_rpc before "
            "`from mpi4py import MPI`, or export MPIR_CVAR_CH4_CMA_ENABLE=0: MPICH's MPI_Init fails otherwise",
        )
    by = f"Yama (ptrace_scope {yama})" if yama not in ("", "0") else "this system"
    remedy = "`sysctl kernel.yama.ptrace_scope=0`, as root of the host"
    return Fact(key, f"refused by {by} between processes; {cost}", Status.WARNING, remedy)


def huge_pages(setting: str) -> Fact:
    """Args: what the kernel has in transparent_hugepage/enabled; empty: nothing."""
    chosen = re.search(r"\[(\w+)\]", setting)
    key, value = "huge_pages", chosen[1] if chosen else "not known"
    if value != "never":
        return Fact(key, value, Status.OK if chosen else Status.NOTE)
    remedy = "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`, as root of the host"
    return Fact(key, "never; tensors of 2 MiB and more arrive more slowly", Status.WARNING, remedy)


def usable_memory(resources: Resources, host: int, available: int | None, ranks: int | None) -> Fact:
    """Args: bytes that the host has, and has left; None: not known."""
    key, usable = "memory", resources.memory
    if usable is None:
        return Fact(key, f"{size_text(host)} of the host; how much may be used is not known", Status.NOTE)
    value = f"{size_text(usable)} may be used" + (f" of the host's {size_text(host)} (cgroup)" if usable < host else "")
    if available is not None:
        value += f", {size_text(available)} of the host are free"
    each = min(usable, host if available is None else available) // (ranks or 1)
    if each >= _MEMORY_OF_A_RANK:
        return Fact(key, value)
    remedy = f"ask for more (`srun --mem`, `docker run --memory`): a rank takes about {size_text(_MEMORY_OF_A_RANK)}"
    return Fact(key, f"{value}; that is {size_text(each)} a rank", Status.WARNING, remedy)


def locked_memory(soft: int, fast_network: bool) -> Fact:
    value = "unlimited" if soft == _UNLIMITED else size_text(soft)
    if soft == _UNLIMITED or not fast_network:
        return Fact("locked_memory", value)
    remedy = (
        "`ulimit -l unlimited` in what starts the ranks (limits.conf, slurmd's LimitMEMLOCK), as InfiniBand needs it"
    )
    return Fact("locked_memory", value, Status.WARNING, remedy)


def files_of_mpi() -> dict[Path, int]:
    """Those of this user in shared memory."""
    found = {}
    for file in SHARED_MEMORY.glob("*"):
        with suppress(OSError):
            status = file.stat()
            if status.st_uid == os.getuid() and _OF_MPI.match(file.name):
                found[file] = status.st_size
    return found


def mapped_files() -> set[Path]:
    """Those in shared memory that a process of this user has mapped."""
    lines = (line for maps in Path("/proc").glob("[0-9]*/maps") for line in text_of(maps).splitlines())
    return {Path(line.split(maxsplit=5)[5]) for line in lines if f" {SHARED_MEMORY}/" in line}
