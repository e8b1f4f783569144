"""init_rpc's part before the agent: arguments, world, and the agreement of the ranks. Against fakes."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import unit_fakes

import torch_rpc_mpi
from torch_rpc_mpi import MPIRpcBackendOptions, _agreement, _mpi, _torch_api, backend
from torch_rpc_mpi._agreement import Member
from torch_rpc_mpi._devices import Wishes
from torch_rpc_mpi._group import Group

pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def mpi(tmp_path: Path, fresh_mpi: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The fake mpi4py.MPI, with a world that a test may change."""
    extension: ModuleType = unit_fakes.make_extension(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_rpc_mpi._C", extension)
    monkeypatch.setattr(torch_rpc_mpi, "_C", extension, raising=False)
    unit_fakes.write_mpi4py(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    import mpi4py.MPI

    return mpi4py.MPI


def world(mpi: Any, rank: int, size: int) -> None:
    mpi.COMM_WORLD = mpi.Intracomm("world", rank, size)


class TestPrepare:
    def test_takes_rank_and_world_size_from_mpi(self, mpi: Any) -> None:
        world(mpi, 1, 4)
        call = backend.prepare("worker", -1, None, None)
        assert call[:3] == ("worker", 1, 4)
        assert isinstance(call.rpc_backend_options, MPIRpcBackendOptions)

    @pytest.mark.parametrize(("rank", "world_size"), [(1, 4), (1, None), (-1, 4), (None, -1)])
    def test_takes_agreeing_ones(self, mpi: Any, rank: Any, world_size: Any) -> None:
        world(mpi, 1, 4)
        assert backend.prepare("worker", rank, world_size, None)[1:3] == (1, 4)

    def test_refuses_another_rank(self, mpi: Any) -> None:
        world(mpi, 1, 4)
        with pytest.raises(
            ValueError, match=r"given rank=2, but this process is rank 1 of 4 in MPI.COMM_WORLD\. Leave"
        ):
            backend.prepare("worker", 2, 4, None)

    @pytest.mark.parametrize("given", [1, 3, 5, 0])
    def test_refuses_another_world_size(self, mpi: Any, given: int) -> None:
        world(mpi, 1, 4)
        with pytest.raises(ValueError, match=rf"given world_size={given}, but there are 4 ranks.*pass comm="):
            backend.prepare("worker", 1, given, None)

    def test_a_communicator_decides(self, mpi: Any) -> None:
        world(mpi, 5, 8)
        options = MPIRpcBackendOptions(comm=mpi.Intracomm("half", 2, 4))
        assert backend.prepare("worker", -1, None, options)[1:3] == (2, 4)
        with pytest.raises(ValueError, match="rank=5, but this process is rank 2 of 4 in the communicator given as"):
            backend.prepare("worker", 5, None, options)

    def test_a_communicator_freed_since_is_refused(self, mpi: Any) -> None:
        options = MPIRpcBackendOptions(comm=mpi.COMM_WORLD)
        mpi.COMM_NULL = mpi.COMM_WORLD
        with pytest.raises(ValueError, match="it was freed"):
            backend.prepare("worker", -1, None, options)

    @pytest.mark.parametrize("name", ["", "a b", "é", "a" * 128, "a*"])
    def test_refuses_a_name_as_torch_does_before_mpi_is_loaded(self, mpi: Any, name: str) -> None:
        with pytest.raises(RuntimeError, match=r"^Worker name must match .* non-empty and shorter than 128 chars"):
            backend.prepare(name, -1, None, None)
        assert _mpi._loaded is None

    def test_refuses_a_name_that_is_no_string(self, mpi: Any) -> None:
        with pytest.raises(
            RuntimeError, match=r"^Argument 3 must be of type <class 'str'> but got type <class 'int'>$"
        ):
            backend.prepare(3, -1, None, None)

    def test_refuses_options_of_another_backend(self, mpi: Any) -> None:
        with pytest.raises(TypeError, match=r'"MPI" takes torch_rpc_mpi.MPIRpcBackendOptions .*TensorPipe'):
            backend.prepare("worker", -1, None, torch.distributed.rpc.TensorPipeRpcBackendOptions())
        with pytest.raises(TypeError, match="Argument rpc_backend_options must be an instance of RpcBackendOptions"):
            backend.prepare("worker", -1, None, {})

    @pytest.mark.parametrize("rank", ["0", 0.0, True])
    def test_refuses_a_rank_that_is_no_integer(self, mpi: Any, rank: Any) -> None:
        with pytest.raises(TypeError, match="rank must be an integer, but got"):
            backend.prepare("worker", rank, None, None)

    def test_refuses_a_second_session(self, mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_torch_api, "is_current_rpc_agent_set", lambda: True)
        with pytest.raises(RuntimeError, match=r"^RPC is already initialized$"):
            backend.prepare("worker", -1, None, None)
        assert _mpi._loaded is None


class TestAloneInTheWorld:
    def test_without_a_launcher_is_an_error(self, mpi: Any) -> None:
        with pytest.raises(
            RuntimeError, match=r"without an MPI launcher.*`mpirun -n 4 python script.py`.*world_size=1"
        ):
            backend.prepare("worker", -1, None, None)

    @pytest.mark.parametrize("rank", [-1, 0])
    def test_without_a_launcher_can_be_asked_for(self, mpi: Any, rank: int) -> None:
        assert backend.prepare("worker", rank, 1, None)[1:3] == (0, 1)

    def test_a_communicator_of_one_is_asking_for_it(self, mpi: Any) -> None:
        assert backend.prepare("worker", -1, None, MPIRpcBackendOptions(comm=mpi.COMM_WORLD))[1:3] == (0, 1)

    def test_a_launcher_of_one_is_asking_for_it(self, mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMI_RANK", "0")
        monkeypatch.setenv("PMI_SIZE", "1")
        assert backend.prepare("worker", -1, None, None)[1:3] == (0, 1)

    @pytest.mark.parametrize(("rank", "world_size", "wanted"), [(0, 3, 3), (-1, 3, 3), (2, None, 3)])
    def test_is_an_error_when_more_were_asked_for(
        self, mpi: Any, rank: int, world_size: int | None, wanted: int
    ) -> None:
        with pytest.raises(
            RuntimeError,
            match=rf"^Call init_rpc before .*`mpirun -n {wanted} python script.py`.*asked for {wanted} ranks",
        ):
            backend.prepare("worker", rank, world_size, None)

    @pytest.mark.parametrize("world_size", [None, 4])
    def test_under_the_launcher_of_another_mpi_says_so(
        self, mpi: Any, monkeypatch: pytest.MonkeyPatch, world_size: int | None
    ) -> None:
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
        with pytest.raises(
            RuntimeError,
            match=r"Open MPI's mpirun started this process as rank 0 of 4, but MPI \(Fake MPI 1.0\) sees .* alone",
        ):
            backend.prepare("worker", -1, world_size, None)


def member(name: str, host: str = "north", **agreed: Any) -> Member:
    return Member(name, host, host, pid=1, address="", agreed=agreed, wishes=Wishes(name, {}, []))


class TestAgreement:
    def test_of_ranks_that_fit(self) -> None:
        _agreement.check([member("a", limit=1), member("b", limit=1)])

    def test_names_those_who_share_a_name(self) -> None:
        members = [member("a"), member("b"), member("a", "south"), member("a")]
        with pytest.raises(
            RuntimeError, match=r"is not unique: 'a' was given by ranks 0, 2-3 \(on north, south\)\. Give"
        ):
            _agreement.check(members)

    def test_shows_who_has_what(self) -> None:
        members = [member("a", limit=1, chunk=3), member("b", "south", limit=2, chunk=3), member("c", limit=1, chunk=3)]
        with pytest.raises(RuntimeError) as caught:
            _agreement.check(members)
        assert "  limit:\n    1 on ranks 0, 2 (on north)\n    2 on rank 1 (on south)\n" in str(caught.value)
        assert "chunk" not in str(caught.value)

    def test_treats_a_missing_value_as_unknown(self) -> None:
        with pytest.raises(RuntimeError, match="unknown on rank 1"):
            _agreement.check([member("a", limit=1), member("b")])

    @pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([0, 1, 2], "0-2"), ([4, 0, 2, 1], "0-2, 4")])
    def test_rank_lists(self, ranks: list[int], text: str) -> None:
        assert _agreement.rank_list(ranks) == text


class Gathering(unit_fakes.Communicator):
    """A communicator whose other ranks send what the test says."""

    def __init__(self, *others: tuple[Any, str | None]) -> None:
        super().__init__()
        self.others = [pickle.dumps(other) for other in others]

    def allgather(self, data: bytes, timeout: float, companions: None) -> list[bytes]:
        return [data, *self.others]


class TestOnAllRanks:
    def test_gathers_results(self) -> None:
        communicator: Any = Gathering(("b", None))
        assert Group(communicator, None, "here", 1).on_all_ranks(lambda: "a") == ["a", "b"]
        assert communicator.freed == 0

    def test_raises_here_what_failed_elsewhere(self) -> None:
        communicator: Any = Gathering((None, None), (None, "OSError: no threads left (on south)"))
        with pytest.raises(RuntimeError, match=r"init_rpc failed .*\n  rank 2: OSError: no threads left \(on south\)"):
            Group(communicator, None, "here", 1).on_all_ranks(lambda: "a")
        assert communicator.freed == 1

    def test_keeps_the_cause_where_it_failed(self) -> None:
        communicator: Any = Gathering((None, None))
        with pytest.raises(RuntimeError, match="rank 0: ZeroDivisionError") as caught:
            Group(communicator, None, "here", 1).on_all_ranks(lambda: 1 / 0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert communicator.freed == 1


def test_a_group_that_does_not_fit_is_given_up(mpi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    world(mpi, 0, 2)
    communicator = unit_fakes.Communicator(size=2)  # both ranks say what this one says, so they share its name
    monkeypatch.setattr(unit_fakes.Communicator, "duplicate", lambda *_: communicator)
    with pytest.raises(RuntimeError, match="name is not unique: 'worker' was given by ranks 0-1"):
        backend.init_backend(None, "worker", 0, 2, MPIRpcBackendOptions())  # type: ignore[arg-type]
    assert communicator.freed == 1
