"""torch's suites of CUDA tensors over backend "MPI", with the device of tests/device in CUDA's place."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_suites import CudaRanks
from redirected_suites import DEVICES, complete_device, redirected
from torch_suites import count, generate

DEVICE = Path(__file__).parents[1] / "device"


class Fixture(CudaRanks):
    @classmethod
    def _run(cls, rank: int, *arguments: Any, **keywords: Any) -> None:
        os.environ["RPCTEST_DEVICES"] = str(DEVICES)
        sys.path.append(str(DEVICE))
        device = importlib.import_module("rpctest_device")
        complete_device()
        import torch_rpc_mpi

        torch_rpc_mpi.register_device_runtime("rpctest", device.LIBRARY, device.PREFIX)
        super()._run(rank, *arguments, **keywords)


SUITES = redirected()
globals().update(generate("Redirected", Fixture, SUITES, __name__))


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other torch, other tests")
def test_all_scenarios_but_seven_are_here() -> None:
    assert count(SUITES) == 92
