"""torch's suites of CUDA tensors on the device of tests/device: their source, with its name in the place of CUDA's.

So their scenarios run where there is no GPU, those for several devices too.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from cuda_suites import SUITES, with_counterparts
from torch.testing._internal import common_distributed, common_utils
from torch_suites import without

DEVICES = 4  # as many as any of the tests needs

# What cannot be redirected: whole suites, and tests.
LEFT_OUT = {
    "CudaDdpComparisonTest": "c10d's Gloo sums gradients of CPU and CUDA tensors only",
    "TensorPipeCudaDistAutogradTest": "torch's engine for distributed autograd orders streams of CUDA only",
    "test_cuda_future_can_extract_cuda_sparse_tensor": "torch has no sparse tensors for devices outside of it",
    "test_cuda_future_can_extract_list_with_cuda_sparse_tensor": "likewise",
    "test_cuda_future_can_extract_custom_class_with_cuda_sparse_tensor": "likewise",
}

# The arithmetic of this device is the CPU's. What the tests are about does not depend on how much there is of it.
SMALLER = {
    "rpc_test": {
        "(2048, 20000)": "(64, 50)",
        "torch.rand(2048, 2048)": "torch.rand(64, 64)",
        "randn(200, 1,": "randn(4, 1,",
    },
    "dist_autograd_test": {
        "nn.Linear(2000, 2000)": "nn.Linear(40, 40)",
        "torch.randn(5000, 2000)": "torch.randn(50, 40)",
        "torch.rand([1000, 10000]": "torch.rand([100, 100]",
    },
}
OTHERWISE = {
    "rpc_test": {
        # torch, when it looks for the tensors in an object, passes over locks, threads and CUDA's events only.
        "self.event = torch.cuda.Event(enable_timing=True)": "self.event = Lock()",
        "self.event.record()": "torch.cuda.Event().record()",
        # The next call's stream waits for nothing of this one, here as over TensorPipe: a GPU mostly is the faster one.
        "self.tensor += v": "self.tensor += v; torch.cuda.current_stream().synchronize()",
        # In a callback's stream, of which the allocator must know: this device overwrites at once what is freed.
        "return fut.value() + z": "z.record_stream(torch.cuda.current_stream()); return fut.value() + z",
    },
    # An error of the device's.
    "remote_module_test": {'r"CUDA error: invalid device ordinal"': 'r"there is no device 100"'},
}

_CYCLES = 10_000  # of torch.cuda._sleep() in a microsecond: a twentieth of a GPU's time
_SLEEP = f"""

def _sleep(cycles):
    torch.rpctest._sleep(int(cycles) // {_CYCLES})
"""


def redirected() -> list[type]:
    """The suites, of modules that ranks can import."""
    suites = [suite for suite in SUITES if suite.__name__ not in LEFT_OUT]
    names = {suite.__module__: _redirected_name(suite.__module__) for suite in suites}
    # A rank finds those that the process which started it has written.
    if any(importlib.util.find_spec(redirected_name) is None for redirected_name in names.values()):
        _write(names)
    with (
        warnings.catch_warnings(),
        # The suites' decorators ask CUDA how many devices there are, and the tests how long a cycle is.
        mock.patch.object(common_distributed, "skip_if_lt_x_gpu", _skip_never),
        mock.patch.object(common_utils, "get_cycles_per_ms", _cycles_per_ms),
    ):
        warnings.filterwarnings("ignore", "`torch.jit.")  # as in torch_suites.py
        modules = {name: importlib.import_module(redirected_name) for name, redirected_name in names.items()}
    found = [getattr(modules[suite.__module__], suite.__name__) for suite in suites]
    return [with_counterparts(without(suite, *(name for name in LEFT_OUT if hasattr(suite, name)))) for suite in found]


def complete_device() -> None:
    """What the suites take from torch.cuda and its tensors and a device outside of torch has not by itself."""
    torch.utils.generate_methods_for_privateuse1_backend()
    # Convolutions do not fall back to the CPU.
    _operators.append(torch.library.Library("aten", "IMPL"))
    _operators[-1].impl("convolution_overrideable", _convolution, "PrivateUse1")


_operators: list[torch.library.Library] = []  # they last as long as this


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *how: Any) -> torch.Tensor:
    on_cpu = None if bias is None else bias.cpu()
    return torch.convolution(x.cpu(), weight.cpu(), on_cpu, *how).to(x.device)


def _redirected_name(name: str) -> str:
    # pytest would rewrite the assertions of one that ends with "_test".
    return "redirected_" + name.rpartition(".")[2].removesuffix("_test")


def _skip_never(count: int) -> Callable[[Any], Any]:
    return lambda test: test


def _cycles_per_ms() -> float:
    return 1000.0 * _CYCLES / 20


_folders: list[tempfile.TemporaryDirectory[str]] = []


def _write(names: dict[str, str]) -> None:
    """To a folder that is there as long as this process, and that ranks get in their sys.path."""
    folder = tempfile.TemporaryDirectory(prefix="redirected-suites-")
    _folders.append(folder)
    for name, redirected_name in names.items():
        Path(folder.name, f"{redirected_name}.py").write_text(_redirected_source(name))
    sys.path.append(folder.name)
    importlib.invalidate_caches()


def _redirected_source(name: str) -> str:
    source = Path(sys.modules[name].__file__ or "").read_text()
    short = name.rpartition(".")[2]
    for old, new in {**SMALLER.get(short, {}), **OTHERWISE.get(short, {})}.items():
        if old not in source:
            raise LookupError(f"{name} of torch {torch.__version__} has no {old!r}")
        source = source.replace(old, new)
    source = re.sub(r"\bcuda\b", "rpctest", source).replace("is_cuda", "is_rpctest")
    return source.replace("torch.rpctest._sleep(", "_sleep(") + _SLEEP
