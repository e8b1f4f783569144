"""The variables that torchrun sets for its workers, for programs that read them, under launchers that do not."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import replace

from . import _launchers
from ._launchers import Launcher

_PLACE = {"RANK": "rank", "WORLD_SIZE": "size", "LOCAL_RANK": "local_rank", "LOCAL_WORLD_SIZE": "local_size"}
# Which of the variables are set by us, and so no longer true in a launch that a rank starts.
_OURS = "TORCH_RPC_MPI_VARIABLES"


def set_variables(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets those that are not set, where a launcher started this process as one of its ranks."""
    launcher = _launchers.find_launcher(environ)
    if launcher is None or _launchers.find_torchrun(environ) is not None or _launchers.is_claimed_by_another(environ):
        return
    if _launchers.is_within_another(environ):
        for name in environ.pop(_OURS, "").split():
            environ.pop(name, None)
    if environ.keys() >= {*_PLACE, "MASTER_ADDR", "MASTER_PORT"}:
        return
    alone = launcher.size is not None and launcher.local_size == launcher.size
    launcher = replace(launcher, job=launcher.job or (_daemon(launcher) if alone else _launchers.managers_job(environ)))
    if None in (launcher.size, launcher.local_rank, launcher.local_size, launcher.first_host, launcher.job):
        launcher = _as_mpi_says(launcher)
    alone = launcher.local_size == launcher.size
    variables = {name: str(getattr(launcher, of_launcher)) for name, of_launcher in _PLACE.items()}
    variables["MASTER_ADDR"] = "127.0.0.1" if alone else str(launcher.first_host)
    # All ranks come to it without a word. It is used by what is not RPC.
    variables["MASTER_PORT"] = str(_launchers.master_port(launcher))
    ours = {name: value for name, value in variables.items() if name not in environ}
    environ.update(ours)
    environ[_OURS] = " ".join(ours)


def _as_mpi_says(launcher: Launcher) -> Launcher:
    """The same from MPI itself, which begins with that, in all ranks."""
    from . import _launch, _mpi, _tensorpipe

    _launch.refuse()
    MPI = _mpi.load(_tensorpipe.init_timeout()).MPI
    world = MPI.COMM_WORLD
    here = world.Split_type(MPI.COMM_TYPE_SHARED)
    place = {"local_rank": here.Get_rank(), "local_size": here.Get_size()}
    here.Free()
    host, pid = world.bcast((socket.gethostname(), os.getpid()))
    job = launcher.job or f"{host} {pid}"
    return replace(launcher, rank=world.Get_rank(), size=world.Get_size(), first_host=host, job=job, **place)


def _daemon(launcher: Launcher) -> str | None:
    """The process that has started the ranks of this host: the nearest that is not told what they are.

    Between it and a rank may be shells and the like, of which each rank has its own. None where it is not seen, because
    each rank is in a namespace of its own.
    """
    pid = os.getppid()
    while pid > 1 and _launchers.find_launcher(_environment_of(pid)) == launcher:
        pid = int(_stat(pid)[1])
    return f"{pid} since {_stat(pid)[19]}" if pid > 1 else None


def _stat(pid: int) -> list[str]:
    """The fields of a process that follow its name: state, parent, ..., the time of its start."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _environment_of(pid: int) -> Mapping[str, str]:
    """What a process began with; nothing, if it is another user's."""
    try:
        with open(f"/proc/{pid}/environ", errors="replace") as file:
            return dict(line.split("=", 1) for line in file.read().split("\0") if "=" in line)
    except OSError:
        return {}
