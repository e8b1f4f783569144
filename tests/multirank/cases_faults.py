"""What a program learns of faults: workers that are lost, and the flight recorder's files."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.rpc as rpc
from cases_calls import identity
from harness import World, case, equal, signal_and_wait, wait


@contextmanager
def told_of_losses() -> Iterator[tuple[list[tuple[str, str]], threading.Event]]:
    """The names and reasons of the workers that are lost meanwhile, and an event that is set at each."""
    import torch_rpc_mpi

    losses: list[tuple[str, str]] = []
    told = threading.Event()

    def note(worker: Any, reason: str) -> None:
        losses.append((worker.name, reason))
        told.set()
        raise ValueError("of the callback, which is logged")

    handle = torch_rpc_mpi.on_worker_lost(note)
    try:
        yield losses, told
    finally:
        handle.remove()


@case(session=False, sizes=(3,), tensorpipe="it does not tell")
def workers_that_leave_are_told_of_once(world: World) -> None:
    with told_of_losses() as (losses, told):
        world.init()
        world.barrier()
        if world.rank == 2:
            rpc.shutdown(graceful=False)
        else:
            assert told.wait(20)
            lost = world.name(2)
            equal([name for name, _ in losses], [lost])
            with pytest.raises(RuntimeError) as caught:
                rpc.rpc_sync(lost, identity, args=(1,))
            assert losses[0][1] in str(caught.value)
            equal(rpc.rpc_sync(world.name(1 - world.rank), identity, args=(1,)), 1)
        world.barrier()
        if world.rank != 2:
            rpc.shutdown(graceful=False)
    before = list(losses)
    world.barrier()
    world.init()
    world.barrier()
    if world.rank == 2:
        rpc.shutdown(graceful=False)
    else:
        with pytest.raises(RuntimeError, match="graceful shutdown of RPC is not possible"):
            rpc.shutdown()
        equal(losses, before)  # the handle was removed


def read(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def files_in(directory: str, count: int) -> list[Path]:
    """As soon as there are so many; they appear whole."""
    deadline = time.monotonic() + 20
    while len(files := sorted(Path(directory).glob("*.json"))) < count:
        assert time.monotonic() < deadline, files
        time.sleep(0.005)
    return files


@case(session=False, sizes=(2,), tensorpipe="it has none")
def flight_records(world: World) -> None:
    """One for a call that timed out, one for a signal, and one when asked for."""
    import torch_rpc_mpi

    with pytest.raises(RuntimeError, match=r"not running in this process: call rpc\.init_rpc"):
        torch_rpc_mpi.write_flight_record("nowhere")
    with tempfile.TemporaryDirectory() as directory:
        world.init(flight_recorder_dir=directory)
        world.barrier()
        if world.rank == 0:
            started, go = world.event("started"), world.event("go")
            running = rpc.rpc_async(world.next, signal_and_wait, args=(started, go))
            started.wait()
            with pytest.raises(RuntimeError, match="RPC ran for more"):
                rpc.rpc_sync(world.next, wait, args=(go,), timeout=0.1)
            [path] = files_in(directory, 1)
            record = read(path)
            assert path.name.startswith(f"torch_rpc_mpi-rank0-{os.getpid()}-1"), path
            assert record["why"].startswith(f"a call timed out, to worker '{world.next}' (rank 1 on host "), record[
                "why"
            ]
            equal((record["worker"], record["rank"], record["pid"]), (world.name(), 0, os.getpid()))
            equal([call["peer"] for call in record["unanswered_calls"]], [1])
            timed_out = next(event for event in record["events"] if event["event"] == "timed out")
            life = [event for event in record["events"] if event["call"] == timed_out["call"]]
            equal([event["event"] for event in life], ["made", "sent", "timed out"])
            times = [event["time"] for event in life]
            assert times == sorted(times), times
            assert 0.09 < times[-1] - times[0] < 20, times

            path = torch_rpc_mpi.write_flight_record(f"{directory}/asked")
            equal(read(path)["why"], "asked for")
            theirs = rpc.rpc_sync(world.next, record_here, args=(f"{directory}/theirs",))
            equal(
                [(request["peer"], request["function"]) for request in read(theirs)["running_requests"]],
                [
                    (0, "harness.signal_and_wait"),
                    (0, "harness.wait"),
                    (0, "cases_faults.record_here"),
                ],
            )
            with pytest.raises(RuntimeError, match=r"cannot write /dev/null/x: "):
                torch_rpc_mpi.write_flight_record("/dev/null/x")
            go.signal("done")
            equal(running.wait(), "done")
        world.barrier()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
            [path] = files_in(directory, 1)
            equal(read(path)["why"], "SIGUSR2")
        world.barrier()
        rpc.shutdown()
        equal(signal.getsignal(signal.SIGUSR2), signal.SIG_DFL)


def record_here(path: str) -> str:
    import torch_rpc_mpi

    return torch_rpc_mpi.write_flight_record(path)


@case(tensorpipe="it has none")
def flight_records_need_a_path_or_a_directory(world: World) -> None:
    import torch_rpc_mpi

    with pytest.raises(RuntimeError, match="flight_recorder_dir"):
        torch_rpc_mpi.write_flight_record()
