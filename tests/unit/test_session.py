"""From init_rpc to shutdown in one process, with TensorPipe's agent standing in for ours."""

from __future__ import annotations

import functools

import pytest
from unit_fakes import RunPython

PREAMBLE = """
import pathlib, sys
import torch.distributed.rpc as rpc
from torch.distributed.rpc import internal
import unit_fakes
extension = unit_fakes.install_extension(pathlib.Path.cwd())

def init(**arguments):
    rpc.init_rpc("alone", backend="MPI", rank=0, world_size=1, **arguments)

def fail(text):
    raise ValueError(text)
"""


@pytest.fixture
def run_session(run_forked_with_fakes: RunPython) -> RunPython:
    return functools.partial(run_forked_with_fakes, PREAMBLE)


def test_the_literal_call_works(run_session: RunPython) -> None:
    run_session(
        """
init()
agent = rpc.api._get_current_rpc_agent()
assert isinstance(agent, extension.MPIAgent), agent
assert agent.names == ["alone"] and len(agent.hosts) == 1
assert rpc.rpc_sync("alone", max, args=(1, 2)) == 2
rpc.shutdown()
"""
    )


def test_options_reach_the_agent(run_session: RunPython) -> None:
    run_session(
        """
from torch_rpc_mpi import MPIRpcBackendOptions
rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=MPIRpcBackendOptions(num_worker_threads=3))
options = vars(rpc.api._get_current_rpc_agent().options)
assert options == {
    "num_worker_threads": 3, "rpc_timeout": 60.0, "eager_limit": 8192, "bulk_chunk": 1 << 20,
    "spin_time": 0.001, "max_sleep": 0.001, "flight_recorder_dir": "",
    "devices": [], "device_memory": 0, "device_names": [], "mpi_takes_device_memory": False,
    "any_source": True,
}, options
rpc.shutdown()
""",
        TORCH_RPC_MPI_EAGER_LIMIT="8192",
    )


def test_remote_exceptions_name_rank_and_host(run_session: RunPython) -> None:
    run_session(
        """
import socket
init()
run_function = rpc.api._get_current_rpc_agent().run_function
result = run_function(internal.PythonUDF(fail, ("here",), {}))
assert result.exception_type is ValueError
where = f"On WorkerInfo(id=0, name=alone) (rank 0 on host {socket.gethostname()}):"
text = result.msg.encode().decode("unicode_escape")
assert text.startswith(where + "\\nValueError: here\\n\\nTraceback (most recent call last):"), text
assert 'in fail' in text and text.count("here") == 1, text
def chained():
    try:
        fail("Grüße \\\\ inside")
    except ValueError as error:
        raise KeyError("outside") from error
chained = run_function(internal.PythonUDF(chained, (), {}))
text = chained.msg.encode().decode("unicode_escape")
assert chained.exception_type is KeyError and text.startswith(where + "\\nKeyError: 'outside'"), text
assert "ValueError: Grüße \\\\ inside\\n\\nThe above exception was the direct cause" in text, text
class Mute(Exception):
    def __str__(self):
        raise ValueError
def mute():
    raise Mute
assert "Mute" in run_function(internal.PythonUDF(mute, (), {})).msg
sys.stderr.close()
assert "here" in run_function(internal.PythonUDF(fail, ("here",), {})).msg
sys.stderr = sys.__stderr__ = sys.stdout
passed_on = rpc.api._get_current_rpc_agent().pass_on(result)
assert passed_on.exception_type is ValueError
assert passed_on.msg.encode().decode("unicode_escape").startswith(f"{where}\\n{where}\\nValueError: here")
rpc.shutdown()
"""
    )


def test_a_function_that_the_callee_lacks_is_reported_as_torch_does(run_session: RunPython) -> None:
    run_session(
        """
init()
result = rpc.api._get_current_rpc_agent().run_function(AttributeError("no such function"))
assert issubclass(result.exception_type, AttributeError) and issubclass(result.exception_type, RuntimeError)
assert "no such function" in result.msg
rpc.shutdown()
"""
    )


def test_a_later_tensorpipe_session_reports_in_torchs_words(run_session: RunPython) -> None:
    run_session(
        """
init()
rpc.shutdown()
options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{pathlib.Path.cwd()}/store")
rpc.init_rpc("alone", rank=0, world_size=1, rpc_backend_options=options)
try:
    rpc.rpc_sync("alone", fail, args=("here",))
except ValueError as error:
    assert "On WorkerInfo(id=0, name=alone):\\n" in error.args[0], error
rpc.shutdown()
"""
    )


def test_the_session_keeps_no_agent_after_shutdown(run_session: RunPython) -> None:
    run_session(
        """
import gc, weakref
init()
agent = weakref.ref(rpc.api._get_current_rpc_agent())
assert agent() is not None
rpc.shutdown()
gc.collect()
assert agent() is None
"""
    )


def test_init_twice_is_refused_and_harms_nothing(run_session: RunPython) -> None:
    run_session(
        """
init()
try:
    init()
except RuntimeError as error:
    assert str(error) == "RPC is already initialized", error
else:
    raise AssertionError
assert rpc.rpc_sync("alone", max, args=(1, 2)) == 2
rpc.shutdown()
"""
    )


def test_an_agent_that_does_not_start_leaves_nothing_behind(run_session: RunPython) -> None:
    run_session(
        """
torchs = rpc.api._init_rpc_states
def broken(agent):
    torchs(agent)
    raise MemoryError
rpc.api._init_rpc_states = broken
try:
    init()
except MemoryError:
    pass
else:
    raise AssertionError
rpc.api._init_rpc_states = torchs
init()
rpc.shutdown()
"""
    )


LEAVES = "the agent leaves: it shut RPC down or exited without waiting for the others"


def test_exit_without_shutdown_leaves_after_the_handlers_of_the_user(run_session: RunPython) -> None:
    printed = run_session(
        """
import atexit
atexit.register(lambda: print(rpc.rpc_sync("alone", max, args=(1, 2)), flush=True))
init()
"""
    )
    assert printed.splitlines() == ["2", LEAVES]


def test_a_handler_at_exit_shuts_down(run_session: RunPython) -> None:
    assert run_session("import atexit\natexit.register(rpc.shutdown)\ninit()\n") == ""


def test_finalising_mpi_ends_the_session(run_session: RunPython) -> None:
    printed = run_session(
        """
from mpi4py import MPI
init()
for key in list(MPI.COMM_SELF.attributes):
    MPI.COMM_SELF.Delete_attr(key)
print("finalised", flush=True)
rpc.shutdown()
"""
    )
    assert printed.splitlines() == ["the agent leaves: it has called MPI.Finalize() before rpc.shutdown()", "finalised"]


def test_a_session_that_was_shut_down_does_not_care_for_finalising(run_session: RunPython) -> None:
    run_session("init()\nrpc.shutdown()\nfrom mpi4py import MPI\nassert not MPI.COMM_SELF.attributes\n")


def test_the_peers_are_told_of_an_exception(run_session: RunPython) -> None:
    printed = run_session(
        """
import os
init()
sys.excepthook(ValueError, ValueError("on purpose\\nand more"), None)
"""
    )
    assert printed.splitlines() == ["the agent leaves: it ended with ValueError: on purpose"]


def test_exit_after_shutdown_leaves_nothing(run_session: RunPython) -> None:
    assert run_session("init()\nrpc.shutdown()\n") == ""


def test_a_forked_child_neither_leaves_nor_starts_anew(run_session: RunPython) -> None:
    printed = run_session(
        """
import atexit, os, warnings
warnings.simplefilter("ignore")
init()
child = os.fork()
if child == 0:
    try:
        init()
    except RuntimeError as error:
        assert "was forked from pid" in str(error), error
        atexit._run_exitfuncs()
        os._exit(7)  # the rest of the exit is the stand-in's, which hangs in a forked child
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
rpc.shutdown()
"""
    )
    assert printed == ""


def test_torchs_inner_entry_point_works_as_well(run_session: RunPython) -> None:
    # torch's own suites call it; it comes past our init_rpc.
    run_session(
        """
import torch.distributed as dist, torch.distributed.autograd as autograd
from torch_rpc_mpi import MPIRpcBackendOptions
autograd._init(0)
rpc._init_rpc_backend(rpc.BackendType.MPI, dist.HashStore(), "alone", 0, 1, MPIRpcBackendOptions())
assert rpc.rpc_sync("alone", max, args=(1, 2)) == 2
rpc.shutdown()
"""
    )
