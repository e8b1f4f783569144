"""What launchers tell the processes that they start, as far as it stands in the environment.

The table of such variables. Nothing here looks at MPI, or imports anything but the standard library.

=====================  ===============================================================================================
launcher               where its variables are described, and of what they were seen
=====================  ===============================================================================================
Open MPI's mpirun      Open MPI's documentation, "Environment variables set for MPI applications"; 4.1 and 5.0
MVAPICH's mpirun_rsh   MVAPICH2's user guide, "Running with mpirun_rsh"; not seen
PALS                   HPE's mpiexec(1), and Slurm's plugin cray_shasta, which does as PALS does; not seen
Flux                   flux-core, src/shell/task.c and flux-environment(7); not seen
MPICH's mpirun         Hydra's proxy, which Intel MPI has as well; MPICH 4.0 and 5.0, Intel MPI 2021
Slurm's srun           srun(1), "OUTPUT ENVIRONMENT VARIABLES", and what its plugins pmi2 and pmix add; 22.05
PBS                    qsub(1), PBS_NODEFILE: it starts no ranks, but names the hosts of its job; not seen
torchrun               torch's documentation, "torchrun (Elastic Launch)"; 2.13
=====================  ===============================================================================================
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import stat
import termios
import time
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

Environment = Mapping[str, str]

# By which MPI learns of its world. PMI-1 and PMI-2 look the same from outside.
PMI, PMIX = "PMI", "PMIx"

SLURM = "Slurm's srun"

# Whole names, and what others begin with.
_FOR_MPI = re.compile(
    r"(PMI|PMI2|PMIX|I_MPI_PMI|PALS|MPI_LOCALRANKID|MPI_LOCALNRANKS|HYDI|HYDRA|OMPI_COMM_WORLD|MV2_COMM_WORLD)(_|$)"
)

_DEFAULT_PORT = 29500
# Seconds.
_ANSWER_LIMIT = 1.0
_READ_LIMIT = 0.5
_OUTPUTS = 1, 2  # descriptors, whatever sys.stdout and sys.stderr are
_CLAIM = "TORCH_RPC_MPI_LAUNCHED"


@dataclass(frozen=True)
class Launcher:
    """What started this process, or a parent of it, as a rank. None: the environment does not tell."""

    name: str
    rank: int | None
    size: int | None
    local_rank: int | None = None  # among the ranks of this host
    local_size: int | None = None
    first_host: str | None = None  # where rank 0 runs, unless the user has put the hosts in an order of his own
    job: str | None = None  # what the launcher calls this launch
    interfaces: tuple[str, ...] = ()  # of PMI and PMIX, those that it offers

    @property
    def expected_size(self) -> int:
        """The least number of ranks that the launcher started."""
        return max(self.size or 1, (self.rank or 0) + 1)


def find_launcher(environ: Environment = os.environ) -> Launcher | None:
    """The launcher of MPI's ranks that started this process, or a parent of it; None if there is none."""
    return next(filter(None, (row.read(environ) for row in _LAUNCHERS)), None)


def find_torchrun(environ: Environment = os.environ) -> Launcher | None:
    """torchrun, if it started this process or a parent of it, which may be in a task of ``find_launcher``'s."""
    return _TORCHRUN.read(environ)


def all_ranks_are_here(environ: Environment = os.environ) -> bool:
    """Whether a launcher of the MPICH family has started all ranks on this host."""
    ranks_here = environ.get("MPI_LOCALNRANKS")
    return ranks_here is not None and ranks_here == environ.get("PMI_SIZE")


def is_first_of_host(environ: Environment = os.environ) -> bool:
    """Whether this process is to speak for all of its host, when what they have in common comes to each of them."""
    launcher = find_torchrun(environ) or find_launcher(environ)
    return launcher is None or launcher.local_rank in (0, None)


def variables_for_mpi(environ: Environment = os.environ) -> list[str]:
    """Those from which MPI itself learns of a launch.

    In a process that a launcher has started only indirectly, through torchrun or multiprocessing, they are about a
    parent: MPI would take this process for that rank, or fail.
    """
    return [name for name in environ if _FOR_MPI.match(name)]


def master_port(launcher: Launcher) -> int:
    """A port for MASTER_PORT where it is unset, the same for all ranks of a launch, and another for another's.

    Below those that Linux gives to whoever asks for any. Torch's own default where the launch has no name.
    """
    return _DEFAULT_PORT if launcher.job is None else 20_000 + zlib.crc32(launcher.job.encode()) % 12_000


def managers_job(environ: Environment = os.environ) -> str | None:
    """What the cluster's manager calls the job of which the launch is part; None if there is none."""
    return next((environ[name] for name in ("SLURM_JOB_ID", "PBS_JOBID") if environ.get(name)), None)


def claim(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tells the processes that this one starts that the variables of a launcher are about this one, not about them."""
    if find_launcher(environ) is not None and not is_claimed_by_another(environ):
        environ[_CLAIM] = f"{os.getpid()} {_identity(environ)}"


def is_claimed_by_another(environ: Environment = os.environ) -> bool:
    """Whether another process, which has started this one, is what the launcher's variables are about."""
    pid, _, claimed = environ.get(_CLAIM, "").partition(" ")
    return pid not in ("", str(os.getpid())) and claimed == _identity(environ)


def is_within_another(environ: Environment = os.environ) -> bool:
    """Whether this launch is not the one that a process has claimed which has started this one."""
    _, _, claimed = environ.get(_CLAIM, "").partition(" ")
    return claimed not in ("", _identity(environ))


def end_job(status: int, environ: Environment = os.environ) -> None:
    """Has a launcher that speaks PMI-1 end all ranks, with this status, for one that has not begun MPI.

    Those of MPICH and Intel MPI do, and Slurm's plugin pmi2. They are given time to read what this one has written.
    """
    descriptor = _number(environ, "PMI_FD")
    try:
        if descriptor is None or not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return
        os.write(descriptor, b"cmd=init pmi_version=1 pmi_subversion=1\n")
        if not select.select([descriptor], [], [], _ANSWER_LIMIT)[0]:
            return
        os.read(descriptor, 1024)
        for output in _OUTPUTS:
            _wait_until_read(output)
        os.write(descriptor, f"cmd=abort exitcode={status}\n".encode())
    except OSError:
        return  # the launcher has ended


def _wait_until_read(descriptor: int) -> None:
    """As ``waitUntilRead`` of csrc/host/launcher_output.h, which says why."""
    try:
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return
        end = time.monotonic() + _READ_LIMIT
        while any(fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))) and time.monotonic() < end:
            time.sleep(0.001)
    except OSError:
        return  # it is closed


def _identity(environ: Environment) -> str:
    """Differs from launch to launch, as far as the environment does: a rank may run a launcher itself."""
    launcher = find_launcher(environ)
    return f"{launcher and (launcher.name, launcher.rank, launcher.size, launcher.job)} {environ.get('PMI_FD')}"


def first_of(hosts: str) -> str:
    """The first host of a list in Slurm's syntax: ``n01`` of ``n[01-04,07],gpu[1-2]-ib``."""
    first = re.split(r",(?![^\[]*\])", hosts, maxsplit=1)[0]
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def _number(environ: Environment, name: str | None) -> int | None:
    try:
        return int(environ[name]) if name else None
    except (KeyError, ValueError):
        return None


def _offered(environ: Environment) -> tuple[str, ...]:
    names = {PMI: ("PMI_RANK", "PMI_FD", "PMI_PORT"), PMIX: ("PMIX_RANK",)}
    return tuple(interface for interface, variables in names.items() if any(name in environ for name in variables))


def _first_host(environ: Environment) -> str | None:
    """Of the job, as what manages the cluster's resources says."""
    for name in ("SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(name):
            return first_of(environ[name])
    try:
        with open(environ["PBS_NODEFILE"]) as hosts:
            return hosts.readline().strip() or None
    except (KeyError, OSError):
        return None


def _of_flux(environ: Environment) -> int | None:
    """How many ranks are here: they are evenly spread where their number allows it, unless asked for otherwise."""
    size, nodes = _number(environ, "FLUX_JOB_SIZE"), _number(environ, "FLUX_JOB_NNODES")
    return size // nodes if size and nodes and size % nodes == 0 else None


def _of_slurm(environ: Environment) -> int | None:
    """How many ranks are here: the entry for this node of a list such as ``4(x2),3``."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = _number(environ, "SLURM_NODEID")
    return counts[node] if node is not None and node < len(counts) else None


def _is_slurms(environ: Environment) -> bool:
    """Whether no other launcher has started this process within the step whose variables it has."""
    step = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    others_pmi = "PMI_RANK" in environ and environ.get("PMI_JOBID") != step
    return not others_pmi and environ.get("PMIX_NAMESPACE", "slurm.").startswith("slurm.")


def _slurms_interfaces(environ: Environment) -> tuple[str, ...]:
    # Slurm's own libpmi.so asks srun itself; Intel MPI is told of it so.
    return (PMI,) if "I_MPI_PMI_LIBRARY" in environ else _offered(environ)


@dataclass(frozen=True)
class _Row:
    """The variables of one launcher."""

    name: str
    rank: str
    size: str | None
    local_rank: str | None
    local_size: str | Callable[[Environment], int | None] | None
    hosts: str | None = None  # those of this launch, if it says more than the job's
    job: tuple[str, ...] = ()
    interfaces: Callable[[Environment], tuple[str, ...]] = _offered
    sure: Callable[[Environment], bool] = lambda environ: True  # that these variables are this launcher's

    def read(self, environ: Environment) -> Launcher | None:
        rank, size = _number(environ, self.rank), _number(environ, self.size)
        if rank is None or not self.sure(environ):
            return None
        local_size = self.local_size(environ) if callable(self.local_size) else _number(environ, self.local_size)
        if self.hosts is not None and environ.get(self.hosts):
            first_host: str | None = first_of(environ[self.hosts])
        elif size is not None and size == local_size:
            first_host = socket.gethostname()
        else:
            first_host = _first_host(environ)
        return Launcher(
            self.name,
            rank,
            size,
            _number(environ, self.local_rank),
            local_size,
            first_host,
            ".".join(environ[name] for name in self.job if name in environ) or None,
            self.interfaces(environ),
        )


def _has(*names: str) -> Callable[[Environment], bool]:
    return lambda environ: all(_number(environ, name) is not None for name in names)


# In this order: what is inside comes before what it runs in. Open MPI's mpirun starts its daemons by srun, PALS and
# Flux set PMI_* as well. SLURM_STEP_NUM_TASKS and not SLURM_NTASKS, which a batch script has outside any srun.
_LAUNCHERS = (
    _Row(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        job=("PMIX_NAMESPACE",),
        interfaces=lambda environ: (PMIX,),
        sure=_has("OMPI_COMM_WORLD_SIZE"),
    ),
    _Row(
        "MVAPICH's mpirun",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        interfaces=lambda environ: (PMI,),
        sure=_has("MV2_COMM_WORLD_SIZE"),
    ),
    _Row("PALS", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE", job=("PALS_APID",)),
    _Row(
        "Flux",
        "FLUX_TASK_RANK",
        "FLUX_JOB_SIZE",
        "FLUX_TASK_LOCAL_ID",
        _of_flux,
        job=("FLUX_JOB_ID",),
        sure=_has("FLUX_JOB_SIZE"),
    ),
    _Row(
        "mpirun of MPICH or Intel MPI",
        "PMI_RANK",
        "PMI_SIZE",
        "MPI_LOCALRANKID",
        "MPI_LOCALNRANKS",
        interfaces=lambda environ: (PMI,),
        sure=_has("PMI_SIZE", "MPI_LOCALNRANKS"),
    ),
    _Row(
        SLURM,
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        _of_slurm,
        hosts="SLURM_STEP_NODELIST",
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
        interfaces=_slurms_interfaces,
        sure=lambda environ: _has("SLURM_STEP_NUM_TASKS")(environ) and _is_slurms(environ),
    ),
    _Row("PMI", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE", sure=_has("PMI_SIZE")),
    _Row("PMIx", "PMIX_RANK", None, None, None, job=("PMIX_NAMESPACE",)),
)

_TORCHRUN = _Row(
    "torchrun",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    hosts="MASTER_ADDR",
    job=("TORCHELASTIC_RUN_ID",),
    interfaces=lambda environ: (),
    sure=lambda environ: "TORCHELASTIC_RUN_ID" in environ,
)
