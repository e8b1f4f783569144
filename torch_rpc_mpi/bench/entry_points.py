"""The entry points beside torch's own: ``mpirun -n 2 python -m torch_rpc_mpi.bench.entry_points``.

For each of the six: what it takes to issue a call, and what until its result is here; in turns, over backend "MPI".
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.rpc as rpc
from mpi4py import MPI
from torch.distributed.rpc.internal import PythonUDF, serialize

from .. import _torch_api, functions
from .cases import empty, script_add

ROUNDS, SAMPLES = 30, 100
Call = Callable[[], Any]


# Now, before a session puts others in their places.
_invoke_rpc_builtin = _torch_api.INVOKE_RPC_BUILTIN.current
_invoke_rpc_python_udf = _torch_api.INVOKE_RPC_PYTHON_UDF.current
_invoke_rpc_torchscript = _torch_api.INVOKE_RPC_TORCHSCRIPT.current
_invoke_remote_builtin = _torch_api.INVOKE_REMOTE_BUILTIN.current
_invoke_remote_python_udf = _torch_api.INVOKE_REMOTE_PYTHON_UDF.current
_invoke_remote_torchscript = _torch_api.INVOKE_REMOTE_TORCHSCRIPT.current


def calls(dst: Any) -> dict[str, tuple[Call, Call]]:
    """By name: torch's own, and ours."""
    x = torch.ones(2)
    name = _torch_api.qualified_name(script_add)

    def udf() -> tuple[bytes, list[torch.Tensor]]:
        pickled: tuple[bytes, list[torch.Tensor]] = serialize(PythonUDF(empty, (), {}))  # type: ignore[no-untyped-call]
        return pickled

    return {
        "py_rpc_builtin": (
            lambda: _invoke_rpc_builtin(dst, "aten::add", -1.0, x, 1),
            lambda: functions.py_rpc_builtin(dst, "aten::add", (x, 1)),
        ),
        "py_rpc_python_udf": (
            lambda: _invoke_rpc_python_udf(dst, *udf(), -1.0, False),
            lambda: functions.py_rpc_python_udf(dst, *udf()),
        ),
        "py_rpc_torchscript": (
            lambda: _invoke_rpc_torchscript(dst.name, name, (x, 1), {}, -1.0, False),
            lambda: functions.py_rpc_torchscript(dst.name, name, (x, 1)),
        ),
        "py_remote_builtin": (
            lambda: _invoke_remote_builtin(dst, "aten::add", -1.0, x, 1),
            lambda: functions.py_remote_builtin(dst, "aten::add", args=(x, 1)),
        ),
        "py_remote_python_udf": (
            lambda: _invoke_remote_python_udf(dst, *udf(), -1.0, False),
            lambda: functions.py_remote_python_udf(dst, *udf()),
        ),
        "py_remote_torchscript": (
            lambda: _invoke_remote_torchscript(dst.name, name, -1.0, False, x, 1),
            lambda: functions.py_remote_torchscript(dst.name, name, args=(x, 1)),
        ),
    }


def wait(made: Any) -> None:
    if isinstance(made, _torch_api.PyRRef):
        made.to_here()
    else:
        made.wait()


def measure(call: Call) -> tuple[float, float]:
    """Microseconds: the medians of issuing and of the round trip."""
    issued, done = [], []
    for _ in range(SAMPLES):
        start = time.perf_counter()
        made = call()
        issued.append(time.perf_counter() - start)
        wait(made)
        done.append(time.perf_counter() - start)
    return statistics.median(issued) * 1e6, statistics.median(done) * 1e6


def main() -> None:
    rank = MPI.COMM_WORLD.rank
    rpc.init_rpc(f"worker{rank}", backend="MPI")  # type: ignore[no-untyped-call]
    if rank == 0:
        columns = f"{'ours':>8}{'ratio':>8}"
        print(f"{'microseconds':24}{'issue: torch':>14}{columns}{'round trip: torch':>20}{columns}")
        for name, pair in calls(rpc.get_worker_info("worker1")).items():
            rounds = [[measure(call) for call in pair] for _ in range(ROUNDS + 1)][1:]
            text = f"{name:24}"
            for what, width in ((0, 14), (1, 20)):
                theirs, ours = (statistics.median(each[who][what] for each in rounds) for who in (0, 1))
                ratio = statistics.median(each[0][what] / each[1][what] for each in rounds)
                text += f"{theirs:{width}.1f}{ours:8.1f}{ratio:8.2f}"
            print(text, flush=True)
    rpc.shutdown()


if __name__ == "__main__":
    main()
