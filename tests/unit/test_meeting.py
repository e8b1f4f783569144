"""How ranks without a launcher find each other: the store's side, without MPI."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore

from torch_rpc_mpi import _meeting, _world
from torch_rpc_mpi._meeting import Member, Membership


def member(name: str, rank: int) -> Member:
    return Member(f"{name}{rank}", "north", "north", 7, "MPICH 5", Membership("world", rank), None)


def check_in(store: Any, rank: int, size: int, name: str = "worker", limit: float = 60.0) -> list[str]:
    """The names of those whom this process meets."""
    _, members = _meeting.meet(store, member(name, rank), rank, size, time.monotonic() + limit)
    return [each.name for each in members]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What the calls return or raise."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def die_waiting(store: Any, ranks: tuple[int, ...], size: int) -> None:
    """Leaves in the store what processes leave there that are killed while they wait for the others."""
    meetings = [_meeting._Meeting(PrefixStore(str(size), store), member("dead", rank), rank, size) for rank in ranks]
    for _ in range(3):
        for meeting in meetings:
            assert not meeting.step()


@pytest.fixture(params=["hash", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return HashStore() if request.param == "hash" else FileStore(str(tmp_path / "store"), 1)


def test_tells_everybody_of_everybody(store: Any) -> None:
    members = [member("worker", rank) for rank in range(3)]
    deadline = time.monotonic() + 60
    results = together(*(functools.partial(_meeting.meet, store, members[r], r, 3, deadline) for r in range(3)))
    assert [found for _, found in results] == [members] * 3


def test_the_members_have_keys_of_their_own(store: Any) -> None:
    for session in ("first", "second"):
        calls = [
            functools.partial(_meeting.meet, store, member("worker", rank), rank, 2, time.monotonic() + 60)
            for rank in range(2)
        ]
        (here, _), (there, _) = together(*calls)
        assert not here.check(["key"])
        here.set("key", session)
        assert there.get("key").decode() == session


def test_sessions_of_one_store_do_not_meet(store: Any) -> None:
    for session in ("first", "second"):
        results = together(*(functools.partial(check_in, store, rank, 2, session) for rank in range(2)))
        assert results == [[f"{session}0", f"{session}1"]] * 2


@pytest.mark.parametrize("dead", [(0,), (2,), (0, 1), (1, 2)])
def test_does_not_meet_the_dead(store: Any, dead: tuple[int, ...]) -> None:
    """torchrun starts its workers again with the store of those that it has ended."""
    die_waiting(store, dead, 3)
    results = together(*(functools.partial(check_in, store, rank, 3) for rank in range(3)))
    assert results == [["worker0", "worker1", "worker2"]] * 3


def test_a_process_that_is_alone_meets_nobody(store: Any) -> None:
    """Each of several processes with one store may form a world of its own."""
    first, second = (_meeting.meet(store, member(name, 0), 0, 1, time.monotonic() + 60) for name in ("one", "other"))
    assert [[each.name for each in members] for _, members in (first, second)] == [["one0"], ["other0"]]
    first[0].set("key", "value")
    assert not second[0].check(["key"])


def test_others_may_be_in_the_next_session_before_a_process_knows_of_this_one(store: Any) -> None:
    leader, late = (_meeting._Meeting(PrefixStore("2", store), member("worker", rank), rank, 2) for rank in (0, 1))
    while not leader.step():
        if not leader._agreed or not late._agreed:
            assert not late.step()
    PrefixStore("2", store).set("member/1", member("next", 1).to_json())
    assert late.step()
    assert [each.name for each in late.result()[1]] == ["worker0", "worker1"]


def test_does_not_wait_for_those_whom_the_dead_have_met(store: Any) -> None:
    """All had agreed, and died before they knew that rank 0 has confirmed it."""
    together(*(functools.partial(check_in, store, rank, 2, "dead") for rank in range(2)))
    results = together(*(functools.partial(check_in, store, rank, 2) for rank in range(2)))
    assert results == [["worker0", "worker1"]] * 2


@pytest.mark.parametrize(("dead", "missing"), [((), "ranks 0, 1, 3"), ((0, 1), "rank 3"), ((0, 1, 3), "rank 0")])
def test_names_who_is_missing(store: Any, dead: tuple[int, ...], missing: str) -> None:
    die_waiting(store, dead, 4)
    with pytest.raises(TimeoutError, match=f"^{missing} of 4 did not call init_rpc within "):
        check_in(store, 2, 4, limit=0.1)


def test_names_those_who_have_died(store: Any) -> None:
    """Rank 0, who leads, knows who does not answer."""
    die_waiting(store, (1, 3), 4)
    results = together(*(functools.partial(check_in, store, rank, 4, limit=1.0) for rank in (0, 2)))
    assert [str(error).partition(" within")[0] for error in results] == ["ranks 1, 3 of 4 did not call init_rpc"] * 2


def test_another_attempt_meets_those_that_come_late(store: Any) -> None:
    with pytest.raises(TimeoutError):
        check_in(store, 2, 4, "early", 0.1)
    results = together(*(functools.partial(check_in, store, rank, 4, "late") for rank in range(4)))
    assert results == [["late0", "late1", "late2", "late3"]] * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_names_two_processes_with_one_rank(store: Any, rank: int) -> None:
    """The one that came first, at least; the other may have met the rest before that one could tell them."""
    problems: list[str] = []

    def meet(name: str, rank: int) -> None:
        try:
            _, members = _meeting.meet(store, member(name, rank), rank, 2, time.monotonic() + 60)
            problems.extend(each.problem for each in members if each.problem is not None)
        except RuntimeError as error:
            problems.append(str(error))

    first = threading.Thread(target=meet, args=("worker", rank))
    first.start()
    while not PrefixStore("2", store).check([f"member/{rank}"]):
        time.sleep(0.001)
    together(lambda: meet("twin", rank), lambda: meet("worker", 1 - rank))
    first.join()
    twins = f"there are two processes with rank {rank} of 2, worker{rank} (pid 7 on north) and twin{rank} (pid 7 on"
    assert problems
    assert all(twins in problem for problem in problems), problems


def test_uses_the_store_beneath_torchs_count_of_sessions() -> None:
    store = HashStore()
    prefixed = [_world._shared_by_sessions(PrefixStore(f"rpc_prefix_{count}", store)) for count in (0, 7)]
    results = together(*(functools.partial(check_in, prefixed[rank], rank, 2) for rank in range(2)))
    assert results[1] == ["worker0", "worker1"]
