"""By which path a tensor gets from the device of one rank to that of another: a session with device maps, which asks.

Each rank uses one device, as a program with one rank for each device would: that of its number on its host.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed.rpc as rpc

from .. import _torch_api
from . import pairs
from .devices import Devices
from .facts import Fact, Status, count_text

_ELEMENTS = 200_000  # smaller tensors go through pinned memory anyway: see docs/devices.md
_LIMIT = 5.0  # seconds, in which two ranks agree on a path; a call takes longer where one makes its context
_NAMED = 6  # pairs of ranks in a fact; all are in the JSON
_OFFERED = "(ipc is offered)"
_LONG = {"mpi": "by MPI", "pinned": "pinned memory"}
_NO_LINK = "where it matters, a device that can (`nvidia-smi topo -p2p r`); virtual machines and IOMMUs may forbid it"


@dataclass(frozen=True)
class Path:
    """From one rank to another."""

    sender: int
    receiver: int
    name: str  # "ipc", "mpi" or "pinned"
    why: str = ""  # not ipc, where that is known
    error: str = ""  # instead of a path

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


_chosen: list[str] = []  # the devices of all ranks, by rank; empty: it has none


def choose(ranks: Sequence[Mapping[str, Any]], own: Sequence[Devices]) -> list[str]:
    """Which device each rank uses, of the kind of the first that has any.

    Args:
        ranks: their hosts, and more.
        own: what they have.
    """
    kinds = [devices.kind for devices in own if devices.sendable]
    before: Counter[str] = Counter()  # ranks, by host
    chosen = []
    for rank, devices in zip(ranks, own, strict=True):
        fits = devices.sendable and devices.kind == kinds[0]
        chosen.append(f"{devices.kind}:{before[rank['host']] % devices.sendable}" if fits else "")
        before[rank["host"]] += 1
    return chosen


def learn(chosen: Sequence[str]) -> None:
    """Called at each rank before the session."""
    _chosen[:] = chosen


def are_wanted() -> bool:
    """Whether there are devices between which a tensor can go."""
    return sum(device != "" for device in _chosen) > 1


def maps(rank: int) -> dict[str, dict[str, str]]:
    """Those of this rank."""
    here = _chosen[rank]
    return {f"worker{other}": {here: there} for other, there in enumerate(_chosen) if here and there}


def ask_all(names: Sequence[str], limit: float) -> list[Path]:
    """Asks each rank for its path to each other, in rounds as of a tournament."""
    found = []
    for round_ in pairs.rounds(len(names)):
        for ways in (round_, [(second, first) for first, second in round_]):
            ways = [way for way in ways if all(_chosen[rank] for rank in way)]
            orders = [
                rpc.rpc_async(names[sender], find, (names[receiver], _chosen[sender]), timeout=limit + _LIMIT)
                for sender, receiver in ways
            ]
            found += [_answer(*way, order) for way, order in zip(ways, orders, strict=True)]
    return found


def _answer(sender: int, receiver: int, order: torch.futures.Future[tuple[str, str]]) -> Path:
    try:
        return Path(sender, receiver, *order.wait())
    except RuntimeError as error:
        return Path(sender, receiver, "", error=str(error).strip().split("\n")[0])


def find(receiver: str, device: str) -> tuple[str, str]:
    """The path from this rank, and why it is not the short one. Called at the sender."""
    tensor = torch.ones(_ELEMENTS, device=device)
    rpc.rpc_sync(receiver, _take, (tensor,))  # makes contexts, and the offer
    deadline = time.monotonic() + _LIMIT
    while _OFFERED in (told := _path_to(receiver)) and time.monotonic() < deadline:
        rpc.rpc_sync(receiver, _take, (tensor,))
    name, _, why = told.partition(" ")
    return name, why.removeprefix("(").removesuffix(")")


def _path_to(receiver: str) -> str:
    """As the metric has it after the devices; of other hosts there is one for all."""
    told = _torch_api.get_current_rpc_agent().get_debug_info()
    return told.get(f"mpi.device_path.{receiver}", "").partition(" ")[2] or told["mpi.device_path"]


def _take(tensor: torch.Tensor) -> None:
    pass


def verdicts(paths: Sequence[Path], hosts: Sequence[str]) -> Iterator[Fact]:
    """What there is to say of them.

    Args:
        hosts: by rank.
    """
    if not paths:
        return
    key = "device_paths"
    counts = Counter(path.name for path in paths if not path.error)
    named = ", ".join(f"{name} in {count} of {count_text(len(paths), 'way')}" for name, count in counts.items())
    yield Fact(key, f"between every two ranks: {named or 'none'}")
    for error, failed in _by(paths, "error"):
        remedy = "look at the devices above; CPU tensors are not concerned"
        yield Fact(key, f"{_list(failed, hosts)}: failed: {error}", Status.PROBLEM, remedy)
    within = [path for path in paths if hosts[path.sender] == hosts[path.receiver]]
    for why, closed in _by(within, "why"):
        cause, _, remedy = why.partition(". ")
        yield Fact(key, f"{_list(closed, hosts)}: {_LONG[closed[0].name]}: {cause}", Status.WARNING, remedy or _NO_LINK)
    for name, way in _LONG.items():
        forced = [path for path in within if path.name == name and not path.why]
        if forced:
            because = "as device_path says, or torch does not tell the UUIDs of the devices"
            yield Fact(key, f"{_list(forced, hosts)}: {way}, {because}", Status.NOTE)


def _by(paths: Iterable[Path], what: str) -> list[tuple[str, list[Path]]]:
    """Those that have this text, together where it is the same."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[getattr(path, what)].append(path)
    groups.pop("", None)
    return list(groups.items())


def _list(paths: Sequence[Path], hosts: Sequence[str]) -> str:
    texts = [f"{pairs.who(path.sender, hosts)} to {pairs.who(path.receiver, hosts)}" for path in paths[:_NAMED]]
    return "; ".join([*texts, *([f"and {len(paths) - _NAMED} more"] if len(paths) > _NAMED else [])])
