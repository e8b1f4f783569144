"""MPIRpcBackendOptions: construction, checks, environment, documentation."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import unit_fakes

from torch_rpc_mpi import MPIRpcBackendOptions, options
from torch_rpc_mpi.options import OPTIONS

REPOSITORY = Path(__file__).parents[2]


def test_defaults_are_the_tables() -> None:
    made = MPIRpcBackendOptions()
    for option in OPTIONS:
        assert getattr(made, option.name) == option.checked(option.default)
    assert made.num_worker_threads == 16
    assert made.rpc_timeout == 60.0
    assert made.init_method == "mpi://"
    assert made.bulk_chunk == 1024 * 1024


def test_type_checkers_and_help_know_the_tables_options() -> None:
    names = [option.name for option in OPTIONS]
    assert list(options._Given.__annotations__) == names
    signature = inspect.signature(MPIRpcBackendOptions)
    assert {name: parameter.default for name, parameter in signature.parameters.items()} == {
        option.name: option.default for option in OPTIONS
    }


def test_arguments_arrive() -> None:
    made = MPIRpcBackendOptions(num_worker_threads=3, rpc_timeout=2, spin_time=0, init_method="file:///tmp/x")
    assert (made.num_worker_threads, made.rpc_timeout, made.spin_time) == (3, 2.0, 0.0)
    assert made.init_method == "file:///tmp/x"


def test_is_hashable_as_torch_needs_it() -> None:
    first, second = MPIRpcBackendOptions(), MPIRpcBackendOptions()
    assert {first: 1, second: 2}[first] == 1


def test_is_its_own_subclass_of_torchs_options() -> None:
    # A bare RpcBackendOptions would make torch infer backend "MPI" from every other backend's options.
    assert issubclass(MPIRpcBackendOptions, torch._C._distributed_rpc.RpcBackendOptions)
    assert MPIRpcBackendOptions is not torch._C._distributed_rpc.RpcBackendOptions
    assert not issubclass(torch.distributed.rpc.TensorPipeRpcBackendOptions, MPIRpcBackendOptions)


def test_keyword_arguments_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        MPIRpcBackendOptions(16)  # type: ignore[misc]


def test_unknown_name_is_refused_with_the_close_match() -> None:
    with pytest.raises(TypeError, match="no option 'num_worker_thread'; did you mean 'num_worker_threads'"):
        MPIRpcBackendOptions(num_worker_thread=3)  # type: ignore[call-arg]


def test_unknown_name_without_a_close_match_lists_the_options() -> None:
    with pytest.raises(TypeError, match="no option '_channels'; its options are num_worker_threads, rpc_timeout"):
        MPIRpcBackendOptions(_channels=None)  # type: ignore[call-arg]


def test_unknown_attribute_is_refused() -> None:
    with pytest.raises(AttributeError, match="no option 'rpc_timout'; did you mean 'rpc_timeout'"):
        MPIRpcBackendOptions().rpc_timout = 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_worker_threads": "4"}, r"num_worker_threads must be an integer \(threads\), but got '4' of type str"),
        ({"num_worker_threads": 4.0}, "num_worker_threads must be an integer .* 4.0 of type float"),
        ({"num_worker_threads": True}, "num_worker_threads must be an integer .* True of type bool"),
        ({"num_worker_threads": None}, "num_worker_threads must be an integer .* None of type NoneType"),
        ({"rpc_timeout": "60"}, r"rpc_timeout must be a number \(seconds\), but got '60' of type str"),
        ({"rpc_timeout": False}, "rpc_timeout must be a number .* False of type bool"),
        ({"init_method": 3}, "init_method must be a string, but got 3 of type int"),
        ({"device_maps": [1]}, "device_maps must be a dictionary"),
        ({"device_maps": {1: {0: 0}}}, "device_maps must be keyed by callee names"),
        ({"device_maps": {"worker1": 0}}, "device_maps must be a dictionary"),
        ({"device_maps": {"worker1": {0.5: 0}}}, "device_maps must be made of devices"),
        ({"devices": "cuda:0"}, "devices must be a list of devices"),
        ({"devices": 0}, "devices must be a list of devices"),
        ({"comm": 91}, "comm must be an mpi4py intracommunicator, but got 91 of type int"),
    ],
)
def test_wrong_type_says_what_was_given(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        MPIRpcBackendOptions(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_worker_threads": 0}, r"num_worker_threads must be at least 1 \(threads\), but got 0"),
        ({"rpc_timeout": -1}, r"rpc_timeout must be at least 0 \(seconds; 0 means no limit\), but got -1"),
        ({"init_timeout": -0.5}, "init_timeout must be at least 0"),
        ({"rpc_timeout": float("nan")}, "rpc_timeout must be finite"),
        ({"rpc_timeout": float("inf")}, "rpc_timeout must be finite"),
        ({"eager_limit": -1}, "eager_limit must be at least 0"),
        ({"eager_limit": 1 << 30}, r"eager_limit must be at most 1048576 \(bytes\)"),
        ({"bulk_chunk": 1}, "bulk_chunk must be at least 4096"),
        ({"max_sleep": 0}, "max_sleep must be at least 1e-06"),
    ],
)
def test_out_of_range_says_the_limit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPIRpcBackendOptions(**given)


def test_rpc_timeout_zero_means_no_limit() -> None:
    assert MPIRpcBackendOptions(rpc_timeout=0).rpc_timeout == 0


def test_assignment_is_checked_too() -> None:
    made = MPIRpcBackendOptions()
    made.rpc_timeout = 5
    assert made.rpc_timeout == 5.0
    with pytest.raises(ValueError, match="rpc_timeout must be at least 0"):
        made.rpc_timeout = -5
    assert made.rpc_timeout == 5.0


def test_numpy_integers_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    made = MPIRpcBackendOptions(num_worker_threads=numpy.int64(5))
    assert type(made.num_worker_threads) is int


class TestEnvironment:
    def test_gives_the_default_of_an_engine_knob(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_RPC_MPI_EAGER_LIMIT", "4096")
        monkeypatch.setenv("TORCH_RPC_MPI_SPIN_TIME", "1e-4")
        made = MPIRpcBackendOptions()
        assert (made.eager_limit, made.spin_time) == (4096, 1e-4)

    def test_loses_against_an_argument_even_if_that_is_the_default(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_RPC_MPI_EAGER_LIMIT", "4096")
        assert MPIRpcBackendOptions(eager_limit=16384).eager_limit == 16384

    def test_does_not_reach_what_is_no_engine_knob(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TORCH_RPC_MPI_RPC_TIMEOUT", "1")
        monkeypatch.setenv("TORCH_RPC_MPI_INIT_METHOD", "tcp://x:1")
        made = MPIRpcBackendOptions()
        assert (made.rpc_timeout, made.init_method) == (60.0, "mpi://")

    @pytest.mark.parametrize("text", ["lots", "", "1.5", "-1"])
    def test_nonsense_names_the_variable(self, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        monkeypatch.setenv("TORCH_RPC_MPI_EAGER_LIMIT", text)
        with pytest.raises(ValueError, match=f"environment variable TORCH_RPC_MPI_EAGER_LIMIT='{text}' is not usable"):
            MPIRpcBackendOptions()


class TestDeviceMaps:
    def test_take_what_torch_takes(self) -> None:
        made = MPIRpcBackendOptions(device_maps={"worker1": {"cuda:0": "cuda:1", torch.device("cpu"): "cpu"}})
        assert made.device_maps == {
            "worker1": {torch.device("cuda:0"): torch.device("cuda:1"), torch.device("cpu"): torch.device("cpu")}
        }

    def test_name_what_is_no_device(self) -> None:
        with pytest.raises(ValueError, match="device_maps: no device 'gpu' here"):
            MPIRpcBackendOptions(device_maps={"worker1": {"gpu": "cpu"}})

    def test_must_be_one_to_one(self) -> None:
        with pytest.raises(ValueError, match="`device_map` only supports 1-to-1 mapping"):
            MPIRpcBackendOptions(device_maps={"worker1": {"cuda:0": "cuda:1", "cuda:2": "cuda:1"}})

    def test_grow_by_set_device_map(self) -> None:
        made = MPIRpcBackendOptions()
        made.set_device_map("worker1", {"cuda:0": "cuda:1"})
        made.set_device_map("worker1", {"cuda:1": "cuda:0"})
        made.set_device_map("worker2", {"cuda:0": "cuda:0"})
        assert len(made.device_maps["worker1"]) == 2
        assert made.device_maps["worker2"] == {torch.device("cuda:0"): torch.device("cuda:0")}

    def test_set_device_map_refuses_a_second_target(self) -> None:
        made = MPIRpcBackendOptions(device_maps={"worker1": {"cuda:0": "cuda:1"}})
        with pytest.raises(ValueError, match="`set_device_map` only supports 1-to-1 mapping"):
            made.set_device_map("worker1", {"cuda:0": "cuda:2"})

    def test_set_device_map_refuses_a_second_source(self) -> None:
        made = MPIRpcBackendOptions(device_maps={"worker1": {"cuda:0": "cuda:1"}})
        with pytest.raises(ValueError, match="only supports 1-to-1 mapping"):
            made.set_device_map("worker1", {"cuda:2": "cuda:1"})
        assert made.device_maps == {"worker1": {torch.device("cuda:0"): torch.device("cuda:1")}}

    def test_devices_are_accelerators(self) -> None:
        made = MPIRpcBackendOptions(devices=["cuda:0", torch.device("cuda:1")])
        assert made.devices == [torch.device("cuda:0"), torch.device("cuda:1")]
        with pytest.raises(ValueError, match=r"`set_devices` expect a list of accelerator devices, but got .* cpu"):
            made.set_devices(["cpu"])


class TestCommunicator:
    @pytest.fixture
    def mpi(self, fresh_mpi: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        unit_fakes.write_mpi4py(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        import mpi4py.MPI

        return mpi4py.MPI

    def test_is_kept(self, mpi: Any) -> None:
        assert MPIRpcBackendOptions(comm=mpi.COMM_WORLD).comm is mpi.COMM_WORLD

    def test_null_or_freed_one_is_refused(self, mpi: Any) -> None:
        with pytest.raises(
            ValueError, match=r"comm is MPI.COMM_NULL: it was freed, .* free the communicator afterwards"
        ):
            MPIRpcBackendOptions(comm=mpi.COMM_NULL)

    def test_intercommunicator_is_refused(self, mpi: Any) -> None:
        with pytest.raises(ValueError, match=r"comm is an intercommunicator.* Pass comm.Merge\(\) of it"):
            MPIRpcBackendOptions(comm=mpi.Intercomm("inter", inter=True))

    def test_nothing_is_asked_of_it_after_finalize(self, mpi: Any) -> None:
        mpi.finalized = True
        with pytest.raises(ValueError, match="MPI was finalised"):
            MPIRpcBackendOptions(comm=mpi.COMM_WORLD)

    def test_checked_comm_notices_a_later_free(self, mpi: Any) -> None:
        made = MPIRpcBackendOptions(comm=mpi.COMM_WORLD)
        mpi.COMM_NULL = mpi.COMM_WORLD
        with pytest.raises(ValueError, match="it was freed"):
            made.checked_comm()


@pytest.mark.usefixtures("fresh_mpi")
def test_making_options_does_not_load_mpi() -> None:
    MPIRpcBackendOptions()
    with pytest.raises(TypeError):
        MPIRpcBackendOptions(comm=object())  # type: ignore[typeddict-item]
    assert "mpi4py" not in sys.modules


def test_every_option_has_a_test_of_its_table_row() -> None:
    for option in OPTIONS:
        assert option.unit
        assert option.meaning.endswith((".", "`."))
        assert option.environment in (None, f"TORCH_RPC_MPI_{option.name.upper()}")


def test_documentation_is_current() -> None:
    page = REPOSITORY / "docs" / "options.md"
    assert page.read_text(encoding="utf-8") == options.render_markdown(), (
        "docs/options.md is out of date; run `python -m torch_rpc_mpi.options > docs/options.md`"
    )
