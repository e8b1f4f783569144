"""What this host lets a process have: cores, threads, files; and all of its facts.

Each fact is made of values that somebody else has read, so that every host can be imagined; ``host_facts`` reads them.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from .. import _system
from .._system import Limits
from ..options import MPIRpcBackendOptions
from . import memory
from .facts import Fact, Resources, Status, count_text, field_of, text_of
from .place import Place

# Of a rank by itself, and for each other rank of its host and of others. MPICH 5.0.2 was seen to take 25, and 4 or 5.
_FILES, _FILES_A_NEIGHBOUR, _FILES_A_STRANGER = 64, 6, 8
# Beside the worker threads and torch's own: progress, liveness, the signal service, MPI's.
_FURTHER_THREADS = 8
_THREAD_VARIABLES = ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_UNLIMITED = resource.RLIM_INFINITY


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


def load(average: float, host: int) -> Fact:
    """Args: how many processes of the host have wanted to run in the last minute, on average; the host's cores."""
    value = f"{average:.1f} on {count_text(host, 'core')}"
    if average <= host:
        return Fact("load", value)
    return Fact("load", f"{value}: other processes compete for them, and times measured now mean little", Status.NOTE)


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
    users = text_of(root / "proc/self/uid_map").split()
    value = ", ".join(found) or "none seen"
    if users and users != ["0", "0", "4294967295"]:
        value += "; in a user namespace of its own"
    if field_of(root / "proc/self/status", "Seccomp") == "2":
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
    available = field_of(Path("/proc/meminfo"), "MemAvailable").split()
    allowed = len(os.sched_getaffinity(0))
    status = Path("/proc/self/status")
    return [
        container(environ, Path("/")),
        cores(resources, os.cpu_count() or 1),
        load(os.getloadavg()[0], os.cpu_count() or 1),
        affinity(allowed, _nearest_with_more(allowed), environ, place.launcher != ""),
        memory.usable_memory(resources, host_memory, int(available[0]) * 1024 if available else None, place.ranks_here),
        memory.shared_memory(limits, library, place, resources.cores),
        memory.leftovers(memory.files_of_mpi(), memory.mapped_files().__contains__),
        memory.memory_reading(
            limits.reads_memory,
            others_read,
            text_of(Path("/proc/sys/kernel/yama/ptrace_scope")),
            field_of(status, "Seccomp") == "2",
        ),
        memory.huge_pages(text_of(Path("/sys/kernel/mm/transparent_hugepage/enabled"))),
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE), own, max(others, 0)),
        threads(
            resource.getrlimit(resource.RLIMIT_NPROC)[0],
            None if os.geteuid() == 0 else _tasks_of(os.getuid()),
            resources.cgroup_tasks,
            _workers() + torch.get_num_threads() + _FURTHER_THREADS,
            own,
        ),
        memory.locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _system.has_fast_network()),
    ]


def _workers() -> int:
    try:
        return MPIRpcBackendOptions().num_worker_threads
    except ValueError:  # of the environment, which is a fact of its own
        return 16


def _nearest_with_more(allowed: int) -> tuple[str, int] | None:
    for process in _ancestors():
        count = _count_of_list(field_of(process / "status", "Cpus_allowed_list"))
        if count > allowed:
            return f"{field_of(process / 'status', 'Name')} (pid {process.name})", count
    return None


def _ancestors() -> Iterator[Path]:
    parent = str(os.getppid())
    while parent not in ("", "0"):
        yield Path("/proc", parent)
        parent = field_of(Path("/proc", parent, "status"), "PPid")


def _count_of_list(text: str) -> int:
    """Of a list such as 0-3,8."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return sum(int(ends[-1]) - int(ends[0]) + 1 for ends in ranges)


def _tasks_of(user: int) -> int:
    found = 0
    for process in Path("/proc").glob("[0-9]*/status"):
        if field_of(process, "Uid").split()[:1] == [str(user)]:
            found += int(field_of(process, "Threads") or 1)
    return found


def _limit_text(limit: int) -> str:
    return "unlimited" if limit == _UNLIMITED else str(limit)
