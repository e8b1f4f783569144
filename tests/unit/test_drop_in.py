"""TensorPipe's requests, translated into those of backend "MPI"; and that nothing is translated unless asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from torch.distributed.rpc import TensorPipeRpcBackendOptions, backend_registry
from unit_fakes import RunPython

from torch_rpc_mpi import MPIRpcBackendOptions, _drop_in, _launchers, _tensorpipe, _torch_api, backend

pytestmark = pytest.mark.usefixtures("no_launcher")

PLACES = (_torch_api.INIT_BACKEND, _torch_api.TENSORPIPE_OPTIONS_INIT)


@pytest.fixture
def drop_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = [place.current for place in PLACES]
    monkeypatch.setenv(_drop_in.VARIABLE, "0")  # what is there after the test is as before
    _drop_in.switch_on()
    yield
    for place, torchs in zip(PLACES, before, strict=True):
        place.set(torchs)


@pytest.fixture
def launched(no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a rank of MPICH's mpirun."""
    for name, value in {"PMI_RANK": 0, "PMI_SIZE": 2, "MPI_LOCALRANKID": 0, "MPI_LOCALNRANKS": 2}.items():
        monkeypatch.setenv(name, str(value))


def translated(options: Any = None, world_size: int | None = 2) -> MPIRpcBackendOptions:
    return _tensorpipe.translated(options, 0, world_size)


class TestOptions:
    def test_of_none_are_our_defaults_but_for_patience(self) -> None:
        ours, defaults = translated(), MPIRpcBackendOptions()
        assert ours.init_timeout == 1800  # torch's own
        different = [name for name in MPIRpcBackendOptions.table if getattr(ours, name) != getattr(defaults, name)]
        assert different == ["init_timeout"]
        assert ours.num_worker_threads == TensorPipeRpcBackendOptions().num_worker_threads

    def test_each_has_its_counterpart(self) -> None:
        options = TensorPipeRpcBackendOptions(
            num_worker_threads=3,
            rpc_timeout=7.5,
            init_method="tcp://localhost:1234",
            device_maps={"b": {"cuda:0": "cuda:1"}},
            devices=["cuda:0"],
        )
        ours = translated(options)
        assert (ours.num_worker_threads, ours.rpc_timeout, ours.init_method) == (3, 7.5, "tcp://localhost:1234")
        assert ours.device_maps == {"b": {torch.device("cuda:0"): torch.device("cuda:1")}}
        assert ours.devices == [torch.device("cuda:0")]

    def test_as_assigned_later(self) -> None:
        options = TensorPipeRpcBackendOptions()
        options.init_method, options.rpc_timeout, options.num_worker_threads = "file:///tmp/store", 0, 5
        options.set_device_map("b", {"cuda:0": "cuda:1"})
        options.set_device_map("b", {"cuda:1": "cuda:0"})
        ours = translated(options)
        assert (ours.init_method, ours.rpc_timeout, ours.num_worker_threads) == ("file:///tmp/store", 0, 5)
        assert len(ours.device_maps["b"]) == 2

    def test_of_a_subclass(self) -> None:
        class Options(TensorPipeRpcBackendOptions):
            def __init__(self, threads: int) -> None:
                super().__init__(num_worker_threads=threads)

        assert _drop_in.asks_for_tensorpipe(None, Options(4))
        assert translated(Options(4)).num_worker_threads == 4

    def test_of_the_registry(self) -> None:
        kind = rpc.BackendType["TENSORPIPE"]
        options = backend_registry.construct_rpc_backend_options(kind, rpc_timeout=9, num_worker_threads=2)
        assert (translated(options).rpc_timeout, translated(options).num_worker_threads) == (9, 2)

    def test_that_the_program_leaves_to_torch_are_for_our_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_RPC_MPI_NUM_WORKER_THREADS", "3")
        monkeypatch.setenv("TORCH_RPC_MPI_INIT_TIMEOUT", "20")
        assert (translated().num_worker_threads, translated().init_timeout) == (3, 20)
        assert translated(TensorPipeRpcBackendOptions(num_worker_threads=4)).num_worker_threads == 4

    @pytest.mark.usefixtures("launched")
    def test_without_a_rank_leave_it_to_mpi(self) -> None:
        assert _tensorpipe.translated(None, None, 2).init_method == "mpi://"

    @pytest.mark.usefixtures("launched")
    def test_need_no_address_under_a_launcher(self) -> None:
        for init_method in ("env://", "tcp://localhost:1234", "file:///tmp/store"):
            options = TensorPipeRpcBackendOptions(init_method=init_method)
            assert translated(options).init_method == "mpi://"
        assert options.init_method == "file:///tmp/store"

    def test_that_are_wrong_are_torchs_type_errors(self) -> None:
        for options in (MPIRpcBackendOptions(), _torch_api.RpcBackendOptions()):
            with pytest.raises(TypeError, match="`rpc_backend_options` must be a `TensorPipeRpcBackendOptions`"):
                translated(options)
        with pytest.raises(TypeError, match="Argument rpc_backend_options must be an instance of RpcBackendOptions"):
            translated({})

    @pytest.mark.parametrize("world_size", [None, 0])
    def test_of_a_dynamic_group_are_refused(self, world_size: int | None) -> None:
        with pytest.raises(ValueError, match=r"without world_size, which means a dynamic group.*Give init_rpc"):
            translated(TensorPipeRpcBackendOptions(), world_size)

    @pytest.mark.usefixtures("drop_in")
    def test_tell_once_that_transports_are_ignored(self, caplog: pytest.LogCaptureFixture) -> None:
        options = TensorPipeRpcBackendOptions(_transports=["uv"], _channels=["mpt_uv"])
        with caplog.at_level(logging.WARNING):
            for rank in range(3):
                _tensorpipe.translated(options, rank, 3)
            translated(TensorPipeRpcBackendOptions())
        assert [record.getMessage().count("_transports and _channels of") for record in caplog.records] == [1]

    def test_can_be_made_interruptible(self) -> None:
        from torch_rpc_mpi import _rendezvous

        options = TensorPipeRpcBackendOptions(init_method="tcp://localhost:1234", num_worker_threads=3)
        again = _rendezvous.made_interruptible(translated(options))
        assert type(again) is _tensorpipe.TranslatedOptions
        assert again.original is options
        assert (again.init_method, again.num_worker_threads) == ("mpi:tcp://localhost:1234", 3)


class TestRequests:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch, drop_in: None) -> list[Any]:
        """What came to backend "MPI", which answers with an error."""
        asked: list[Any] = []

        def stop(*arguments: Any) -> Any:
            asked.append(arguments)
            raise InterruptedError

        monkeypatch.setattr(backend, "prepare", stop)
        monkeypatch.setattr(backend, "init_backend", stop)
        return asked

    @pytest.mark.parametrize("kind", ["none", "of rpc", "by name", "of the registry", "from before"])
    @pytest.mark.parametrize("with_options", [False, True])
    def test_for_tensorpipe_are_ours(self, asked: list[Any], kind: str, with_options: bool) -> None:
        from_before = rpc.BackendType.TENSORPIPE
        kinds = {
            "none": None,
            "of rpc": rpc.BackendType.TENSORPIPE,
            "by name": rpc.BackendType["TENSORPIPE"],
            "of the registry": backend_registry.BackendType.TENSORPIPE,
            "from before": from_before,
        }
        options = TensorPipeRpcBackendOptions(num_worker_threads=3) if with_options else None
        with pytest.raises(InterruptedError):
            rpc.init_rpc("worker", kinds[kind], 1, 2, options)
        [(name, rank, world_size, ours)] = asked
        assert (name, rank, world_size) == ("worker", 1, 2)
        assert ours.num_worker_threads == (3 if with_options else 16)

    def test_past_init_rpc_are_ours_as_well(self, asked: list[Any]) -> None:
        store, options = torch.distributed.HashStore(), TensorPipeRpcBackendOptions(rpc_timeout=5)
        kind = rpc.BackendType.TENSORPIPE
        for function in (rpc._init_rpc_backend, backend_registry.init_backend):
            with pytest.raises(InterruptedError):
                function(kind, store=store, name="a", rank=0, world_size=1, rpc_backend_options=options)
        assert [arguments[:4] for arguments in asked] == [(store, "a", 0, 1)] * 2
        assert asked[0][4].original is options

    def test_for_backend_mpi_stay_as_they_are(self, asked: list[Any]) -> None:
        options = MPIRpcBackendOptions(num_worker_threads=2)
        for arguments in ({"backend": "MPI"}, {"backend": rpc.BackendType.MPI}, {}):
            with pytest.raises(InterruptedError):
                rpc.init_rpc("worker", rank=0, world_size=1, rpc_backend_options=options, **arguments)
        assert [arguments[3] for arguments in asked] == [options] * 3

    def test_for_other_backends_stay_torchs(self, asked: list[Any]) -> None:
        with pytest.raises(TypeError, match="Argument backend must be a member of BackendType"):
            rpc.init_rpc("worker", backend="TENSORPIPE", rank=0, world_size=1)
        assert not asked


class TestSwitch:
    @pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
    def test_is_a_variable(self, value: str | None, on: bool) -> None:
        assert _drop_in.is_on({} if value is None else {_drop_in.VARIABLE: value}) is on

    def test_off_replaces_nothing(self) -> None:
        assert not _drop_in.is_on()
        assert _torch_api.INIT_BACKEND.current.__module__ == "torch.distributed.rpc.backend_registry"
        assert not hasattr(_torch_api.INIT_BACKEND.current, "__wrapped__")
        assert not hasattr(TensorPipeRpcBackendOptions.__init__, "__wrapped__")

    @pytest.mark.usefixtures("drop_in")
    def test_switched_off_again_is_torchs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in a process that was started with another environment, and put back what it found."""
        monkeypatch.setenv(_drop_in.VARIABLE, "0")
        with pytest.raises(TypeError, match="`store` must be a c10d::Store"):
            backend_registry.init_backend(rpc.BackendType.TENSORPIPE, None, "a", 0, 1, None)

    def test_in_the_environment_is_on_when_torch_is_imported(self, run_python: RunPython) -> None:
        run_python(
            """
from torch.distributed.rpc import init_rpc, TensorPipeRpcBackendOptions, backend_registry
assert hasattr(backend_registry.init_backend, "__wrapped__")
assert TensorPipeRpcBackendOptions.__init__.__wrapped__
import sys
for name in ("mpi4py", "torch_rpc_mpi._C", "torch_rpc_mpi.backend", "torch_rpc_mpi.options"):
    assert name not in sys.modules, name
try:
    init_rpc("alone", rank=0)
except ValueError as error:
    assert "dynamic group" in str(error)
""",
            installed=True,
            TORCH_RPC_MPI_DROP_IN="1",
        )


@pytest.mark.parametrize(
    ("value", "is_on", "told"),
    [("1", True, 0), ("0", False, 0), ("", False, 0), ("false", False, 1), ("no", False, 1), (" ", False, 1)],
)
def test_the_switch_is_on_for_1_alone(caplog: pytest.LogCaptureFixture, value: str, is_on: bool, told: int) -> None:
    _drop_in._told.clear()
    for _ in range(2):
        assert _drop_in.is_on({_drop_in.VARIABLE: value}) == is_on
    assert [record.getMessage().count(f"TORCH_RPC_MPI_DROP_IN={value!r} has no") for record in caplog.records] == [
        1
    ] * told


class TestClaim:
    def test_of_another_process_holds_for_the_same_launch_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        environ = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1", "PMI_FD": "9"}
        _launchers.claim(environ)
        assert not _launchers.is_claimed_by_another(environ)
        monkeypatch.setattr("os.getpid", lambda: 7)
        assert _launchers.is_claimed_by_another(environ)
        _launchers.claim(environ)  # which is not this one's to change
        assert _launchers.is_claimed_by_another(environ)
        assert not _launchers.is_claimed_by_another({**environ, "PMI_RANK": "0"})  # a rank of a launch within

    def test_of_nobody(self) -> None:
        environ: dict[str, str] = {}
        _launchers.claim(environ)
        assert not environ
        assert not _launchers.is_claimed_by_another(environ)
