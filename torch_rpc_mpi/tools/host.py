"""What this host lets a process have: memory, cores, threads, files.

Each fact is made of values that somebody else has read, so that every host can be imagined; ``host_facts`` reads them.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .. import _system
from .._system import SHARED_MEMORY, Limits
from ..options import MPIRpcBackendOptions
from .facts import Fact, Status, count_text, size_text
from .place import Place

# A process that has imported torch and is in a session takes about 300 MB.
_MEMORY_OF_A_RANK = 512 << 20
# Of a rank by itself, for each other rank of its host, and for each of other hosts. MPICH 5 takes about 30, 2 and 4.
_FILES, _FILES_A_NEIGHBOUR, _FILES_A_STRANGER = 64, 4, 8
# Beside the worker threads and torch's own: progress, liveness, the signal service, MPI's.
_FURTHER_THREADS = 8
_THREAD_VARIABLES = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_UNLIMITED = resource.RLIM_INFINITY


class Resources(NamedTuple):
    """What may be used of the host, as csrc/host/resources.h finds it; None: not known, or no limit."""

    cores: int | None = None
    memory: int | None = None  # bytes
    cgroup_memory: int | None = None
    cgroup_cores: float | None = None
    cgroup_tasks: int | None = None


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


def affinity(allowed: int, before: tuple[str, int] | None, environ: Mapping[str, str], launched: bool) -> Fact:
    """On how many cores this process may run.

    Args:
        allowed: so many.
        before: the nearest process that has started this one, directly or not, and may run on more; its name and cores.
        launched: whether a launcher has started it.
    """
    key, value = "affinity", count_text(allowed, "core")
    if before is not None:
        value += f", although {before[0]}, from which it was started, has {before[1]}"
    if allowed > 1:
        return Fact(key, value, Status.NOTE if before is not None else Status.OK)
    binding = next((f"{name}={environ[name]}" for name in _THREAD_VARIABLES if name in environ), None)
    if binding is not None:
        remedy = (
            f"unset {binding.split('=')[0]} ({binding}), by which OpenMP binds the main thread when torch is loaded"
        )
    elif before is not None and launched:
        remedy = (
            "`mpirun --bind-to none` (Open MPI), `mpirun -bind-to none` (MPICH), `srun --cpu-bind=none`, or more cores "
            "for each rank"
        )
    elif before is not None:
        remedy = "look for taskset, numactl or a batch system's binding in what started this process"
    else:
        remedy = "ask for more cores, if there are any (`srun -c`, `docker run --cpus`, `--cpuset-cpus`)"
    text = f"{value}; the threads of a rank take turns on it"
    return Fact(key, text, Status.WARNING, remedy)


def cores(resources: Resources, host: int) -> Fact:
    key, usable = "cores", resources.cores
    if usable is None:
        return Fact(key, f"{host} of the host; how many may be used is not known", Status.NOTE)
    value = f"{usable} of the host's {host} may be used"
    if resources.cgroup_cores is not None:
        value += f" (the cgroup allows {resources.cgroup_cores:.3g})"
    return Fact(key, value)


def memory(resources: Resources, host: int, available: int | None, ranks: int | None) -> Fact:
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


def open_files(soft: int, hard: int, ranks_here: int, others: int) -> Fact:
    """Args: the limits; how many ranks of this host, and of other hosts."""
    needed = _FILES + _FILES_A_NEIGHBOUR * (ranks_here - 1) + _FILES_A_STRANGER * others
    value = f"{_limit_text(soft)} (at most {_limit_text(hard)})"
    if soft == _UNLIMITED or soft >= needed:
        return Fact("open_files", value)
    remedy = f"`ulimit -n {needed}`" + (
        "" if hard == _UNLIMITED or hard >= needed else ", which the administrator has to allow"
    )
    return Fact("open_files", f"{value}, a rank needs about {needed}", Status.PROBLEM, remedy)


def threads(of_user: int, used: int | None, cgroup: int | None, a_rank: int, ranks: int) -> Fact:
    """How many threads may be started.

    Args:
        of_user: the limit for all processes of the user.
        used: how many they have; None: the limit does not hold for this process.
        cgroup: the limit of the cgroup, None: none.
        a_rank: how many a rank may start.
        ranks: of this host.
    """
    needed = a_rank * ranks
    value = f"{_limit_text(of_user)} for this user"
    left = None if used is None or of_user == _UNLIMITED else of_user - used
    if left is not None:
        value += f", who has {used}"
    if cgroup is not None:
        value += f"; {cgroup} for the cgroup"
    left = min((limit for limit in (left, cgroup) if limit is not None), default=None)
    if left is None or left >= needed:
        return Fact("threads", value)
    remedy = (
        "raise it (`ulimit -u`, `docker run --pids-limit`), or start fewer: num_worker_threads in the options, "
        "OMP_NUM_THREADS, fewer ranks"
    )
    which = Status.PROBLEM if left < needed // 2 else Status.WARNING
    return Fact("threads", f"{value}; {count_text(ranks, 'rank')} may start {needed}", which, remedy)


def locked_memory(soft: int, fast_network: bool) -> Fact:
    value = "unlimited" if soft == _UNLIMITED else size_text(soft)
    if soft == _UNLIMITED or not fast_network:
        return Fact("locked_memory", value)
    remedy = (
        "`ulimit -l unlimited` in what starts the ranks (limits.conf, slurmd's LimitMEMLOCK), as InfiniBand needs it"
    )
    return Fact("locked_memory", value, Status.WARNING, remedy)


def container(environ: Mapping[str, str], root: Path) -> Fact:
    """Whether this is one, and what tells."""
    signs = {
        "Kubernetes": "KUBERNETES_SERVICE_HOST" in environ,
        "Apptainer": "APPTAINER_CONTAINER" in environ or "SINGULARITY_CONTAINER" in environ,
        "Podman": (root / "run/.containerenv").exists(),
        "Docker": (root / ".dockerenv").exists(),
        environ.get("container", ""): bool(environ.get("container")),
    }
    found = [name for name, seen in signs.items() if seen]
    users = _text(root / "proc/self/uid_map").split()
    value = ", ".join(found) or "none seen"
    if users and users != ["0", "0", "4294967295"]:
        value += "; in a user namespace of its own"
    if _field(root / "proc/self/status", "Seccomp") == "2":
        value += "; system calls are filtered (seccomp)"
    return Fact("container", value, Status.NOTE if value != "none seen" else Status.OK)


def host_facts(
    place: Place, library: str, resources: Resources, others_read: bool, environ: Mapping[str, str] = os.environ
) -> list[Fact]:
    """All of them, of this process.

    Args:
        library: the text of MPI_Get_library_version; empty: not known.
        others_read: whether a child of this process may read its memory.
    """
    limits = Limits.here(environ=environ)
    own, others = place.ranks_here or 1, (place.size or 1) - (place.ranks_here or 1)
    host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _field(Path("/proc/meminfo"), "MemAvailable").split()
    allowed = len(os.sched_getaffinity(0))
    status = Path("/proc/self/status")
    return [
        container(environ, Path("/")),
        cores(resources, os.cpu_count() or 1),
        affinity(allowed, _nearest_with_more(allowed), environ, place.launcher != ""),
        memory(resources, host_memory, int(available[0]) * 1024 if available else None, place.ranks_here),
        shared_memory(limits, library, place, resources.cores),
        memory_reading(
            limits.reads_memory,
            others_read,
            _text(Path("/proc/sys/kernel/yama/ptrace_scope")),
            _field(status, "Seccomp") == "2",
        ),
        huge_pages(_text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), own, max(others, 0)),
        threads(
            resource.getrlimit(resource.RLIMIT_NPROC)[0],
            None if os.geteuid() == 0 else _tasks_of(os.getuid()),
            resources.cgroup_tasks,
            _workers() + torch.get_num_threads() + _FURTHER_THREADS,
            own,
        ),
        locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _system.has_fast_network()),
    ]


def _workers() -> int:
    try:
        return MPIRpcBackendOptions().num_worker_threads
    except ValueError:  # of the environment, which is a fact of its own
        return 16


def _nearest_with_more(allowed: int) -> tuple[str, int] | None:
    for process in _ancestors():
        count = _count_of_list(_field(process / "status", "Cpus_allowed_list"))
        if count > allowed:
            return f"{_field(process / 'status', 'Name')} (pid {process.name})", count
    return None


def _ancestors() -> Iterator[Path]:
    parent = str(os.getppid())
    while parent not in ("", "0"):
        yield Path("/proc", parent)
        parent = _field(Path("/proc", parent, "status"), "PPid")


def _count_of_list(text: str) -> int:
    """Of a list such as 0-3,8."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _tasks_of(user: int) -> int:
    found = 0
    for process in Path("/proc").glob("[0-9]*/status"):
        if _field(process, "Uid").split()[:1] == [str(user)]:
            found += int(_field(process, "Threads") or 1)
    return found


def _limit_text(limit: int) -> str:
    return "unlimited" if limit == _UNLIMITED else str(limit)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _field(path: Path, name: str) -> str:
    """Of a file of lines "Name: value", as /proc has many; empty if it is not there."""
    for line in _text(path).splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""
