"""torch's suites over backend "MPI"."""

from __future__ import annotations

import pytest
import torch
from mpi_ranks import MpiRanks
from options_suite import OptionsTest
from torch.testing._internal.distributed.rpc import dist_autograd_test, rpc_test
from torch_suites import GENERIC, count, generate, without

# Tests of TensorPipe's options; OptionsTest has their counterparts.
OF_TENSORPIPES_OPTIONS = (
    "test_mismatched_type_for_options",
    "test_infer_backend_from_options",
    "test_set_and_get_num_worker_threads",
    "test_tensorpipe_set_default_timeout",
    "test_tensorpipe_options_throw_on_timedelta_timeout",
)
# Tests of groups that workers join and leave (no world_size): see docs/dynamic_groups.md.
OF_DYNAMIC_GROUPS = (
    "test_dynamic_rpc_init_rpc",
    "test_dynamic_rpc_new_rank_can_communicated_with_existing_rank",
    "test_dynamic_rpc_existing_rank_can_communicate_with_new_rank",
    "test_dynamic_rpc_existing_rank_can_communicate_with_new_rank_cuda",
    "test_dynamic_rpc_init_rpc_without_rank",
    "test_dynamic_and_static_init_rpc_together",
)
EXPECTED_FAILURES = dict.fromkeys(OF_DYNAMIC_GROUPS, "MPI's groups are fixed: see docs/dynamic_groups.md")

TENSORPIPE = [
    without(rpc_test.TensorPipeAgentRpcTest, *OF_TENSORPIPES_OPTIONS),
    dist_autograd_test.TensorPipeAgentDistAutogradTest,
]


globals().update(generate("Mpi", MpiRanks, [*GENERIC, *TENSORPIPE, OptionsTest], __name__))


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="other torch, other tests")
def test_all_of_torchs_tests_are_here() -> None:
    assert count(GENERIC) == 366
    assert count(TENSORPIPE) - len(OF_DYNAMIC_GROUPS) == 59
