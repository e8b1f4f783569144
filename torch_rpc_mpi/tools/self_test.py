"""A session of all ranks, in a child of each: who they are, and what passes between every two of them."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.rpc as rpc

from .. import _mpi, _world
from .._system import SHARED_MEMORY
from . import device_paths, pairs, trial
from .device_paths import Path as DevicePath
from .devices import Devices
from .facts import Fact, Status, count_text
from .pairs import Pair
from .place import Place, worker_names
from .trial import Tell, Trial

_CALLS, _LARGE_CALLS = 20, 3
_LARGE = 4 << 20  # bytes
_PAIR_LIMIT = 10.0  # seconds
_CONTEXT_LIMIT = 60.0  # in which a driver makes a context on a device
_WITH_DEVICES = "the session with device maps"
_SECONDS_A_ROUND = 2.0  # at most, on a busy machine; broken pairs come on top
_LOOKS, _LOOKED_AT = 4, 32  # further ones at pairs that seemed slow, and at how many of them
_UNKNOWN_SIZE = 256  # ranks that there may be where the launcher does not say

# Of this rank, which its child has from the fork.
_facts: list[Fact] = []
_devices: list[Devices] = []


def run(place: Place, facts: Sequence[Fact], devices: Devices, init_timeout: float) -> Trial:
    """The session in a child of this rank, and another one with devices if there are any."""
    _facts[:], _devices[:] = facts, [devices]
    return trial.run(lambda tell: _sessions(tell, place, init_timeout), limit_of(place, init_timeout))


def limit_of(place: Place, init_timeout: float) -> float:
    """Seconds that it may take."""
    return 2 * (init_timeout + 15 + _SECONDS_A_ROUND * (place.size or _UNKNOWN_SIZE))


def _sessions(tell: Tell, place: Place, init_timeout: float) -> None:
    _session(tell, place, init_timeout)
    if device_paths.are_wanted():
        _session_with_devices(tell, place, init_timeout)
    tell({}, "MPI_Finalize")
    if not _world.is_formed():
        _mpi.open_library().MPI.Finalize()
    tell({}, "the end")


def _session(tell: Tell, place: Place, init_timeout: float) -> None:
    tell({}, "init_rpc")
    begin = time.monotonic()
    with place.session(init_timeout=init_timeout, rpc_timeout=_PAIR_LIMIT):
        loaded = _mpi.open_library()
        found = {
            "init_seconds": time.monotonic() - begin,
            "thread_level": loaded.runtime.thread_level(),
            "mpi_size": loaded.MPI.COMM_WORLD.Get_size(),
        }
        tell(found, "the calls between the ranks")
        if place.rank == 0 and not _measure_all(tell):
            rpc.shutdown(graceful=False)  # the others learn of it, and do not wait for each other
            raise RuntimeError("some pairs of ranks do not work")
        tell({}, "rpc.shutdown")


def _session_with_devices(tell: Tell, place: Place, init_timeout: float) -> None:
    tell({}, _WITH_DEVICES)
    maps = device_paths.maps(place.rank)
    with place.session(init_timeout=init_timeout, rpc_timeout=_CONTEXT_LIMIT, device_maps=maps):
        if place.rank == 0:
            found = device_paths.ask_all(worker_names(), _CONTEXT_LIMIT)
            tell({"device_paths": [path.as_json() for path in found]}, "")


def _measure_all(tell: Tell) -> bool:
    """Rank 0 asks everybody; one that does not answer is told of in its place. Returns whether all goes."""
    names = worker_names()
    answers = _answers([rpc.rpc_async(name, describe, timeout=_PAIR_LIMIT) for name in names])
    ranks: list[dict[str, Any]] = [
        {"host": "?", "error": answer} if isinstance(answer, str) else answer for answer in answers
    ]
    tell({"ranks": ranks}, "")
    own = [Devices() if "error" in rank else Devices(**rank["devices"]) for rank in ranks]
    chosen = device_paths.choose(ranks, own)
    _answers([rpc.rpc_async(name, device_paths.learn, (chosen,), timeout=_PAIR_LIMIT) for name in names])
    measured = []
    for round_ in pairs.rounds(len(names)):
        measured += _measure_some(round_, names)
    hosts = [rank["host"] for rank in ranks]
    # Again, with nobody else about: what was slow because others were busy is not.
    for _ in range(_LOOKS):
        for pair in pairs.mark_slow(measured, hosts)[:_LOOKED_AT]:
            (again,) = _measure_some([(pair.first, pair.second)], names)
            if not again.error:
                pair.latency = min(filter(None, (pair.latency, again.latency)))
                pair.bandwidth = max(filter(None, (pair.bandwidth, again.bandwidth)))
    pairs.mark_slow(measured, hosts)
    tell({"pairs": [pair.as_json() for pair in measured]}, "")
    return not any(pair.error for pair in measured) and not any("error" in rank for rank in ranks)


def _measure_some(some: Sequence[tuple[int, int]], names: Sequence[str]) -> list[Pair]:
    """Those pairs at the same time."""
    limit = 2 * _PAIR_LIMIT
    orders = [rpc.rpc_async(names[first], measure, (names[second],), timeout=limit) for first, second in some]
    return [
        Pair(*ranks, error=answer) if isinstance(answer, str) else Pair(*ranks, *answer)
        for ranks, answer in zip(some, _answers(orders), strict=True)
    ]


def _answers(futures: Sequence[torch.futures.Future[Any]]) -> list[Any]:
    """What they bring; the text of an error instead of a result."""
    answers = []
    for future in futures:
        try:
            answers.append(future.wait())
        except Exception as error:
            answers.append(_text(error))
    return answers


def _text(error: Exception) -> str:
    return str(error).strip().split("\n")[0].removeprefix("RPCErr:1:")  # torch's mark


def measure(callee: str) -> tuple[float, float] | str:
    """Seconds of an empty call and bytes a second one way, the best of several; or what went wrong.

    Called at one rank of a pair.
    """
    try:
        rpc.rpc_sync(callee, _take)  # makes the connection
        latency = min(_seconds(callee) for _ in range(_CALLS))
        tensor = torch.ones(_LARGE, dtype=torch.uint8)
        return latency, _LARGE / min(_seconds(callee, tensor) for _ in range(_LARGE_CALLS))
    except RuntimeError as error:
        return _text(error)


def _seconds(callee: str, *tensors: torch.Tensor) -> float:
    begin = time.perf_counter()
    rpc.rpc_sync(callee, _take, tensors)
    return time.perf_counter() - begin


def _take(*tensors: torch.Tensor) -> None:
    pass


def describe() -> dict[str, Any]:
    """What this rank is and has. Called at each."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "cores": sorted(os.sched_getaffinity(0)),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "facts": [fact.as_json() for fact in _facts],
        "devices": dataclasses.asdict(_devices[0]),
    }


_LEVELS = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED", "MPI_THREAD_MULTIPLE")


def facts_of(done: Trial, place: Place) -> list[Fact]:
    """What the session has shown."""
    found = done.found
    facts = []
    if "thread_level" in found:
        level = found["thread_level"]
        remedy = "an MPI that was built with threads lets the program call MPI beside RPC" if level < 3 else ""
        facts.append(Fact("thread_level", _LEVELS[level], Status.OK if level == 3 else Status.WARNING, remedy))
        facts.append(Fact("init_rpc", f"{found['init_seconds']:.2f} s, with MPI_Init"))
    ranks = found.get("ranks", [])
    if ranks:
        facts.append(Fact("ranks", _ranks_text(ranks)))
        facts += _placements(ranks)
        facts += _of_other_hosts(ranks)
    facts += pairs.verdicts([Pair(**pair) for pair in found.get("pairs", [])], [rank["host"] for rank in ranks])
    paths = [DevicePath(**path) for path in found.get("device_paths", [])]
    facts += device_paths.verdicts(paths, [rank["host"] for rank in ranks])
    return [*facts, _outcome(done, place)]


def _outcome(done: Trial, place: Place) -> Fact:
    key = "session"
    if not done.failure:
        which = "of this process alone" if place.alone else "of all ranks"
        return Fact(key, f"one {which} began, ran and ended")
    said = f"; it printed: {done.said}" if done.said else ""
    ours = "RuntimeError: " in done.failure or "ImportError: " in done.failure or "TimeoutError: " in done.failure
    remedy = "" if ours else _REMEDIES.get(done.step, "")
    if "SIGBUS" in done.failure:
        remedy = f"make {SHARED_MEMORY} larger (`docker run --shm-size=1g`): so ends who finds it full"
    return Fact(key, f"{done.step} failed: {done.failure}{'' if ours else said}", Status.PROBLEM, remedy)


_REMEDIES = {
    "init_rpc": "look at the problems above; start with the launcher of the MPI that mpi4py loads, on one host first",
    "the calls between the ranks": "look at the pairs and ranks above",
    "rpc.shutdown": "look at the pairs and ranks above",
    _WITH_DEVICES: "look at the devices above, and at those of other hosts; CPU tensors are not concerned",
}


def _ranks_text(ranks: Sequence[dict[str, Any]]) -> str:
    hosts: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        hosts.setdefault(rank["host"], []).append(number)
    known = [rank for rank in ranks if "error" not in rank]
    files, threads = (max(rank[what] for rank in known) for what in ("files", "threads"))
    text = ", ".join(f"{host}: {_span(numbers)}" for host, numbers in hosts.items())
    has = f"a rank has up to {files} open files and {threads} threads"
    return f"{len(ranks)} on {count_text(len(hosts), 'host')} ({text}); {has}"


def _span(numbers: Sequence[int]) -> str:
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{numbers[0]}-{numbers[-1]}"
    return " ".join(map(str, numbers))


def _placements(ranks: Sequence[dict[str, Any]]) -> list[Fact]:
    """How the ranks of each host share its cores, where they are too few."""
    facts = []
    for host in dict.fromkeys(rank["host"] for rank in ranks):
        here = [rank for rank in ranks if rank["host"] == host and "error" not in rank]
        cores = {core for rank in here for core in rank["cores"]}
        if here and len(here) > len(cores):
            facts.append(
                Fact(
                    "placement",
                    f"{len(here)} ranks of host {host} share {count_text(len(cores), 'core')}: they take turns",
                    Status.WARNING,
                    "fewer ranks a host, more cores, or no binding (`mpirun --bind-to none`, `srun --cpu-bind=none`); "
                    "OMP_NUM_THREADS=1 eases it",
                )
            )
    return facts


def _of_other_hosts(ranks: Sequence[dict[str, Any]]) -> list[Fact]:
    """What is wrong on other hosts than that of rank 0, and which ranks have not answered."""
    facts = []
    seen = {ranks[0]["host"]}
    for number, rank in enumerate(ranks):
        if "error" in rank:
            facts.append(Fact("ranks", f"rank {number} did not answer: {rank['error']}", Status.PROBLEM))
        elif rank["host"] not in seen:
            seen.add(rank["host"])
            found = [Fact.from_json({**fact, "host": rank["host"]}) for fact in rank["facts"]]
            facts += [fact for fact in found if fact.status in (Status.WARNING, Status.PROBLEM)]
    return facts
