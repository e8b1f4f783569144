"""rpc_sync, rpc_async and remote of this package beside torch's: results, errors, time limits, profiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_calls import Counter, identity, scale_and_add, script_scale_and_add
from functions_table import later, raises, show
from harness import World, case, equal, in_threads, wait
from torch.autograd.profiler_legacy import profile

import torch_rpc_mpi

OURS = {"rpc_sync": torch_rpc_mpi.rpc_sync, "rpc_async": torch_rpc_mpi.rpc_async, "remote": torch_rpc_mpi.remote}
_X = torch.arange(6.0).reshape(2, 3)
CALLS: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "builtin": (torch.add, (_X, 1), {"alpha": 3}),
    "function": (scale_and_add, (_X, 2.0), {"bias": 0.5}),
    "method": (Counter.plus, (Counter(2), 3), {}),
    "script": (script_scale_and_add, (_X, 2.0), {"bias": 0.5}),
    "operator that fails": (torch.mm, (_X, _X), {}),
    "function that raises": (raises, (ValueError,), {}),
    "wrong arguments": (scale_and_add, (), {}),
    "script, wrong arguments": (script_scale_and_add, ("text", 1.0), {}),
    "no function": ("text", (), {}),
}


def value_of(made: Any) -> Any:
    if isinstance(made, rpc.PyRRef):
        return made.to_here()
    return made.wait() if isinstance(made, torch._C.Future) else made


def outcome(api: Any, to: Any, name: str) -> Any:
    function, args, kwargs = CALLS[name]
    try:
        return show(value_of(api(to, function, args=args, kwargs=kwargs)))
    except Exception as error:
        return type(error), str(error).splitlines()[:1]


# torch's RRef to the result of an operator that fails never gets a value, and its remote() sends what is no function.
ALIKE = {
    f"{api} {name}": (api, name)
    for api in OURS
    for name in CALLS
    if not (api == "remote" and name in ("operator that fails", "no function"))
}


@case(each=ALIKE)
def ends_as_torchs(world: World, which: tuple[str, str]) -> None:
    api, name = which
    for to in (world.next, rpc.get_worker_info(world.next), rpc.get_worker_info(world.next).id, world.name()):
        equal(outcome(OURS[api], to, name), outcome(getattr(rpc, api), to, name))


@case(each=tuple(OURS))
def async_execution(world: World, api: str) -> None:
    equal(value_of(OURS[api](world.next, later, args=(world.name(world.rank + 2), _X))), _X * 2)


@case()
def remote_refuses_what_is_no_function(world: World) -> None:
    with pytest.raises(TypeError, match="callable"):
        torch_rpc_mpi.remote(world.next, "text")


@case(each=tuple(OURS))
def unknown_workers(world: World, api: str) -> None:
    with pytest.raises(RuntimeError, match="nobody"):
        OURS[api]("nobody", identity, args=(1,))


@case(each=("rpc_sync", "rpc_async"))
def time_limits(world: World, api: str) -> None:
    go = world.event("go")
    with pytest.raises(RuntimeError, match="RPC ran for more than set timeout"):
        value_of(OURS[api](world.next, wait, args=(go,), timeout=0.1))
    go.signal()


@case()
def waits_for_all(world: World) -> None:
    """As torch's rpc_async does, inside rpc._wait_all()."""
    with rpc.api._wait_all():
        futures = [torch_rpc_mpi.rpc_async(world.next, identity, args=(index,)) for index in range(20)]
    assert all(future.done() for future in futures)


@case()
def from_many_threads(world: World) -> None:
    """Only one of them at a time drives progress while it waits."""

    def calls(thread: int) -> None:
        for index in range(100):
            to = world.name(world.rank + index)
            equal(torch_rpc_mpi.rpc_sync(to, identity, args=((thread, index),)), (thread, index))
            equal(rpc.rpc_sync(to, torch.add, args=(_X, index)), _X + index)

    in_threads(6, calls)


@case(each=tuple(OURS), sizes=(2,))
def profiles(world: World, api: str) -> None:
    if world.rank != 0:
        return
    names = []
    for function in (OURS[api], getattr(rpc, api)):
        with profile() as events:
            made = function(world.next, torch.add, args=(_X, 1))
            value_of(made)
            if isinstance(made, rpc.PyRRef):  # the value comes by another message than the record
                made._get_profiling_future().wait()
        names.append(sorted(event.name for event in events.function_events if event.name.startswith("rpc_")))
    equal(names[0], names[1])
    assert names[0]


@case()
def gradients(world: World) -> None:
    x = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context:
        value = torch_rpc_mpi.rpc_sync(world.next, scale_and_add, args=(x, 3.0))
        dist_autograd.backward(context, [value.sum()])
        equal(dist_autograd.get_gradients(context)[x], torch.full((2,), 3.0))
