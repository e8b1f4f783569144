"""What torch's suite for TensorPipe checks of TensorPipe's options, for those of backend "MPI"."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed.rpc as rpc
from torch.testing._internal.dist_utils import worker_name
from torch.testing._internal.distributed.rpc.rpc_agent_test_fixture import RpcAgentTestFixture
from torch.testing._internal.distributed.rpc.rpc_test import FooBackendOptions

from torch_rpc_mpi import MPIRpcBackendOptions


class OptionsTest(RpcAgentTestFixture):
    def _init(self, options: rpc.RpcBackendOptions, **backend: object) -> None:
        rpc.init_rpc(
            worker_name(self.rank),
            rank=self.rank,
            world_size=self.world_size,
            rpc_backend_options=options,
            **backend,
        )

    def test_mismatched_type_for_options(self) -> None:
        with pytest.raises(TypeError, match=r"takes .*MPIRpcBackendOptions as rpc_backend_options"):
            self._init(FooBackendOptions(self.init_method), backend=self.rpc_backend)

    def test_infer_backend_from_options(self) -> None:
        self._init(MPIRpcBackendOptions(init_method=self.init_method))
        # Here and not above, because it takes MPI.
        from torch_rpc_mpi._C import MPIAgent

        assert isinstance(rpc.api._get_current_rpc_agent(), MPIAgent)
        rpc.shutdown()

    def test_set_and_get_num_worker_threads(self) -> None:
        self._init(MPIRpcBackendOptions(init_method=self.init_method, num_worker_threads=27), backend=self.rpc_backend)
        assert rpc.api._get_current_rpc_agent().get_debug_info()["agent.thread_pool_size"] == "27"
        rpc.shutdown()

    def test_set_default_timeout(self) -> None:
        self._init(MPIRpcBackendOptions(init_method=self.init_method, rpc_timeout=100), backend=self.rpc_backend)
        assert rpc.get_rpc_timeout() == 100
        rpc.shutdown()

    def test_options_throw_on_timedelta_timeout(self) -> None:
        with pytest.raises(TypeError, match="rpc_timeout"):
            MPIRpcBackendOptions(init_method=self.init_method, rpc_timeout=timedelta())
