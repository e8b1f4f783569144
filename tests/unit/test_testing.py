"""The options of backend "FAULTY_MPI", and its registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed.rpc as rpc

from torch_rpc_mpi import MPIRpcBackendOptions, testing
from torch_rpc_mpi.testing import FAULT_OPTIONS, FaultyMPIRpcBackendOptions


def test_defaults_are_no_faults() -> None:
    options = FaultyMPIRpcBackendOptions()
    assert (options.messages_to_fail, options.messages_to_delay, options.num_fail_sends) == ([], {}, 0)
    assert options.num_worker_threads == MPIRpcBackendOptions().num_worker_threads


def test_takes_faults_and_the_options_of_mpi() -> None:
    options = FaultyMPIRpcBackendOptions(
        num_worker_threads=3, messages_to_fail=("PYTHON_CALL",), messages_to_delay={"SCRIPT_CALL": 1}, num_fail_sends=2
    )
    assert (options.num_worker_threads, options.num_fail_sends) == (3, 2)
    assert (options.messages_to_fail, options.messages_to_delay) == (["PYTHON_CALL"], {"SCRIPT_CALL": 1.0})
    assert set(options.of_agent) >= {option.name for option in FAULT_OPTIONS}
    assert all(option.name in repr(options) for option in FAULT_OPTIONS)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"messages_to_fail": ["NO_CALL"]}, ValueError, "no message 'NO_CALL'; there are SCRIPT_CALL, PYTHON_CALL"),
        ({"messages_to_fail": "PYTHON_CALL"}, TypeError, "a list of names"),
        ({"messages_to_delay": {"PYTHON_CALL": -1}}, ValueError, "at least 0"),
        ({"messages_to_delay": ["PYTHON_CALL"]}, TypeError, "a dictionary"),
        ({"num_fail_sends": -1}, ValueError, "at least 0"),
        ({"messages_to_fai": []}, TypeError, "did you mean 'messages_to_fail'"),
    ],
)
def test_refuses_what_makes_no_sense(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FaultyMPIRpcBackendOptions(**given)


def test_plain_options_have_no_faults() -> None:
    with pytest.raises(TypeError, match="no option 'messages_to_fail'"):
        MPIRpcBackendOptions(messages_to_fail=[])  # type: ignore[call-arg]


def test_registers_a_backend_beside_the_others() -> None:
    registered = rpc.BackendType[testing.BACKEND_NAME]
    assert registered is rpc.backend_registry.BackendType[testing.BACKEND_NAME]
    made = rpc.backend_registry.construct_rpc_backend_options(registered, messages_to_fail=["PYTHON_CALL"])
    assert isinstance(made, FaultyMPIRpcBackendOptions)
    assert made.init_method == "mpi://"
