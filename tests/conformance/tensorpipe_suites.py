"""The same suites over torch's own backend, for comparison: `pytest tests/conformance/tensorpipe_suites.py`.

Not collected otherwise.
"""

from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import TensorPipeRpcAgentTestFixture
from torch_suites import GENERIC, TENSORPIPE, Ranks, generate


class Fixture(Ranks, TensorPipeRpcAgentTestFixture):
    pass


globals().update(generate("", Fixture, [*GENERIC, *TENSORPIPE], __name__))
