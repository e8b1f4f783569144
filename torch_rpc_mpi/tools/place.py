"""Which rank of which world this process is, as far as can be known before there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed.rpc as rpc

from .. import _launchers, _torch_api


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
    def find(cls, told: tuple[int, int] = (-1, -1), environ: Mapping[str, str] = os.environ) -> Place:
        """As the environment has it.

        Args:
            told: what ``_launch.complete`` says for rank and size -1, which may load MPI; without it, a world that MPI
                does not learn of from Slurm is taken for one that it does.
        """
        torchrun, launcher = _launchers.find_torchrun(environ), _launchers.find_launcher(environ)
        if torchrun is not None:
            return cls(torchrun.name, torchrun.rank or 0, torchrun.size, torchrun.local_size, by_store=True)
        if launcher is None:
            return cls()
        here = 1 if launcher.size == 1 else launcher.local_size
        rank, size = told
        if 0 <= rank < size:
            return cls(launcher.name, rank, size, here, by_store=True)
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
