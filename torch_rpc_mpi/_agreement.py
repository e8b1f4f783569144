"""What the ranks tell each other while the group forms, and what they must agree on.

Every function here is pure and sees the same data on every rank, so that all ranks come to the same verdict and raise
the same error: nobody is left waiting for one that has given up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from . import _devices


@dataclass(frozen=True)
class Member:
    """One rank, as it describes itself to the others."""

    name: str
    host: str
    node: str  # ranks of one node reach each other through its memory
    pid: int
    address: str  # for its neighbours, see csrc/host/neighbours.h
    agreed: dict[str, Hashable]  # values that must be the same everywhere; see disagreement()
    wishes: _devices.Wishes


def check(members: Sequence[Member]) -> None:
    """Raises RuntimeError or ValueError if these members, in rank order, cannot form a group."""
    # Versions first: of ranks that run different ones, nothing else needs to make sense.
    _check_values(members)
    _check_names(members)


def rank_list(ranks: Iterable[int]) -> str:
    """``0-3, 7`` for ranks 0, 1, 2, 3 and 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _grouped(members: Sequence[Member], key: Callable[[Member], Hashable]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for rank, member in enumerate(members):
        groups.setdefault(key(member), []).append(rank)
    return groups


def _whereabouts(members: Sequence[Member], ranks: Sequence[int]) -> str:
    hosts = sorted({members[rank].host for rank in ranks})
    shown = ", ".join(hosts[:4]) + (", ..." if len(hosts) > 4 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {rank_list(ranks)} (on {shown})"


def _check_values(members: Sequence[Member]) -> None:
    lines = []
    for what in sorted(members[0].agreed.keys() | {key for member in members for key in member.agreed}):
        groups = _grouped(members, lambda member, what=what: member.agreed.get(what, "unknown"))  # type: ignore[misc]
        if len(groups) > 1:
            lines.append(f"  {what}:")
            lines += [f"    {value} on {_whereabouts(members, ranks)}" for value, ranks in groups.items()]
    if lines:
        raise RuntimeError(
            "the ranks disagree on values that must be the same everywhere:\n"
            + "\n".join(lines)
            + "\nGive every rank the same MPIRpcBackendOptions, TORCH_RPC_MPI_* environment and software environment."
        )


def _check_names(members: Sequence[Member]) -> None:
    clashes = {name: ranks for name, ranks in _grouped(members, lambda member: member.name).items() if len(ranks) > 1}
    if clashes:
        shown = "; ".join(f"{name!r} was given by {_whereabouts(members, ranks)}" for name, ranks in clashes.items())
        raise RuntimeError(
            f"RPC worker name is not unique: {shown}. Give every rank its own, such as "
            'init_rpc(f"worker{rank}", ...) with the rank that MPI gives: MPI.COMM_WORLD.Get_rank().'
        )
