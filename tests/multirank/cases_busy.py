"""A worker whose threads are all busy still calls, moves bytes and fires deadlines; and the numbers that show it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from cases_async_execution import completed_by_event
from cases_calls import identity
from cases_timeouts import ran_out
from harness import Event, World, case, equal, eventually, in_threads, signal_and_wait, wait
from torch import Tensor
from torch.futures import Future

THREADS = 2
MIB = 2**20
NEEDS_A_THREAD = "its answers and deadlines need a free worker thread"

# TensorPipe's, which programs and dashboards know, and what this backend counts besides.
TORCH_METRICS = {
    "agent.num_idle_threads",
    "agent.client_active_calls",
    "agent.server_active_calls",
    "agent.server_active_async_calls",
    "agent.thread_pool_size",
}
MPI_METRICS = {
    "mpi.frames_sent",
    "mpi.frames_received",
    "mpi.bytes_sent",
    "mpi.bytes_received",
    "mpi.send_queue",
    "mpi.request_queue",
    "mpi.bulk_in_flight",
    "mpi.pending_calls",
}


def metrics() -> dict[str, float]:
    return {key: float(value) for key, value in rpc.api._get_current_rpc_agent().get_metrics().items()}


def metric(key: str) -> float:
    return metrics()[key]


class Occupation:
    """Rank 0 keeps all threads of rank 1 busy."""

    def __init__(self, world: World) -> None:
        self.go = world.event("go")
        self.busy, self.free = world.name(1), world.name(2)
        if world.rank == 0:
            started = [world.event(f"started {thread}") for thread in range(THREADS)]
            self.futures = [rpc.rpc_async(self.busy, signal_and_wait, args=(event, self.go)) for event in started]
            for event in started:
                event.wait()
        world.barrier()

    def end(self) -> None:
        self.go.signal("done")
        equal(torch.futures.wait_all(self.futures), ["done"] * THREADS)


@case(options={"num_worker_threads": THREADS}, tensorpipe=NEEDS_A_THREAD)
def own_calls_of_a_busy_worker(world: World) -> None:
    occupation = Occupation(world)
    if world.rank == 1:
        equal([rpc.rpc_sync(occupation.free, identity, args=(i,)) for i in range(20)], list(range(20)))
        equal(rpc.rpc_sync(occupation.free, torch.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))
        futures = [rpc.rpc_async(occupation.free, identity, args=(i,)) for i in range(100)]
        equal(torch.futures.wait_all(futures), list(range(100)))
        in_threads(4, lambda thread: rpc.rpc_sync(occupation.free, identity, args=(thread,)))
    world.barrier()
    if world.rank == 0:
        occupation.end()


@case(options={"num_worker_threads": THREADS}, tensorpipe=NEEDS_A_THREAD)
def bytes_of_a_busy_worker(world: World) -> None:
    occupation = Occupation(world)
    if world.rank == 1:
        for count in (5000, 4 * 2**20):
            x = torch.arange(float(count))
            equal(rpc.rpc_sync(occupation.free, identity, args=(x,)), x)
    world.barrier()
    if world.rank == 0:
        occupation.end()


@case(options={"num_worker_threads": THREADS}, tensorpipe=NEEDS_A_THREAD)
def deadlines_of_a_busy_worker(world: World) -> None:
    occupation = Occupation(world)
    if world.rank == 1:
        never = world.event("never")
        with pytest.raises(RuntimeError, match=ran_out(200)):
            rpc.rpc_sync(occupation.free, wait, args=(never,), timeout=0.2)
        never.signal()
    world.barrier()
    if world.rank == 0:
        occupation.end()


@case(options={"num_worker_threads": THREADS})
def calls_to_a_busy_worker_wait_their_turn(world: World) -> None:
    """They run when a thread is free, and run out if none is in time."""
    occupation = Occupation(world)
    if world.rank == 2:
        with pytest.raises(RuntimeError, match=ran_out(200)):
            rpc.rpc_sync(occupation.busy, identity, args=(1,), timeout=0.2)
    patient = rpc.rpc_async(occupation.busy, identity, args=(world.rank,)) if world.rank != 1 else None
    world.barrier()
    assert patient is None or not patient.done()
    world.barrier()
    if world.rank == 0:
        occupation.end()
    if patient is not None:
        equal(patient.wait(), world.rank)


@case(options={"num_worker_threads": THREADS})
def large_calls_to_a_busy_worker_arrive(world: World) -> None:
    occupation = Occupation(world)
    x = torch.arange(1_000_000.0)
    futures = [rpc.rpc_async(occupation.busy, identity, args=(x + i,)) for i in range(4)] if world.rank != 1 else []
    world.barrier()
    if world.rank == 0:
        occupation.end()
    for i, future in enumerate(futures):
        equal(future.wait(), x + i)


def signal_and_wait_with(arrived: Event, event: Event, _: Tensor) -> str:
    """As signal_and_wait, called with some data."""
    return signal_and_wait(arrived, event)


# MiB: what the long call brings, and what the next one does. Together they are more than may wait at a callee.
AFTER_A_LONG_CALL = {"one_large": (0, 20), "two_large": (7, 12)}


@case(each=AFTER_A_LONG_CALL, options={"num_worker_threads": THREADS}, sizes=(2,))
def calls_arrive_while_a_long_one_runs(world: World, sizes: tuple[int, int]) -> None:
    """The caller learns that the long one does not wait any more although the callee sends it no answer."""
    if world.rank == 0:
        started, go = world.event("started"), world.event("go")
        first, second = (torch.arange(size * MIB // 4, dtype=torch.int32) for size in sizes)
        long = rpc.rpc_async(world.next, signal_and_wait_with, args=(started, go, first))
        try:
            started.wait()
            large = rpc.rpc_async(world.next, identity, args=(second,), timeout=20)
            equal(rpc.rpc_sync(world.next, identity, args=(1,), timeout=20), 1)
            equal(large.wait(), second)
            equal(rpc.rpc_sync(world.next, identity, args=(second,), timeout=20), second)
            equal(rpc.rpc_sync(world.next, identity, args=(2,), timeout=20), 2)
            assert not long.done()
        finally:
            go.signal("done")
        equal(long.wait(), "done")


held: list[tuple[Future[int], int]] = []


@rpc.functions.async_execution
def hold(value: int) -> Future[int]:
    """Is answered with the value when all are."""
    result: Future[int] = Future()
    held.append((result, value))
    return result


def wait_and_return(event: Event, value: Any) -> Any:
    event.wait()
    return value


@case(sizes=(2,), tensorpipe="blocking callbacks take its worker threads, and answers need one")
def many_callbacks_that_wait_for_calls(world: World) -> None:
    """All of them are due before the first answer to a call of theirs."""
    count, answered = 200, Event("many_callbacks_that_wait_for_calls", "answered")

    def call_again(future: Future[int]) -> int:
        return rpc.rpc_sync(world.next, wait_and_return, args=(answered, future.wait() + 1))

    if world.rank == 0:
        futures = [rpc.rpc_async(world.next, hold, args=(i,)).then(call_again) for i in range(count)]
        eventually(lambda: all(future.done() for future in futures), "all callbacks have ended", 30)
        equal(torch.futures.wait_all(futures), list(range(1, count + 1)))
    else:
        eventually(lambda: len(held) == count, "all calls have arrived")
        for future, value in held:
            future.set_result(value)
        answered.signal()


@case(options={"num_worker_threads": 1}, sizes=(1, 2, 4))
def one_thread_is_enough_for_plain_calls(world: World) -> None:
    futures = [rpc.rpc_async(world.name(i), identity, args=(i,)) for i in range(200)]
    equal(torch.futures.wait_all(futures), list(range(200)))


# Metrics


@case(options={"num_worker_threads": 7})
def metrics_have_torchs_names(world: World) -> None:
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    agent = rpc.api._get_current_rpc_agent()
    for values in (agent.get_debug_info(), agent.get_metrics()):
        assert values.keys() >= TORCH_METRICS
        assert all(isinstance(value, str) for value in values.values())
        float_values = [float(values[key]) for key in TORCH_METRICS]
        assert all(value >= 0 for value in float_values)
    equal(metric("agent.thread_pool_size"), 7.0)
    eventually(lambda: metric("agent.num_idle_threads") == 7, "all threads are idle")
    common = rpc._rref_context_get_debug_info().keys() & agent.get_debug_info().keys()
    assert not common, "torch joins these into one dictionary"
    assert rpc._get_debug_info().keys() >= TORCH_METRICS


@case(options={"num_worker_threads": 4})
def metrics_of_calls_under_way(world: World) -> None:
    if world.rank == 0:
        started, go = world.event("started"), world.event("go")
        blocking = rpc.rpc_async(world.next, signal_and_wait, args=(started, go))
        started.wait()
        equal(metric("agent.client_active_calls"), 1.0)
        # The call that asks is itself one of the active ones.
        equal(rpc.rpc_sync(world.next, metric, args=("agent.server_active_calls",)), 2.0)
        assert rpc.rpc_sync(world.next, metric, args=("agent.num_idle_threads",)) <= 2
        pending = rpc.rpc_async(world.next, completed_by_event, args=(go,))
        eventually(
            lambda: rpc.rpc_sync(world.next, metric, args=("agent.server_active_async_calls",)) == 1,
            "the asynchronous call is counted",
        )
        equal(metric("agent.client_active_calls"), 2.0)
        go.signal("done")
        equal([blocking.wait(), pending.wait()], ["done"] * 2)
        eventually(lambda: metric("agent.client_active_calls") == 0, "no call is active at the caller")
        eventually(
            lambda: rpc.rpc_sync(world.next, metric, args=("agent.server_active_async_calls",)) == 0,
            "no asynchronous call is active at the callee",
        )


@case(sizes=(2,))
def gil_wait_time_when_asked_for(world: World) -> None:
    key = "agent.gil_average_wait_time_us"
    agent = rpc.api._get_current_rpc_agent()
    assert key not in agent.get_debug_info()
    rpc.enable_gil_profiling(True)
    world.barrier()
    try:
        for _ in range(10):
            rpc.rpc_sync(world.next, identity, args=(1,))
        assert float(agent.get_debug_info()[key]) >= 0
    finally:
        world.barrier()
        rpc.enable_gil_profiling(False)


@case(tensorpipe="it has no such metrics")
def metrics_of_this_backend(world: World) -> None:
    assert metrics().keys() >= MPI_METRICS
    world.barrier()
    before = metrics()
    size = 2**20
    for _ in range(10):
        rpc.rpc_sync(world.next, identity, args=(torch.ones(size, dtype=torch.uint8),))
    after = metrics()
    for direction in ("sent", "received"):
        # Ten requests of this rank's and ten answers to the one before, less what that one has still to send.
        assert after[f"mpi.frames_{direction}"] >= before[f"mpi.frames_{direction}"] + 10
        assert after[f"mpi.bytes_{direction}"] >= before[f"mpi.bytes_{direction}"] + 10 * size
    world.barrier()
    for key in ("mpi.send_queue", "mpi.request_queue", "mpi.bulk_in_flight", "mpi.pending_calls"):
        eventually(lambda key=key: metric(key) == 0, f"{key} is 0")


@case(options={"num_worker_threads": THREADS}, tensorpipe="it has no such metrics")
def metrics_of_queues(world: World) -> None:
    occupation = Occupation(world)
    if world.rank == 0:
        equal(metric("mpi.pending_calls"), float(THREADS))
        waiting = [rpc.rpc_async(occupation.busy, identity, args=(i,)) for i in range(5)]
        equal(metric("mpi.pending_calls"), THREADS + 5.0)
        world.signal("queued")
    if world.rank == 1:
        world.wait("queued")
        eventually(lambda: metric("mpi.request_queue") == 5, "the requests are queued")
        equal(metric("agent.num_idle_threads"), 0.0)
    world.barrier()
    if world.rank == 0:
        occupation.end()
        equal(torch.futures.wait_all(waiting), list(range(5)))
