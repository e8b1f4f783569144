"""Tensors on devices over time: nothing grows, and nothing is left."""

from __future__ import annotations

import gc
from typing import Any

import torch.distributed.rpc as rpc
from device_world import IDENTITY, PINNED, device_case, held, module, numbers
from harness import World, equal, eventually

SIZES = [0, 10, 3_000, 20_000, 100_000, 600_000]
AT_ONCE = 8
ROUNDS = 62  # of so many calls, with a tensor each way, at each of two ranks: 2000 transfers
# Events and blocks of pinned memory are pooled: there are as many as were used at once, which time decides. A thousand
# more would be one for each call.
POOLED = {"events": 100, "pinned": 4 * AT_ONCE}


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
    world.init()  # torch keeps the last agent until there is another one
    rpc.shutdown()
    stay_below(before, "nothing is left of the sessions that are over")
