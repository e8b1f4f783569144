"""One process of a world that no MPI launcher made, or several started by multiprocessing. Run by test_worlds.py.

    python world_program.py [--rank R --size N] [--spawn METHOD] [--node NAME] [--init-method URL] [--forbid CALL]
                            [--killed-in MODULE.FUNCTION] SCENARIO
    python ranks.py main world_program ...

Prints "rank R: ok" when the scenario went as it should.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import system_calls
import torch
import torch.distributed.rpc as rpc
from torch.distributed.rendezvous import rendezvous


def double(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    return x * 2, os.getpid()


def call_until_it_fails(worker: str) -> None:
    while True:
        rpc.rpc_sync(worker, double, args=(torch.ones(1),))


def touch(event: str) -> None:
    Path(os.environ["RPC_TEST_SCRATCH"], event).touch()


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.001)


def wait_for(event: str) -> None:
    until(Path(os.environ["RPC_TEST_SCRATCH"], event).exists)


class Process:
    """This process, and how it begins sessions."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.rank, self.size = arguments.rank, arguments.size
        self._given = {}
        if arguments.init_method:
            self._given["init_method"] = arguments.init_method
        if arguments.node:
            self._given["node"] = arguments.node.format(rank=self.rank)

    def begin(self, rank: int | None = None, size: int | None = None, **options: Any) -> None:
        import torch_rpc_mpi

        rank, size = self.rank if rank is None else rank, self.size if size is None else size
        place = {} if size is None else {"rank": rank, "world_size": size}
        rpc.init_rpc(
            f"worker{os.environ['RANK'] if rank is None else rank}",
            backend="MPI",
            rpc_backend_options=torch_rpc_mpi.MPIRpcBackendOptions(**self._given, **options),
            **place,
        )

    def session(self, rank: int | None = None, size: int | None = None) -> None:
        """Calls everybody, in messages of every way of transfer, and hears of as many processes as there are ranks."""
        self.begin(rank, size)
        workers = sorted(worker.name for worker in rpc.api._get_current_rpc_agent().get_worker_infos())
        pids = set()
        for worker in workers:
            for length in (1, 10_000, 1_000_000):
                result, pid = rpc.rpc_sync(worker, double, args=(torch.ones(length),))
                assert torch.equal(result, torch.full((length,), 2.0))
                pids.add(pid)
        assert len(pids) == len(workers), pids
        if rank is not None:
            assert (rpc.get_worker_info().id, len(workers)) == (rank, size)
        rpc.shutdown()


def once(process: Process) -> None:
    process.session()
    assert not [name for name in os.environ if name.startswith("PMI")], "MPI's variables stay in the environment"
    shared = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]
    assert [line for line in shared if not line.endswith("(deleted)")] == []


def opens_no_port(process: Process) -> None:
    process.session()
    opened = psutil.Process().net_connections("inet")
    assert [connection.laddr for connection in opened if connection.status == psutil.CONN_LISTEN] == []
    assert "UCX_TLS" not in os.environ, "what MPI is told stays in the environment"


def alone(process: Process) -> None:
    """A group of one; says which files it has in shared memory."""
    process.session()
    maps = Path("/proc/self/maps").read_text().splitlines()
    files = {line.split()[-1] for line in maps if "/dev/shm/" in line and not line.endswith("(deleted)")}
    Path(os.environ["RPC_TEST_SCRATCH"], "files").write_text("\n".join(files))


def twice(process: Process) -> None:
    process.session()
    process.session()


def fails_first(process: Process) -> None:
    """The workers of torchrun's first attempt fail with MPI's world up, and those of its second form another."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        process.begin()
        sys.exit(3)
    process.session()


def fails_before_init(process: Process) -> None:
    """One of torchrun's first attempt fails when the other waits for it, and has left its traces in the store."""
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        store = next(rendezvous("env://"))[0]
        while not store.check(["torch_rpc_mpi/2/member/0"]):
            time.sleep(0.01)
        raise ValueError("on purpose")
    process.session()


def shuts_down_at_exit(process: Process) -> None:
    """As libraries have it done, by handlers that may be older than the session."""

    def at_exit() -> None:
        rpc.shutdown(timeout=60)
        print(f"rank {process.rank}: shut down\n", end="", flush=True)

    atexit.register(at_exit)
    process.begin()
    for worker in range(process.size):
        rpc.rpc_sync(f"worker{worker}", double, args=(torch.ones(1),))


def again(process: Process) -> None:
    """Sessions of all, of some, and of all in another order."""
    rank, size = process.rank, process.size
    process.session()
    process.session()
    if rank != 1:
        process.session(rank - (rank > 1), size - 1)
    process.session((rank + 1) % size, size)
    process.session(0, 1)
    process.session(size - 1 - rank, size)


def late(process: Process) -> None:
    """An attempt that a rank misses fails with its number; the next one succeeds."""
    if process.rank == 0:
        with pytest.raises(TimeoutError, match=r"rank 1 of 2 did not call init_rpc within"):
            process.begin(init_timeout=0.2)
        touch("missed")
    else:
        wait_for("missed")
    process.session()


def interrupted(process: Process) -> None:
    """Ctrl-C while a rank is missing; the next attempt succeeds."""
    if process.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sender = threading.Thread(target=interrupt_when_it_waits)
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            process.begin()
        sender.join()
        touch("interrupted")
        # What waited for the other rank in the background has met it before the next attempt begins.
        while any(thread.name == "rpc_mpi_wait" for thread in threading.enumerate()):
            time.sleep(0.001)
    else:
        wait_for("interrupted")
    process.session()


def interrupt_when_it_waits() -> None:
    main = threading.main_thread().ident
    while not {"_poll", "interruptibly"} & {
        frame.f_code.co_name for frame, _ in traceback.walk_stack(sys._current_frames()[main])
    }:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)


def strangers(process: Process) -> None:
    """Two who were in a world together, and one who was not, cannot form one."""
    if process.rank < 2:
        process.session(process.rank, 2)
    with pytest.raises(RuntimeError, match=r"not belong to the same MPI world.*worker2.*none yet.*start them all anew"):
        process.begin()


def mpi_first(process: Process) -> None:
    """Who has initialised MPI is alone for ever."""
    from mpi4py import MPI

    assert MPI.COMM_WORLD.Get_size() == 1
    with pytest.raises(RuntimeError, match="Call init_rpc before `from mpi4py import MPI`"):
        process.begin()


def mpi4py_beside(process: Process) -> None:
    """The world is mpi4py's too."""
    process.begin()
    from mpi4py import MPI

    assert MPI.COMM_WORLD.Get_size() == process.size
    assert MPI.COMM_WORLD.allreduce(1) == process.size
    rpc.shutdown()
    assert MPI.COMM_WORLD.allgather(MPI.COMM_WORLD.Get_rank()) == list(range(process.size))
    with pytest.raises(MPI.Exception):
        MPI.COMM_WORLD.Send(b"", dest=process.size)


def leaves(process: Process) -> None:
    """Rank 1 ends without shutdown, as a multiprocessing child does that skips atexit; nobody hangs or dies."""
    process.begin()
    if process.rank == 1:
        print("rank 1: ok\n", end="", flush=True)
        sys.exit(0)
    with pytest.raises(RuntimeError, match="worker1") as caught:
        call_until_it_fails("worker1")
    assert "timeout" not in str(caught.value)
    rpc.shutdown(graceful=False)


def dies(process: Process) -> None:
    """Rank 1 is killed; calls to it fail with its name, the others go on."""
    process.begin()
    if process.rank == 1:
        print("rank 1: ok\n", end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"'worker1' \(rank 1 on host .* has ended without leaving"):
        call_until_it_fails("worker1")
    other = f"worker{2 - process.rank}"
    assert rpc.rpc_sync(other, double, args=(torch.ones(1_000_000),))[0].sum() == 2_000_000
    touch(f"{process.rank} is done")
    wait_for(f"{2 - process.rank} is done")
    rpc.shutdown(graceful=False)


def dies_in_init(process: Process) -> None:
    """One is killed on its way through init_rpc; the others learn of it at once, and have a session without it."""
    told = r"init_rpc failed because rank (\d), worker\1 \(pid \d+ on .*\), has ended while the group formed"
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=told) as caught:
        process.begin()
    assert time.monotonic() - begin < 20  # of 60
    lost = int(re.search(told, str(caught.value))[1])
    process.session(process.rank - (process.rank > lost), process.size - 1)


def dies_in_transfer(process: Process) -> None:
    """Rank 1 is killed while large tensors go to and from it; the others go on."""
    process.begin()
    large = torch.ones(32 << 20)  # 128 MiB
    if process.rank == 1:
        pending = [rpc.rpc_async(f"worker{to}", double, args=(large,)) for to in (0, 2) for _ in range(3)]
        wait_for("0 sends")
        wait_for("2 sends")
        print("rank 1: ok\n", end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        assert pending
    pending = [rpc.rpc_async("worker1", double, args=(large,)) for _ in range(3)]
    touch(f"{process.rank} sends")
    for future in pending:  # some may have been answered before
        with contextlib.suppress(RuntimeError):
            future.wait()
    with pytest.raises(RuntimeError, match=r"'worker1' \(rank 1 on host .* has ended without leaving"):
        call_until_it_fails("worker1")
    for _ in range(3):
        assert rpc.rpc_sync(f"worker{2 - process.rank}", double, args=(large,))[0].sum() == 2 * large.numel()
    touch(f"{process.rank} is done")
    wait_for(f"{2 - process.rank} is done")
    rpc.shutdown(graceful=False)


def call_on_and_on(worker: str, over: threading.Event, errors: list[str]) -> threading.Thread:
    """A thread that calls the worker, with more calls under way than one, until it is over or one fails."""

    def call() -> None:
        lengths = itertools.cycle((1, 1, 100, 5_000, 100_000))
        calls: collections.deque[Any] = collections.deque()
        try:
            while not over.is_set():
                length = next(lengths)
                calls.append((length, rpc.rpc_async(worker, double, args=(torch.ones(length),))))
                if len(calls) > 10:
                    length, future = calls.popleft()
                    assert future.wait()[0].sum() == 2 * length
        except RuntimeError as error:
            errors.append(str(error))
        for _, future in calls:
            with contextlib.suppress(RuntimeError):
                future.wait()

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def dies_on_another_host(process: Process) -> None:
    """Rank 2, alone on its host, is killed while all call all: the others hear of it and go on."""
    import torch_rpc_mpi

    process.begin()
    workers = [f"worker{rank}" for rank in range(process.size)]
    lost: list[str] = []
    torch_rpc_mpi.on_worker_lost(lambda worker, reason: lost.append(worker.name))
    for worker in workers:
        rpc.rpc_sync(worker, double, args=(torch.ones(1),))
    touch(f"{process.rank} has called")
    for rank in range(process.size):
        wait_for(f"{rank} has called")
    over = threading.Event()
    errors: dict[str, list[str]] = {worker: [] for worker in workers}
    others = [worker for worker in workers if worker != workers[process.rank]]
    threads = [call_on_and_on(worker, over, errors[worker]) for worker in others]
    if process.rank == 2:
        time.sleep(0.5)  # amid the calls
        print("rank 2: ok\n", end="", flush=True)
        touch("dead")
        os.kill(os.getpid(), signal.SIGKILL)
    wait_for("dead")
    begin = time.monotonic()
    until(lambda: bool(errors["worker2"]))
    took = time.monotonic() - begin
    assert took < 3, f"after {took:.2f} s"  # two are promised
    assert re.search(r"'worker2' \(rank 2 on host .* has ended without leaving", errors["worker2"][0]), errors
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="'worker2' "):
        rpc.rpc_sync("worker2", double, args=(torch.ones(1),))
    assert time.monotonic() - begin < 1
    until(lambda: lost == ["worker2"])
    over.set()
    for thread in threads:
        thread.join()
    other = f"worker{1 - process.rank}"
    assert errors[other] == []
    assert rpc.rpc_sync(other, double, args=(torch.ones(1_000_000),))[0].sum() == 2_000_000
    touch(f"{process.rank} is done")
    wait_for(f"{1 - process.rank} is done")
    rpc.shutdown(graceful=False)


def is_silent_on_another_host(process: Process) -> None:
    """Rank 2, alone on its host, stops for longer than heartbeat_timeout. All give it up, and it hears of that."""
    process.begin(heartbeat_timeout=1)
    if process.rank == 2:
        Path(os.environ["RPC_TEST_SCRATCH"], "pid").write_text(str(os.getpid()))
        touch("written")
        wait_for("given up")
        until(lambda: len(rpc.api._get_current_rpc_agent().lost_workers()) == 2)
        with pytest.raises(RuntimeError, match=r"this worker was given up by worker 'worker[01]' .* and so by all"):
            rpc.rpc_sync("worker0", double, args=(torch.ones(1),))
        rpc.shutdown(graceful=False)
        return
    wait_for("written")
    pid = int(Path(os.environ["RPC_TEST_SCRATCH"], "pid").read_text())
    rpc.rpc_sync("worker2", double, args=(torch.ones(1),))
    touch(f"{process.rank} has called")
    wait_for(f"{1 - process.rank} has called")
    if process.rank == 0:
        stop(pid)
        touch("stopped")
    wait_for("stopped")
    silent = r"'worker2' \(rank 2 on host .*\) failed: nothing was heard of it for .* \(heartbeat_timeout is 1 s\)"
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=silent):
        rpc.rpc_sync("worker2", double, args=(torch.ones(1),))
    assert time.monotonic() - begin < 4
    assert rpc.rpc_sync(f"worker{1 - process.rank}", double, args=(torch.ones(1),))[0] == 2
    touch(f"{process.rank} is done")
    wait_for(f"{1 - process.rank} is done")
    if process.rank == 0:
        touch("given up")
        os.kill(pid, signal.SIGCONT)
    rpc.shutdown(graceful=False)


def is_silent_beside_another(process: Process) -> None:
    """Rank 2 stops for several heartbeat_timeouts. Rank 1, of the same host, can see that it is alive."""
    process.begin(heartbeat_timeout=0.5)
    if process.rank == 0:
        pid = rpc.rpc_sync("worker2", os.getpid)
        stop(pid)
        call = rpc.rpc_async("worker2", double, args=(torch.ones(1),))
        time.sleep(3)
        assert not call.done()
        os.kill(pid, signal.SIGCONT)
        assert call.wait()[0] == 2
    rpc.shutdown()


def has_too_little_shared_memory(process: Process) -> None:
    needs = r"/dev/shm of host .* has [\d.]+ MiB free, and MPI's 4 ranks there need [\d.]+ MiB.*--shm-size=\d+m"
    with pytest.raises(RuntimeError, match=needs):
        process.begin()


def has_too_long_a_host_name(process: Process) -> None:
    with pytest.raises(RuntimeError, match=r"the name of this host has 64 characters.*--hostname"):
        process.begin()


answer: torch.futures.Future[int] = torch.futures.Future()
asked: list[None] = []


@rpc.functions.async_execution
def answer_later() -> torch.futures.Future[int]:
    asked.append(None)
    return answer


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def flood(process: Process, end: signal.Signals) -> None:
    """Half of the ranks stop, with calls from rank 0 and answers of it under way to each that would fill the shared
    memory of MPI many times. Rank 0 reaches the others all the same, before and after the stopped ones get a signal.
    """
    process.begin()
    stopped = [f"worker{rank}" for rank in range(1, process.size // 2 + 1)]
    others = [f"worker{rank}" for rank in range(process.size // 2 + 1, process.size)]
    if process.rank > 0:
        count = 100 if f"worker{process.rank}" in stopped else 0
        calls = [rpc.rpc_async("worker0", answer_later) for _ in range(count)]
        wait_for("it is over")  # or rank 0 kills this one
        assert torch.futures.wait_all(calls) == [1] * len(calls)
        rpc.shutdown(graceful=end == signal.SIGCONT)
        return

    def reach_others() -> None:
        for _ in range(3):
            calls = [rpc.rpc_async(to, double, args=(torch.ones(1),), timeout=20) for to in others for _ in range(100)]
            for call in calls:
                call.wait()
        for to in others:
            assert rpc.rpc_sync(to, double, args=(torch.ones(1_000_000),), timeout=20)[0].sum() == 2_000_000

    pids = [rpc.rpc_sync(to, os.getpid) for to in stopped]
    until(lambda: len(asked) == 100 * len(stopped))
    for pid in pids:
        stop(pid)
    calls = [rpc.rpc_async(to, double, args=(torch.ones(1),)) for to in stopped for _ in range(300)]
    answer.set_result(1)
    reach_others()
    for pid in pids:
        os.kill(pid, end)
    if end == signal.SIGKILL:
        for to, call in zip(stopped, calls[::300], strict=True):
            with pytest.raises(RuntimeError, match=rf"'{to}' .* has ended without leaving"):
                call.wait()
            print(f"rank {to.removeprefix('worker')}: ok\n", end="", flush=True)
        reach_others()
    else:
        assert [call.wait()[0].item() for call in calls] == [2] * len(calls)
    touch("it is over")
    rpc.shutdown(graceful=end == signal.SIGCONT)


def some_stop_for_a_while(process: Process) -> None:
    flood(process, signal.SIGCONT)


def some_are_killed(process: Process) -> None:
    flood(process, signal.SIGKILL)


def no_open_mpi(process: Process) -> None:
    with pytest.raises(RuntimeError, match=rf"only under its launcher.*`mpirun -n {process.size} python script.py`"):
        process.begin()


def is_killed(arguments: argparse.Namespace, *_: Any) -> None:
    print(f"rank {arguments.rank}: ok\n", end="", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def run(rank: int | None, arguments: argparse.Namespace) -> None:
    if rank is not None:
        arguments.rank = rank
    if arguments.forbid is not None:
        system_calls.forbid(arguments.forbid)
    if arguments.killed_in is not None:
        module, function = arguments.killed_in.split(".")
        setattr(importlib.import_module(f"torch_rpc_mpi.{module}"), function, functools.partial(is_killed, arguments))
    globals()[arguments.scenario](Process(arguments))
    rank = arguments.rank if arguments.rank is not None else int(os.environ["RANK"])
    print(f"rank {rank}: ok\n", end="", flush=True)  # in one piece, beside the others'


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rank", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--spawn", choices=("spawn", "forkserver", "fork"))
    parser.add_argument("--node")
    parser.add_argument("--init-method")
    parser.add_argument("--forbid", choices=system_calls.NUMBERS)
    parser.add_argument("--killed-in")
    parser.add_argument("scenario")
    arguments = parser.parse_args()
    if arguments.spawn is None:
        run(None, arguments)
        return
    context = multiprocessing.get_context(arguments.spawn)
    children = [context.Process(target=run, args=(rank, arguments)) for rank in range(arguments.size)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(max(abs(child.exitcode) for child in children))


if __name__ == "__main__":
    main()
