"""torch's suites of CUDA tensors, and how many devices each of their tests needs."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch.distributed.rpc as rpc
from mpi_ranks import MpiRanks
from torch.testing._internal.dist_utils import worker_name
from torch_suites import rpc_utils

from torch_rpc_mpi import MPIRpcBackendOptions

SUITES = [*rpc_utils.GENERIC_CUDA_TESTS, *rpc_utils.TENSORPIPE_CUDA_TESTS]

# The texts of TensorPipe's that the suites expect, and ours in their places.
TEXTS = {
    "TensorPipe RPC backend only supports CPU tensors by default.*"
    "`set_device_map` on `TensorPipeRpcBackendOptions`": "only supports CPU tensors by default.*`set_device_map` on "
    "`MPIRpcBackendOptions`",
}


class CudaRanks(MpiRanks):
    """With our options and texts where a test has TensorPipe's."""

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


class Counterparts:
    """Of tests that expect an error of TensorPipe's options at another time, or of another type."""

    rank: int
    world_size: int
    rpc_backend_options: MPIRpcBackendOptions

    def test_device_maps_many_to_one(self) -> None:
        options = self.rpc_backend_options
        callee = worker_name((self.rank + 1) % self.world_size)
        options.set_device_map(callee, {1: 0})
        with pytest.raises(ValueError, match="only supports 1-to-1 mapping"):  # TensorPipe: in init_rpc
            options.set_device_map(callee, {0: 0})

    def test_device_maps_invalid_min_device(self) -> None:
        options = self.rpc_backend_options
        for device_map in ({-1: 0}, {0: -1}):
            with pytest.raises(ValueError, match="Device index must not be negative"):  # TensorPipe: a RuntimeError
                options.set_device_map(worker_name(self.rank), device_map)


def with_counterparts(suite: type) -> type:
    """The suite with those that it has a test for. It keeps its name, which is part of the tests' names."""
    ours = {
        name: test for name, test in vars(Counterparts).items() if name.startswith("test_") and hasattr(suite, name)
    }
    return type(suite.__name__, (suite,), ours) if ours else suite


def devices_needed(suite: type, name: str) -> int:
    """The number that torch's decorator `skip_if_lt_x_gpu` of the test was given, 0 without one."""
    for base in suite.__mro__:
        function = vars(base).get(name)
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
