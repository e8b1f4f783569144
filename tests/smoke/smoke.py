"""A little of everything, to see whether what was built works here at all. Needs nothing but the package and an MPI.

    python tests/smoke/smoke.py                    a world of one, which calls itself
    python tests/smoke/smoke.py --spawn 2          a world of two, by torch.multiprocessing.spawn
    mpirun -n 2 python tests/smoke/smoke.py --launched      or srun, or torchrun

Ends with status 0 if everything worked in every rank, and then says so.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import sys
import tempfile
import warnings
from collections.abc import Callable

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
import torch.multiprocessing

# Far more than a rank needs on a busy machine, the import of torch and the start of the others included.
LIMIT = 240

CHECKS: list[Callable[[str], None]] = []


def check(function: Callable[[str], None]) -> Callable[[str], None]:
    """Registers what every rank does with the worker that comes after it."""
    CHECKS.append(function)
    return function


def expect(condition: bool, *found: object) -> None:
    """Not `assert`, which `python -O` leaves out."""
    if not condition:
        raise AssertionError(f"not as expected: {found}")


def product(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


def failing(text: str) -> None:
    raise ValueError(text)


with warnings.catch_warnings():
    # torch.jit.script is deprecated; torch 2.14 says so to everybody.
    warnings.filterwarnings("ignore", "`torch.jit.script`")

    @torch.jit.script
    def script_product(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor


class Counter:
    """Lives at its owner."""

    def __init__(self, value: int) -> None:
        self.value = value

    def add(self, more: int) -> int:
        self.value += more
        return self.value


@check
def synchronous(to: str) -> None:
    found = rpc.rpc_sync(to, torch.add, args=(torch.ones(3), 1))
    expect(torch.equal(found, torch.full((3,), 2.0)), found)
    for length in (3, 10_000, 3_000_000):  # in the message, beside it, in pieces
        found = rpc.rpc_sync(to, product, args=(torch.ones(length),), kwargs={"factor": 3.0})
        expect(torch.equal(found, torch.full((length,), 3.0)), length)
    found = rpc.rpc_sync(to, lambda: rpc.get_worker_info().name)
    expect(found == to, found)


@check
def asynchronous(to: str) -> None:
    futures = [rpc.rpc_async(to, product, args=(torch.ones(2), float(i))) for i in range(100)]
    then = [future.then(lambda done: done.wait().sum().item()) for future in futures]
    found = torch.futures.wait_all(then)
    expect(found == [2.0 * i for i in range(100)], found)


@check
def remote(to: str) -> None:
    counter = rpc.remote(to, Counter, args=(1,))
    expect(counter.owner_name() == to, counter.owner_name())
    found = [counter.rpc_sync().add(2), counter.rpc_async().add(3).wait(), counter.remote().add(4).to_here()]
    expect(found == [3, 6, 10], found)
    expect(counter.to_here().value == 10)
    tensor = rpc.remote(to, torch.add, args=(torch.ones(2), 1))
    expect(torch.equal(tensor.to_here(), torch.full((2,), 2.0)))


@check
def torchscript(to: str) -> None:
    calls = (
        rpc.rpc_sync(to, script_product, args=(torch.ones(2), 2.0)),
        rpc.rpc_async(to, script_product, args=(torch.ones(2), 2.0)).wait(),
        rpc.remote(to, script_product, args=(torch.ones(2), 2.0)).to_here(),
    )
    for found in calls:
        expect(torch.equal(found, torch.full((2,), 2.0)), found)


@check
def autograd(to: str) -> None:
    for function in (product, script_product, torch.mul):
        x = torch.ones(4, requires_grad=True)
        with dist_autograd.context() as context:
            loss = rpc.rpc_sync(to, function, args=(x, 5.0)).sum()
            dist_autograd.backward(context, [loss])
            gradient = dist_autograd.get_gradients(context)[x]
        expect(torch.equal(gradient, torch.full((4,), 5.0)), function, gradient)


@check
def error_of_a_callee(to: str) -> None:
    try:
        rpc.rpc_sync(to, failing, args=("of the callee",))
    except ValueError as error:
        expect("of the callee" in str(error) and to in str(error), error)
    else:
        expect(False, "no error")
    try:
        rpc.rpc_sync(to, torch.mm, args=(torch.ones(2, 2), torch.ones(3, 3)))
    except RuntimeError as error:
        expect("cannot be multiplied" in str(error), error)
    else:
        expect(False, "no error")


def run(rank: int, size: int, init_method: str | None) -> None:
    """One rank. Without an init_method MPI's launcher has made the ranks."""
    import torch_rpc_mpi

    faulthandler.dump_traceback_later(LIMIT, exit=True)
    torch.set_num_threads(1)
    if init_method:
        options = torch_rpc_mpi.MPIRpcBackendOptions(init_method=init_method)
        rpc.init_rpc(f"worker{rank}", backend="MPI", rank=rank, world_size=size, rpc_backend_options=options)
    else:
        rpc.init_rpc(f"worker{rank}", backend="MPI")
    info = rpc.get_worker_info()
    workers = rpc.api._get_current_rpc_agent().get_worker_infos()
    expect((info.id, len(workers)) == (rank, size), info, workers)
    said = io.StringIO()  # a callee writes its errors there, which would look like ours
    try:
        with contextlib.redirect_stderr(said):
            for function in CHECKS:
                print(f"rank {rank}: {function.__name__}", file=sys.stderr)
                function(f"worker{(rank + 1) % size}")
            rpc.shutdown()
    except BaseException:
        print(said.getvalue(), file=sys.stderr, flush=True)
        raise
    names = ", ".join(function.__name__ for function in CHECKS)
    print(f"rank {rank} of {size}: init, {names}, shutdown: ok", flush=True)


def launched_place() -> tuple[int, int]:
    """From the launchers' variables, because importing mpi4py before init_rpc would initialise MPI."""
    from torch_rpc_mpi import _launchers

    place = _launchers.find_torchrun() or _launchers.find_launcher()
    if place is None or place.rank is None or place.size is None:
        raise SystemExit("--launched: no launcher's variables are set; start this program with mpirun")
    return place.rank, place.size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--launched", action="store_true", help="mpirun, srun or torchrun has started this process")
    how.add_argument("--spawn", type=int, metavar="N", help="start N processes")
    arguments = parser.parse_args()
    if arguments.launched:
        run(*launched_place(), None)
        return
    size = arguments.spawn or 1
    with tempfile.TemporaryDirectory() as directory:
        init_method = f"file://{directory}/store"
        if arguments.spawn:
            torch.multiprocessing.spawn(run, args=(size, init_method), nprocs=size)
        else:
            run(0, size, init_method)


if __name__ == "__main__":
    main()
