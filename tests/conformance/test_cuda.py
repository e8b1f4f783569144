"""torch's suites of CUDA tensors over backend "MPI"."""

from __future__ import annotations

import unittest
from collections import Counter

import pytest
import torch
from cuda_suites import SUITES, CudaRanks, devices_needed, with_counterparts
from torch_suites import generate


def devices() -> int:
    return torch.cuda.device_count()


class Fixture(CudaRanks):
    pass


globals().update(generate("Mpi", Fixture, [with_counterparts(suite) for suite in SUITES], __name__))


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other torch, other tests")
def test_all_of_torchs_tests_are_here() -> None:
    suites = [with_counterparts(suite) for suite in SUITES]
    names = [(suite, name) for suite in suites for name in unittest.TestLoader().getTestCaseNames(suite)]
    assert Counter(devices_needed(suite, name) for suite, name in names) == {0: 1, 1: 41, 2: 51, 4: 6}
