"""torch's suites of CUDA tensors, and how many devices each of their tests needs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch.distributed.rpc as rpc
from torch_suites import Ranks, rpc_utils

from torch_rpc_mpi import MPIRpcBackendOptions

SUITES = [*rpc_utils.GENERIC_CUDA_TESTS, *rpc_utils.TENSORPIPE_CUDA_TESTS]

# The texts of TensorPipe's that the suites expect, and ours in their places.
TEXTS = {
    "TensorPipe RPC backend only supports CPU tensors by default.*"
    "`set_device_map` on `TensorPipeRpcBackendOptions`": "only supports CPU tensors by default.*`set_device_map` on "
    "`MPIRpcBackendOptions`",
}


class CudaRanks(Ranks):
    """The suites' ranks over backend "MPI": with our options and texts where a test has TensorPipe's."""

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

    def assertRaisesRegex(self, expected: Any, regex: Any, *arguments: Any, **keywords: Any) -> Any:
        regex = TEXTS.get(regex, regex)
        return super().assertRaisesRegex(expected, regex, *arguments, **keywords)  # noqa: PT027 (torch's tests call it)

    @classmethod
    def _run(cls, rank: int, *arguments: Any, **keywords: Any) -> None:
        rpc.TensorPipeRpcBackendOptions = _options
        super()._run(rank, *arguments, **keywords)


def _options(*, _transports: object = None, **options: Any) -> MPIRpcBackendOptions:
    """What the suites make under TensorPipe's name."""
    return MPIRpcBackendOptions(**options)


def devices_needed(suite: type, name: str) -> int:
    """The number that torch's decorator `skip_if_lt_x_gpu` of the test was given, 0 without one."""
    function = getattr(suite, name)
    while function is not None:
        bound = inspect.getclosurevars(function).nonlocals
        if function.__code__.co_filename.endswith("common_distributed.py") and isinstance(bound.get("x"), int):
            return bound["x"]
        function = getattr(function, "__wrapped__", None)
    return 0


def skip_where_devices_are_missing(items: list[pytest.Item]) -> None:
    """Skips tests of modules that say how many `devices()` there are, before torch starts the ranks for them."""
    for item in items:
        if hasattr(item.module, "devices") and item.cls is not None:
            needed, there = devices_needed(item.cls, item.originalname), item.module.devices()
            if needed > there:
                reason = f"needs {needed} device{'s' * (needed > 1)}, and there {'is' if there == 1 else 'are'} {there}"
                item.add_marker(pytest.mark.skip(reason=reason))
