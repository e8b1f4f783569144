"""The suites' ranks over backend "MPI"."""

from __future__ import annotations

import torch.distributed.rpc as rpc
from torch_suites import Ranks

from torch_rpc_mpi import MPIRpcBackendOptions


class MpiRanks(Ranks):
    @property
    def rpc_backend(self) -> object:
        return rpc.backend_registry.BackendType["MPI"]

    @property
    def rpc_backend_options(self) -> MPIRpcBackendOptions:
        return MPIRpcBackendOptions(init_method=self.init_method)

    def get_shutdown_error_regex(self) -> str:
        return "it has left"

    def get_timeout_error_regex(self) -> str:
        return "RPC ran for more than"
