"""torch's suites for agents with faults, over backend "FAULTY_MPI"."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.rpc as rpc
from torch.testing._internal.dist_utils import dist_init
from torch.testing._internal.distributed import rpc_utils
from torch.testing._internal.distributed.rpc.faulty_rpc_agent_test_fixture import (
    FaultyRpcAgentTestFixture,
    retryable_message_types,
)
from torch.testing._internal.distributed.rpc.rpc_agent_test_fixture import RpcAgentTestFixture
from torch_suites import Ranks, count, generate

from torch_rpc_mpi import MPIRpcBackendOptions, testing

FAULTY_AGENT = rpc_utils.FAULTY_AGENT_TESTS

# Of two suites; OptionsOfFaultsTest has the counterpart.
EXPECTED_FAILURES = {"test_verify_backend_options": 'it asserts that the backend is called "FAULTY_TENSORPIPE"'}


class Fixture(Ranks, FaultyRpcAgentTestFixture):
    @property
    def rpc_backend(self) -> object:
        return rpc.backend_registry.BackendType[testing.BACKEND_NAME]


class OptionsOfFaultsTest(RpcAgentTestFixture):
    @dist_init
    def test_what_torch_verifies_of_the_options(self) -> None:
        # Here and not above, because it takes MPI.
        from torch_rpc_mpi._C import MPIAgent

        assert isinstance(rpc.api._get_current_rpc_agent(), MPIAgent)
        options = self.rpc_backend_options
        assert isinstance(options, testing.FaultyMPIRpcBackendOptions)
        assert (options.num_worker_threads, options.num_fail_sends) == (8, 3)
        assert options.messages_to_fail == retryable_message_types
        assert options.messages_to_delay == {"PYTHON_CALL": 1.5, "SCRIPT_CALL": 1.5}
        assert options.rpc_timeout == rpc.constants.DEFAULT_RPC_TIMEOUT_SEC

    def test_options_without_faults_are_refused(self) -> None:
        with pytest.raises(TypeError, match=r"takes .*FaultyMPIRpcBackendOptions"):
            rpc.init_rpc(
                f"worker{self.rank}",
                backend=self.rpc_backend,
                rank=self.rank,
                world_size=self.world_size,
                rpc_backend_options=MPIRpcBackendOptions(init_method=self.init_method),
            )


globals().update(generate("Mpi", Fixture, [*FAULTY_AGENT, OptionsOfFaultsTest], __name__))


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other torch, other tests")
def test_all_of_torchs_tests_are_here() -> None:
    assert count(FAULTY_AGENT) == 28
