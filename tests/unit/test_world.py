"""How ranks without a launcher find each other: the store's side, without MPI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.distributed import FileStore, HashStore, PrefixStore

from torch_rpc_mpi import _world
from torch_rpc_mpi._meeting import Member, Membership


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
        with pytest.raises(
            RuntimeError, match=r"not belong to the same MPI world.*a \(pid 1 on north\) is in world.*restarting"
        ):
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
