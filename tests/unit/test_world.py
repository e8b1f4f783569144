"""How ranks without a launcher find each other: the store's side, without MPI."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore

from torch_rpc_mpi import _mpi, _world
from torch_rpc_mpi._meeting import Member, Membership

pytestmark = pytest.mark.usefixtures("no_launcher")


def member(name: str = "worker", **changes: Any) -> Member:
    fields = {
        "node": "north",
        "host": "north",
        "pid": 1,
        "mpi": "MPICH 5",
        "membership": None,
        "problem": None,
        "fresh": "f",
    }
    return Member(name, **{**fields, **changes})


def _start_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


class TestWanted:
    @pytest.fixture(autouse=True)
    def _unloaded(self, fresh_mpi: None) -> None:
        """MPI."""

    def test_for_several_ranks_without_a_launcher(self) -> None:
        assert _world.wanted(0, 2)
        assert _world.wanted(1, -1)

    @pytest.mark.parametrize(("rank", "size"), [(-1, -1), (0, 1), (0, -1)])
    def test_not_for_a_single_rank(self, rank: int, size: int) -> None:
        assert not _world.wanted(rank, size)

    def test_not_under_a_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMI_RANK", "0")
        monkeypatch.setenv("PMI_SIZE", "2")
        assert not _world.wanted(0, 2)

    @pytest.mark.parametrize("starter", ["torchrun", "multiprocessing"])
    def test_where_a_launcher_started_only_a_parent(self, monkeypatch: pytest.MonkeyPatch, starter: str) -> None:
        monkeypatch.setenv("PMI_RANK", "0")
        monkeypatch.setenv("PMI_SIZE", "2")
        if starter == "torchrun":
            _start_by_torchrun(monkeypatch)
        else:
            monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
        assert _world.wanted(0, 2)

    def test_for_several_ranks_in_a_task_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
        assert _world.wanted(0, 2)
        assert not _world.wanted(0, 1)

    def test_for_one_rank_whose_launcher_started_only_a_parent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMI_RANK", "1")
        monkeypatch.setenv("PMI_SIZE", "2")
        _start_by_torchrun(monkeypatch)
        assert _world.wanted(0, 1)

    def test_not_where_mpi_was_initialized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mpi, "is_initialized", lambda: True)
        assert not _world.wanted(0, 2)

    def test_where_a_world_was_formed_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mpi, "is_initialized", lambda: True)
        monkeypatch.setattr(_world, "_membership", Membership("world", 0))
        assert _world.wanted(0, 1)


@pytest.mark.parametrize(
    ("given", "environment", "completed"),
    [
        ((-1, -1), {}, (-1, -1)),
        ((-1, -1), {"RANK": "1", "WORLD_SIZE": "2"}, (-1, -1)),
        ((-1, -1), {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, (1, 2)),
        ((0, -1), {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, (0, 2)),
    ],
)
def test_torchrun_tells_the_place(given: tuple[int, int], environment: dict[str, str], completed: object) -> None:
    assert _world.complete(*given, environment) == completed


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("a", "(vector,(0,1,1))"),
        ("aaaa", "(vector,(0,1,4))"),
        ("aabbcc", "(vector,(0,3,2))"),
        ("aabccdd", "(vector,(0,1,2),(1,1,1),(2,2,2))"),
    ],
)
def test_map_of_nodes(nodes: str, expected: str) -> None:
    assert _world.node_map(nodes) == expected


class TestFit:
    def test_of_those_who_begin(self) -> None:
        _world._check_fit([member(), member()])

    def test_of_a_world(self) -> None:
        _world._check_fit([member(membership=Membership("a", 3)), member(membership=Membership("a", 1))])

    def test_tells_everybody_of_the_problem_of_one(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"(?s)failed on all ranks because of.*rank 1, b \(pid 1 on north\): No MPI"
        ):
            _world._check_fit([member("a"), member("b", problem="No MPI")])

    def test_refuses_different_libraries(self) -> None:
        with pytest.raises(RuntimeError, match=r"different MPI libraries: MPICH 5 \(a .*; MPICH 4 \(b "):
            _world._check_fit([member("a"), member("b", mpi="MPICH 4")])

    @pytest.mark.parametrize("other", [None, Membership("other", 1)])
    def test_refuses_strangers(self, other: Membership | None) -> None:
        with pytest.raises(RuntimeError, match=r"not belong to the same MPI world.*a \(pid 1 on north\) is in world"):
            _world._check_fit([member("a", membership=Membership("world", 0)), member("b", membership=other)])


def test_the_file_of_a_session_is_there_until_the_next_has_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_world, "_kept_file", None)
    file = tmp_path / "store"

    def session(number: int) -> None:
        store = PrefixStore(f"rpc_prefix_{number}", FileStore(str(file), 1))
        store.set("key", "value")
        _world._keep_file(store)

    session(1)
    assert file.exists()
    session(2)
    assert file.exists()
    _world._keep_file(HashStore())
    assert not file.exists()
