"""Which rank of which world this process is, as far as can be known before there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed.rpc as rpc

from .. import _mpi, _torch_api, _world

# What says how many ranks a host has, by launcher.
_RANKS_HERE = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True)
class Place:
    """This process in the world that it would form."""

    launcher: str = ""  # what started it as a rank; empty: nothing
    rank: int = 0
    size: int | None = 1  # None: MPI will tell
    ranks_here: int | None = None  # on this host; None: not known
    by_store: bool = False  # the ranks find each other through torch's store

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def name(self) -> str:
        return f"worker{self.rank}"

    @classmethod
    def find(cls, environ: Mapping[str, str] = os.environ) -> Place:
        rank, size = _world.complete(-1, -1, environ)
        if 0 <= rank < size:
            return cls("torchrun", rank, size, _number(environ.get("LOCAL_WORLD_SIZE")), by_store=True)
        launcher = _mpi.find_launcher(environ)
        if launcher is None:
            return cls()
        counts = [_number(environ.get(variable)) for variable in _RANKS_HERE]
        here = next(filter(None, counts), 1 if launcher.size == 1 else None)
        return cls(launcher.name, launcher.rank or 0, launcher.size, here)

    @contextlib.contextmanager
    def session(self, **options: Any) -> Iterator[None]:
        """A session of all ranks, of which this one is ``name``."""
        from .. import MPIRpcBackendOptions

        place = {"rank": self.rank, "world_size": self.size} if self.by_store or self.alone else {}
        init_rpc: Any = rpc.init_rpc
        init_rpc(self.name, backend="MPI", rpc_backend_options=MPIRpcBackendOptions(**options), **place)
        yield
        rpc.shutdown()


def worker_names() -> list[str]:
    """Those of the session, by rank."""
    infos = _torch_api.get_current_rpc_agent().get_worker_infos()
    return [info.name for info in sorted(infos, key=lambda info: info.id)]


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
