"""Worlds of three ranks that lose one while they shut down or gather. Run by test_losses.py, with those of deaths.py.

    python deaths.py DIRECTORY CASE...

The ranks of each case are forked, because importing torch takes longer than a case. Prints a line of JSON for each
case: its name, and what went wrong in it.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.rpc as rpc
from torch.distributed.rpc import api

SIZE = 3
LIMIT = 40.0  # seconds for a case
CLOCK = struct.calcsize("d")  # what the ranks share: when one was lost, and a byte of each that knows all others
AT_ONCE = 3.0  # seconds from a rank's end until the others know: one is promised, where there is a core for them
DELETE = "_delete_all_user_and_unforked_owner_rrefs"

WAYS: dict[str, tuple[Callable[[], object], int]] = {}  # how a rank ends, and its exit status
MOMENTS: dict[str, Callable[[Rank], None]] = {}  # what the lost rank and the others do
CASES: dict[str, Case] = {}


class Case(NamedTuple):
    moment: str
    way: str
    lost: int  # rank; 0 leads torch's all-gather


def way(status: int) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def register(function: Callable[[], object]) -> Callable[[], object]:
        WAYS[function.__name__] = (function, status)
        return function

    return register


def moment(*, ways: tuple[str, ...] = ("is_killed",), ranks: tuple[int, ...] = (0, 1)) -> Callable[..., None]:
    def register(function: Callable[[Rank], None]) -> None:
        MOMENTS[function.__name__] = function
        for way in ways:
            for lost in ranks:
                role = "leader" if lost == 0 else "follower"
                CASES[f"{role}_{way}_{function.__name__}"] = Case(function.__name__, way, lost)

    return register


@way(1)
def raises() -> None:
    raise ValueError("on purpose")


@way(3)
def exits() -> None:
    sys.exit(3)


@way(4)
def exits_at_once() -> None:
    os._exit(4)


@way(-signal.SIGKILL)
def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@way(-signal.SIGTERM)
def is_terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@way(-signal.SIGSEGV)
def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


class Rank:
    """This rank of the case."""

    def __init__(self, case: Case, rank: int, store: Path, shared: mmap.mmap) -> None:
        self.case, self.rank, self._store, self._shared = case, rank, store, shared
        self.is_lost = rank == case.lost
        self.lost_name = f"worker{case.lost}"
        self.survivors = {f"worker{other}" for other in range(SIZE) if other != case.lost}

    def begin(self, rank: int, size: int) -> None:
        import torch_rpc_mpi

        options = torch_rpc_mpi.MPIRpcBackendOptions(init_method=f"file://{self._store}")
        rpc.init_rpc(f"worker{self.rank}", rank=rank, world_size=size, rpc_backend_options=options)

    def lose(self, *_: object) -> None:
        """Ends this rank."""
        self._shared[:CLOCK] = struct.pack("d", time.monotonic())
        WAYS[self.case.way][0]()

    def lost_at(self) -> float:
        return float(struct.unpack("d", self._shared[:CLOCK])[0])

    def await_all(self) -> None:
        self._shared[CLOCK + self.rank] = 1
        until(lambda: all(self._shared[CLOCK:]))

    def await_loss(self) -> None:
        until(lambda: self.lost_at() > 0)

    def await_survivors(self) -> None:
        """As await_all(), without the lost one."""
        self._shared[CLOCK + self.rank] = 2
        until(lambda: all(self._shared[CLOCK + other] == 2 for other in range(SIZE) if other != self.case.lost))

    def await_reports(self, workers: set[str]) -> None:
        """Returns when these are in the all-gather that ``worker0`` leads."""
        until(lambda: rpc.rpc_sync("worker0", reported) >= workers)

    def fails(self, wait: Callable[[], object], what: str) -> None:
        """Expects an error at once, that says what is not possible and names the lost rank, and none that lives."""
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=f"{what}.* is not possible: ") as caught:
            wait()
        reason = str(caught.value).partition("is not possible: ")[2]
        assert reason.startswith(f"RPC to worker '{self.lost_name}' "), reason
        assert not any(name in reason for name in self.survivors), reason
        took = time.monotonic() - max(self.lost_at(), began)
        assert self.lost_at() > 0
        assert took < AT_ONCE, f"after {took:.2f} s"

    def shutdown_fails(self) -> None:
        self.fails(rpc.shutdown, "A graceful shutdown of RPC")
        assert not api._is_current_rpc_agent_set()


def until(condition: Callable[[], bool], limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def reported() -> set[str]:
    with api._all_gather_dict_lock:
        return {name for states in api._all_gather_sequence_id_to_states.values() for name in states.gathered_objects}


def identity(x: object) -> object:
    return x


@moment(ways=("raises", "is_killed"))
def before_the_others_shut_down(rank: Rank) -> None:
    if rank.is_lost:
        rank.lose()
    rank.await_loss()
    rank.shutdown_fails()


_requests = threading.Semaphore(0)  # for RRefs, at the rank that is to be lost


def has_been_asked() -> None:
    _requests.release()


@moment()
def that_was_asked_for_rrefs(rank: Rank) -> None:
    """One of them never comes, the other one was never asked for."""
    if rank.is_lost:
        for _ in rank.survivors:
            _requests.acquire()
        rank.lose()
    unanswered = rpc.remote(rank.lost_name, time.sleep, args=(LIMIT,))
    rpc.rpc_async(rank.lost_name, has_been_asked)  # its answer may come or not
    rank.await_loss()
    late = rpc.remote(rank.lost_name, identity, args=(1,))
    rank.shutdown_fails()
    del unanswered, late


@moment(ways=("raises", "exits", "exits_at_once", "is_killed"))
def while_the_others_shut_down(rank: Rank) -> None:
    if rank.is_lost:
        rank.await_reports(rank.survivors)
        rank.lose()
    rank.shutdown_fails()


@moment(ranks=(1,))
def when_the_leader_knows_that_it_came(rank: Rank) -> None:
    """In its own shutdown; the third rank comes later."""
    if rank.is_lost:
        threading.Thread(target=lambda: (rank.await_reports({rank.lost_name}), rank.lose()), daemon=True).start()
        rpc.shutdown()
    if rank.rank == 2:
        rank.await_loss()
    rank.shutdown_fails()


@moment(ranks=(1,))
def when_the_leader_calls_back(rank: Rank) -> None:
    if rank.is_lost:
        api._broadcast_to_followers = rank.lose
        rpc.shutdown()
    rank.shutdown_fails()


@moment(ranks=(0,))
def when_it_has_called_back_to_one(rank: Rank) -> None:
    if rank.is_lost:
        torchs = api.rpc_async

        def call_and_die(*args: object, **kwargs: object) -> None:
            torchs(*args, **kwargs).wait()
            rank.lose()

        api.rpc_async = call_and_die
        rpc.shutdown()
    rank.shutdown_fails()


@moment()
def while_rrefs_are_deleted(rank: Rank) -> None:
    """After the all-gather; it owns one of each."""
    rref = rpc.remote(rank.lost_name, identity, args=(1,))
    assert rref.to_here() == 1
    if rank.is_lost:
        setattr(api, DELETE, rank.lose)
        rpc.shutdown()
    rank.shutdown_fails()


@moment(ways=("raises", "is_killed"))
def while_the_others_gather(rank: Rank) -> None:
    """Their session goes on without it, and a later one is as good as the first."""
    if rank.is_lost:
        rank.await_reports(rank.survivors)
        rank.lose()
    rank.fails(lambda: api._all_gather(rank.rank), "An all-gather over RPC of 'worker0', 'worker1', 'worker2'")
    rank.fails(lambda: api._all_gather(rank.rank), "An all-gather over RPC of 'worker0', 'worker1', 'worker2'")
    for _ in range(2):
        gathered = api._all_gather(rank.rank, rank.survivors)
        assert gathered == {name: int(name[-1]) for name in rank.survivors}, gathered
    rank.shutdown_fails()
    rank.begin(rank.rank - (rank.rank > rank.case.lost), SIZE - 1)
    assert set(api._all_gather(None)) == rank.survivors
    rpc.shutdown()


@moment(ranks=(1,))
def while_the_others_are_in_a_barrier(rank: Rank) -> None:
    """torch logs the error."""
    if rank.is_lost:
        rank.await_reports(rank.survivors)
        rank.lose()
    logged: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(str(record.exc_info and record.exc_info[1]))

    api.logger.addHandler(Handler())
    api.logger.propagate = False  # torch's own handler imports SymPy first
    api._barrier({f"worker{other}" for other in range(SIZE)})
    assert time.monotonic() - rank.lost_at() < AT_ONCE
    assert len(logged) == 1, logged
    assert f"'{rank.lost_name}' " in logged[0], logged
    rpc.shutdown(graceful=False)


@moment(ways=("exits",), ranks=(1,))
def after_it_has_gathered_with_the_others(rank: Rank) -> None:
    """Nobody's all-gather fails of one that has left when it was over."""
    assert len(api._all_gather(rank.rank)) == SIZE
    if rank.is_lost:
        rank.lose()
    rank.await_loss()
    rpc.shutdown(graceful=False)


@moment(ways=("exits",), ranks=(0,))
def after_another_thread_has_shut_rpc_down(rank: Rank) -> None:
    """It waits in an all-gather to which nobody comes."""
    if rank.is_lost:
        errors: list[str] = []

        def gather() -> None:
            try:
                api._all_gather(None)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=gather)
        thread.start()
        rank.await_reports({rank.lost_name})
        rpc.shutdown(graceful=False)
        thread.join()
        assert len(errors) == 1, errors
        assert "is not possible: RPC was shut down on this worker" in errors[0], errors
        rank.lose()
    rank.await_loss()
    rpc.shutdown(graceful=False)


def run(rank: Rank) -> None:
    faulthandler.dump_traceback_later(LIMIT - 5, exit=True)
    torch.set_num_threads(1)  # here too: else torch's threads find its pool gone, which did not survive the fork
    rank.begin(rank.rank, SIZE)
    # Nobody is lost before all know each other.
    for other in range(SIZE):
        rpc.rpc_sync(f"worker{other}", torch.add, args=(torch.ones(1), 1))
    rank.await_all()
    MOMENTS[rank.case.moment](rank)
    faulthandler.cancel_dump_traceback_later()


def problems_of(case: Case, pids: list[int], outputs: list[Path]) -> list[str]:
    """Waits for the ranks."""
    deadline = time.monotonic() + LIMIT
    problems = []
    for rank, pid in enumerate(pids):
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.005)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        expected = WAYS[case.way][1] if rank == case.lost else 0
        if status != expected:
            problems.append(f"rank {rank} ended with status {status}, not {expected}:\n{outputs[rank].read_text()}")
    return problems


def main() -> None:
    directory = Path(sys.argv[1]).resolve()
    for name in sys.argv[2:]:
        case = CASES[name]
        shared = mmap.mmap(-1, CLOCK + SIZE)
        outputs = [directory / f"{name}.{rank}" for rank in range(SIZE)]
        pids = []
        for rank, output in enumerate(outputs):
            pid = os.fork()
            if pid == 0:
                file = os.open(output, os.O_WRONLY | os.O_CREAT)
                os.dup2(file, 1)
                os.dup2(file, 2)
                run(Rank(case, rank, directory / f"{name}.store", shared))
                return  # and so ends as a program of its own does
            pids.append(pid)
        print(json.dumps([name, problems_of(case, pids, outputs)]), flush=True)
