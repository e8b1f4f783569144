"""Tensors on devices over time: nothing grows, nothing is left, and captures of graphs go on beside them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed.rpc as rpc
from device_world import FIRST, IDENTITY, IS_TEST_DEVICE, PINNED, device_case, held, module, numbers
from harness import World, equal, eventually

SIZES = [0, 10, 3_000, 20_000, 100_000, 600_000]
AT_ONCE = 8
ROUNDS = 62  # of so many calls, with a tensor each way, at each of two ranks: 2000 transfers
# Events and blocks of pinned memory are pooled: there are as many as were used at once, which time decides. One that is
# lost with each transfer would be 2000 more.
POOLED = {"events": 500, "pinned": 4 * AT_ONCE}
GRAPHS = 20 if IS_TEST_DEVICE else 100
TRAFFIC_LIMIT = 30.0  # seconds, for a call


def identity(value: Any) -> Any:
    return value


def exchange(world: World, rounds: int) -> None:
    sent = [numbers(SIZES[i % len(SIZES)], seed=i) for i in range(AT_ONCE)]
    for _ in range(rounds):
        futures = [rpc.rpc_async(world.next, identity, args=(x,)) for x in sent]
        for x, future in zip(sent, futures, strict=True):
            equal(future.wait(), x)


def at_rest() -> dict[str, int]:
    """What is there once nothing is under way."""
    gc.collect()
    module().synchronize()
    return held()


def rests(limits: dict[str, int]) -> bool:
    return all(count <= limits[name] for name, count in at_rest().items())


def stay_below(limits: dict[str, int], what: str) -> None:
    try:
        eventually(lambda: rests(limits), what)
    except AssertionError as error:
        raise AssertionError(f"{what}: {at_rest()}, and not {limits}") from error


def nothing_grows(world: World) -> None:
    exchange(world, ROUNDS // 4)  # which also agrees on the way, and uses each ticket
    world.barrier()
    limits = {name: count + POOLED.get(name, 0) for name, count in at_rest().items()}
    world.barrier()
    exchange(world, ROUNDS)
    world.barrier()
    stay_below(limits, "2000 transfers leave no more than some")


@device_case(IDENTITY)
def nothing_grows_in_shared_memory(world: World) -> None:
    nothing_grows(world)


@device_case(PINNED)
def nothing_grows_in_pinned_memory(world: World) -> None:
    nothing_grows(world)


@device_case({}, session=False)
def a_session_leaves_nothing(world: World) -> None:
    before = at_rest()
    for options in (IDENTITY, PINNED, IDENTITY):
        world.init(**options)
        exchange(world, 4)
        rpc.shutdown()
    world.init()  # torch keeps the last agent, and so its pool of events, until there is another one
    rpc.shutdown()
    stay_below(before, "nothing is left of the sessions that are over")


def capture(work: Callable[[], None]) -> Any:
    """The graph of what it queues on a stream of its own; an error if anybody has spoiled the capture."""
    # Of high priority: the pool of the others is torch's for what calls of RPC use, which would be captured with it.
    with module().stream(module().Stream(FIRST, priority=-1)):
        if IS_TEST_DEVICE:
            module().begin_capture()
            work()
            return module().end_capture()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="global")
        try:
            work()
        finally:
            graph.capture_end()
        return graph


class Traffic:
    """Calls with tensors, small and large, one after the other in a thread that itself waits for no device."""

    def __init__(self, to: str) -> None:
        self._to = to
        self._sent = [numbers(size) for size in SIZES]
        self._over = threading.Event()
        self._call = threading.Semaphore(0)  # one has returned
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None
        self.results: list[torch.Tensor] = []  # the last ones

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                self.results = [rpc.rpc_sync(self._to, torch.add, args=(x, 1)) for x in self._sent]
            except BaseException as error:
                self._error = error
                self._over.set()
            self._call.release()

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def flows(self) -> None:
        """Returns when calls have begun and ended."""
        while self._call.acquire(blocking=False):
            pass
        for _ in range(2):
            assert self._call.acquire(timeout=TRAFFIC_LIMIT), "no call has returned"
            if self._error is not None:
                raise self._error

    def check(self) -> None:
        for x, result in zip(self._sent, self.results, strict=True):
            equal(result, x + 1)


def graphs_under_traffic(world: World) -> None:
    value = torch.zeros(16, device=FIRST)
    graphs = []
    with Traffic(world.next) as traffic:
        traffic.flows()

        def work() -> None:
            value.add_(1)
            traffic.flows()  # while this stream is captured, so that the engine asks for its events
            value.mul_(2)

        for _ in range(GRAPHS):
            graphs.append(capture(work))
        world.barrier()  # the other rank captures while it answers
    traffic.check()
    expected = 0.0
    for graph in graphs[:4]:
        graph.replay()
        expected = (expected + 1) * 2
    equal(value.cpu(), torch.full((16,), expected))


@device_case(IDENTITY)
def graphs_are_captured_beside_shared_memory(world: World) -> None:
    graphs_under_traffic(world)


@device_case(PINNED)
def graphs_are_captured_beside_pinned_memory(world: World) -> None:
    graphs_under_traffic(world)
