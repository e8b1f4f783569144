"""Who brings the ranks together: the launcher, from which MPI learns of its world, or we, through a store.

Decided before MPI starts, of what the environment says and of which MPI it is.
"""

from __future__ import annotations

import multiprocessing
import os

from . import _launchers, _mpi, _pmi, _world


def through_store(rank: int, world_size: int) -> bool:
    """Whether the ranks come together through a store, because no launcher brings this process into MPI's world.

    Args:
        rank, world_size: as given to ``init_rpc``, completed by :func:`complete`; -1 = unknown.
    """
    if _world.is_formed():
        return True
    if _mpi.is_initialized():
        return False
    several = max(world_size, rank + 1) > 1
    launcher = _launchers.find_launcher()
    if launcher is None:
        return several
    if _is_about_a_parent():
        return several or (rank, world_size) == (0, 1)
    # A task of one rank: an interactive shell or a notebook under srun, a driver that starts the ranks itself.
    return several and (
        launcher.expected_size == 1 or _pmi.leaves_it_to_us(launcher) or _is_of_several_steps(launcher, world_size)
    )


def _is_of_several_steps(launcher: _launchers.Launcher, world_size: int) -> bool:
    """Whether the ranks are tasks of several steps of Slurm's, each of which is a world to MPI."""
    return (
        launcher.name == _launchers.SLURM
        and launcher.size is not None
        and world_size > launcher.size
        and "MASTER_ADDR" in os.environ
        and _pmi.forms_worlds_without_launcher()
    )


def complete(rank: int, world_size: int) -> tuple[int, int]:
    """Rank and world size; where unknown (-1), what torchrun says, if it started this process.

    Or what Slurm says, if that does not reach MPI.
    """
    told = _launchers.find_torchrun()
    if told is None and not _is_about_a_parent() and (_world.is_formed() or not _mpi.is_initialized()):
        launcher = _launchers.find_launcher()
        told = launcher if launcher is not None and _pmi.leaves_it_to_us(launcher) else None
    if told is None:
        return rank, world_size
    return _or(rank, told.rank), _or(world_size, told.size)


def _or(given: int, told: int | None) -> int:
    return told if given == -1 and told is not None else given


def refuse() -> None:
    """Raises RuntimeError, with the remedy, where MPI would not learn of the world that the launcher started."""
    if _mpi.is_initialized() or _is_about_a_parent():
        return
    launcher = _launchers.find_launcher()
    if launcher is not None:
        _pmi.refuse(launcher)


def _is_about_a_parent() -> bool:
    """Whether what the environment tells of an MPI launcher is not about this process."""
    return (
        _launchers.find_torchrun() is not None
        or _launchers.is_claimed_by_another()
        or multiprocessing.parent_process() is not None
    )


def check(mpi: _mpi.LoadedMPI, rank: int, world_size: int, alone_on_purpose: bool) -> None:
    """Raises RuntimeError when this process is alone in MPI's world and nobody asked for that.

    Args:
        rank, world_size: as given to ``init_rpc``, or -1.
        alone_on_purpose: the user has asked for a world, or a communicator, of his own.
    """
    if alone_on_purpose or mpi.MPI.COMM_WORLD.Get_size() > 1:
        return
    launcher = _launchers.find_launcher()
    wanted = max(world_size, rank + 1)
    early = "MPI was initialised before it (by `from mpi4py import MPI` or another library), so"
    if launcher is not None and launcher.expected_size > 1 and not _is_about_a_parent():
        if _pmi.leaves_it_to_us(launcher):
            raise RuntimeError(
                f"Call init_rpc before `from mpi4py import MPI`, or start the program with `srun --mpi=pmi2`: {early} "
                f"this process is alone in MPI's world, which does not learn from {launcher.name} that it is rank "
                f"{launcher.rank} of {launcher.size}."
            )
        raise RuntimeError(
            f"{launcher.name} started this process as rank {launcher.rank} of {launcher.size or 'several'}, but MPI "
            f"({mpi.library()}) sees this process alone: it did not learn of the others from that launcher. "
            f"{_pmi.remedy(launcher)}"
        )
    if wanted > 1:
        first = (
            "Call init_rpc before `from mpi4py import MPI`, or start"
            if _pmi.forms_worlds_without_launcher()
            else "Start"
        )
        raise RuntimeError(
            f"{first} the program with `mpirun -n {wanted} python script.py`: init_rpc was asked for {wanted} ranks, "
            f"but {early} this process is alone in MPI's world."
        )
    if launcher is None:
        raise RuntimeError(
            "this process was started without an MPI launcher, so it is alone in MPI's world. Start the program with "
            "one: `mpirun -n 4 python script.py`. Without one, pass rank and world_size to init_rpc, which then brings "
            "the ranks together through init_method. If a single process is meant, pass rank=0, world_size=1."
        )
