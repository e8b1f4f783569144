"""torch's own RPC suites, which ship in its wheel, made ready to run over any backend.

torch starts the ranks of each test with `spawn`, which imports torch in every one of them: the suites take hours. Here
they are forked from a server that has torch and the suites imported, and nothing of MPI.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import unittest
import warnings
from collections.abc import Iterable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, ClassVar

# A call's own limit, 60 s, comes first, and with it an error that says more. torch reads this when it is imported.
TIMEOUT = int(os.environ.setdefault("DISTRIBUTED_TESTS_DEFAULT_TIMEOUT", "100"))

with warnings.catch_warnings():
    # torch.jit.script is deprecated, and hypothesis, which the suites do without, is missing.
    warnings.filterwarnings("ignore", "`torch.jit.")
    warnings.simplefilter("ignore", ImportWarning)
    import torch
    from torch.testing._internal.distributed import rpc_utils
    from torch.testing._internal.distributed.rpc.rpc_agent_test_fixture import RpcAgentTestFixture

GENERIC = rpc_utils.GENERIC_TESTS
TENSORPIPE = rpc_utils.TENSORPIPE_TESTS

_END_LIMIT = 10.0  # seconds for a process to end after a signal

_ENVIRONMENT = {
    # More threads per rank would only fight over the few cores of a test machine.
    "OMP_NUM_THREADS": "1",
    # A rank that returns from init_process_group may otherwise call one that is still in it, and does so in
    # DdpUnderDistAutogradTest, which then fails with any backend ("Default process group has not been initialized").
    "TORCH_DIST_INIT_BARRIER": "1",
    # torch.testing asks whether there are GPUs when the server imports it. CUDA itself, once asked, is of no use in the
    # processes that are forked from it.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class Ranks(RpcAgentTestFixture):
    """Starts the ranks of a test from the server, watches over them, and checks how each of them ended.

    The base class of the backends' fixtures; torch's `MultiProcessTestCase` comes after it in the test classes.
    """

    _context: ClassVar = multiprocessing.get_context("forkserver")

    def _spawn_processes(self) -> None:
        # "__main__" is pytest. Our own modules cannot be here: older servers do not get our sys.path.
        self._context.set_forkserver_preload(["__main__", rpc_utils.__name__])
        os.environ.update(_ENVIRONMENT)  # for the server, which starts with the first test
        _start_server()
        self._start_processes(self._context.Process)

    @classmethod
    def _run(cls, rank: int, *arguments: Any, **keywords: Any) -> None:
        """What the process of a rank does."""
        # A fatal signal shows Python's stacks and then, torch's handler, those of C++.
        torch._C._set_print_stack_traces_on_fatal_signal(True)
        faulthandler.enable()
        _keep_process_groups()
        super()._run(rank, *arguments, **keywords)

    def _get_timedout_process_traceback(self) -> None:
        """Ends a test that hangs. Each rank writes its stacks, even if it is stuck with the GIL."""
        hanging = {rank: process for rank, process in enumerate(self.processes) if process.exitcode is None}
        for rank, process in hanging.items():
            print(f"Stacks of rank {rank}:", file=sys.stderr, flush=True)
            with contextlib.suppress(ProcessLookupError):  # it may end of the others' end
                os.kill(process.pid, signal.SIGABRT)
            process.join(_END_LIMIT)
        raise TimeoutError(
            f"ranks {list(hanging)} still ran after {TIMEOUT} s (stacks: see the captured stderr). {self._ends()}"
        )

    def _check_return_codes(self, fn: Any, elapsed_time: float) -> None:
        super()._check_return_codes(fn, elapsed_time)
        # torch looks at the first one only.
        assert not any(process.exitcode for process in self.processes), self._ends()

    def _ends(self) -> str:
        codes = {rank: process.exitcode for rank, process in enumerate(self.processes)}
        return f"Exit codes by rank (negative: ended by that signal): {codes}"

    def tearDown(self) -> None:
        processes = self.processes
        super().tearDown()  # sends SIGTERM to those that are left
        for process in processes:
            process.join(_END_LIMIT)
            process.kill()
            process.join()
            process.close()
        Path(self.file_name).unlink(missing_ok=True)


def _start_server() -> None:
    """Starts the server if it does not run yet, away from the sources.

    Older servers look for what they preload in their working directory first, not in our sys.path. In the project's
    own that is the source tree's torch_rpc_mpi (torch imports it as a backend), which lacks the extension if a wheel
    is installed.
    """
    here = Path.cwd()
    os.chdir(Path(__file__).parent)
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(here)


def _keep_process_groups() -> None:
    """Lets the Gloo groups of a rank live until its process ends.

    In c10d, the last reference to a group goes with the GIL held, and then its destructor joins threads that may be
    about to take the GIL. test_ddp_comparison_uneven_inputs ends in that deadlock once in about 20 runs, over
    TensorPipe as over MPI.
    """
    kept, destroy = [], torch.distributed.destroy_process_group

    def keep_and_destroy(group: torch.distributed.ProcessGroup | None = None) -> None:
        kept.extend(torch.distributed.distributed_c10d._world.pg_map)
        destroy(group)

    torch.distributed.destroy_process_group = keep_and_destroy


def generate(
    prefix: str, fixture: type[Ranks], suites: Iterable[type], module: str
) -> dict[str, type[unittest.TestCase]]:
    """The suites as test classes over the fixture's backend, named `prefix` + torch's name, for globals of `module`."""
    return rpc_utils.generate_tests(prefix, fixture, list(suites), module)


def count(suites: Iterable[type]) -> int:
    """How many tests there are in the suites."""
    return sum(len(unittest.TestLoader().getTestCaseNames(suite)) for suite in suites)


def without(suite: type, *names: str) -> type:
    """The suite without some of its tests, which must be there."""
    missing = [name for name in names if not callable(getattr(suite, name, None))]
    if missing:
        raise AttributeError(f"{suite.__name__} of this torch has no {', '.join(missing)}")
    # A test that is not callable is none to unittest. The class keeps its name, which is part of the tests' names.
    return type(suite.__name__, (suite,), dict.fromkeys(names))
