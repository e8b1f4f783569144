"""How ranks that no launcher brought together find each other: stores, from ``mpi://`` or what the options name."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from torch.distributed.rendezvous import rendezvous as torchs_rendezvous

from . import _launch, _launchers, _waiting, _world
from ._torch_api import RENDEZVOUS_TCP_STORE, HashStore, Replacements, Store
from .options import MPIRpcBackendOptions

DEFAULT_URL = "mpi://"


def rendezvous(url: str, **kwargs: Any) -> Iterator[tuple[Store, int, int]]:
    """Torch's handler of ``mpi://``.

    Where MPI brings the ranks together, a store of this process alone; else what ``env://`` gives. ``mpi:URL`` gives
    what the URL does, see :func:`made_interruptible`.
    """
    inner = url.removeprefix("mpi:")
    if urlsplit(inner).scheme:
        yield _meet_interruptibly(inner)
        return
    query = dict(parse_qsl(urlsplit(url).query))
    rank, world_size = int(query.get("rank", -1)), int(query.get("world_size", -1))
    # init_process_group passes its timeout here, init_rpc passes nothing.
    if kwargs:
        raise ValueError(
            'init_method="mpi://" serves torch.distributed.rpc.init_rpc(backend="MPI") only. Give '
            "init_process_group a store that the ranks share (env://, tcp://host:port or file:///path)."
        )
    if world_size > 1 and _launch.through_store(rank, world_size):
        yield _store_of_environment(rank, world_size), rank, world_size
    else:
        yield HashStore(), rank, world_size


_store: Store | None = None
_abandoned: list[list[Store]] = []
_limit = 0.0  # seconds for a rendezvous, that of the init_rpc that has begun last; 0 = none


def _meet_interruptibly(*where: Any) -> tuple[Store, int, int]:
    """Torch's rendezvous. One that a signal ends goes on, and what it finds is kept.

    Its store may have a server, to which other ranks have come meanwhile: without it they would be lost to the next
    attempt, which shares the server. Rank 0, which has the server, does not wait for the others here, where nobody
    could tell who is missing.
    """
    found: list[Store] = []
    begin = time.monotonic()

    def meet() -> tuple[Store, int, int]:
        without_waiting = Replacements()
        torchs = RENDEZVOUS_TCP_STORE.current
        without_waiting.make({RENDEZVOUS_TCP_STORE: functools.partial(torchs, wait_for_workers=False)})
        try:
            met: tuple[Store, int, int] = next(torchs_rendezvous(*where))
        finally:
            without_waiting.undo()
        found.append(met[0])
        return met

    def look() -> None:
        waited = time.monotonic() - begin
        if 0 < _limit <= waited:
            raise TimeoutError(
                f"rank 0 did not call init_rpc within {waited:.3g} s: it is to serve the store of {where[0]}, where "
                "nobody answers. Check that address and port are the same for all ranks and those of rank 0's host, "
                "see rank 0's output for an earlier error, or raise init_timeout."
            )

    try:
        return _waiting.interruptibly(meet, look)
    except BaseException:
        _abandoned.append(found)
        raise


def _store_of_environment(rank: int, world_size: int) -> Store:
    """The store of ``env://``, the same one for all sessions of a world.

    A new one for each would live in the process that is rank 0 then, and an early rank could take an old one for it.
    """
    global _store
    if _store is not None and _world.is_formed():
        return _store
    where = environments_url(rank, world_size)
    try:
        _store, _, _ = _meet_interruptibly(where, rank, world_size)
        return _store
    except ValueError as error:
        raise RuntimeError(
            f"init_rpc was asked for {world_size} ranks, but no MPI launcher started this process, and the ranks have "
            f"no store to find each other by: {error}. Start the program with `mpirun -n {world_size} python "
            "script.py` or with torchrun, set MASTER_ADDR and MASTER_PORT, or give init_method (tcp://host:port or "
            "file:///path) in the options."
        ) from error
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise RuntimeError(
            f"rank {rank} is to serve the store in which the ranks find each other, but its port is in use ({where}). "
            "Set MASTER_PORT to a free one, the same for all ranks."
        ) from error


def environments_url(rank: int, world_size: int) -> str:
    """``env://``, or the same place for all tasks of a step of Slurm's where nobody has named one."""
    step = _launchers.find_launcher()
    if step is None or step.name != _launchers.SLURM or step.first_host is None:
        return "env://"
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    # Who has ranks of his own makes them of several steps, of which none knows where rank 0 is.
    if host is None and (rank, world_size) != (step.rank, step.size):
        return "env://"
    if host is not None and port is not None:
        return "env://"
    return f"tcp://{host or step.first_host}:{port or _launchers.master_port(step)}"


def made_interruptible(options: MPIRpcBackendOptions) -> MPIRpcBackendOptions:
    """The options, with an ``init_method`` that lets the handlers of signals run while a TCPStore waits for others.

    The rendezvous that follows takes no longer than their ``init_timeout``.
    """
    global _limit
    _limit = options.init_timeout
    if urlsplit(options.init_method).scheme not in ("tcp", "env"):
        return options
    values: Any = {name: getattr(options, name) for name in options.table}
    return type(options)(**{**values, "init_method": f"mpi:{options.init_method}"})
