"""torch's profiler of RPC (the legacy one, as torch has it): calls are named, and events of the callee come back."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_calls import script_scale_and_add
from harness import World, case, equal
from torch import Tensor
from torch.autograd.profiler_legacy import profile
from torch.distributed.rpc.internal import RPCExecMode, _build_rpc_profiling_key
from torch.futures import Future

REMOTE = "#remote_op: "


def compute(x: Tensor) -> Tensor:
    with torch.autograd.profiler.record_function("##inner block##"):
        return torch.relu(torch.mm(x, x)) + 1


@rpc.functions.async_execution
def compute_elsewhere(to: str, x: Tensor) -> Future[Tensor]:
    return rpc.rpc_async(to, compute, args=(x,))


FUNCTIONS = {
    "python": (compute, (torch.ones(3, 3),), "compute", ["aten::mm", "aten::relu", "aten::add", "##inner block##"]),
    "builtin": (torch.mm, (torch.ones(3, 3), torch.ones(3, 3)), "aten::mm", ["aten::mm"]),
    "script": (
        script_scale_and_add,
        (torch.ones(3, 3), 2.0),
        torch._jit_internal._qualified_name(script_scale_and_add),
        ["aten::mul", "aten::add"],
    ),
}
APIS = {
    RPCExecMode.SYNC: rpc.rpc_sync,
    RPCExecMode.ASYNC: lambda *args, **kwargs: rpc.rpc_async(*args, **kwargs).wait(),
    RPCExecMode.REMOTE: lambda *args, **kwargs: rpc.remote(*args, **kwargs)._get_profiling_future().wait(),
}


@case(
    each={f"{kind}-{mode.value}": (*FUNCTIONS[kind], mode) for kind in FUNCTIONS for mode in APIS},
    sizes=(2, 4),
)
def calls_and_their_remote_events(world: World, variant: Any) -> None:
    function, arguments, name, operators, mode = variant
    if world.rank != 1:
        return
    to = world.name(0)
    with profile() as events:
        APIS[mode](to, function, args=arguments)
    key = _build_rpc_profiling_key(mode, name, world.name(), to)
    local = [event for event in events.function_events if event.name == key and not event.is_remote]
    equal(len(local), 1)
    equal(local[0].node_id, world.rank)
    if mode == RPCExecMode.REMOTE and function is not compute:
        return  # torch gathers no remote events there
    remote = {event.name: event for event in events.function_events if event.is_remote}
    for operator in operators:
        assert key + REMOTE + operator in remote, f"no {operator} in {sorted(remote)}"
        equal(remote[key + REMOTE + operator].node_id, 0)


@case()
def nested_calls(world: World) -> None:
    if world.rank == 0:
        first, second = world.name(1), world.name(2)
        with profile() as events:
            rpc.rpc_sync(first, compute_elsewhere, args=(second, torch.ones(3, 3)))
        outer = _build_rpc_profiling_key(RPCExecMode.SYNC, "compute_elsewhere", world.name(), first)
        inner = outer + REMOTE + _build_rpc_profiling_key(RPCExecMode.ASYNC, "compute", first, second)
        remote = {event.name: event.node_id for event in events.function_events if event.is_remote}
        equal(remote[inner], 1)
        equal(remote[inner + REMOTE + "aten::mm"], 2)


@case(sizes=(2,))
def shapes_and_memory(world: World) -> None:
    if world.rank == 1:
        with profile(record_shapes=True, profile_memory=True) as events:
            rpc.rpc_sync(world.next, compute, args=(torch.ones(3, 3),))
        mm = next(e for e in events.function_events if e.is_remote and e.name.endswith("aten::mm"))
        equal(mm.input_shapes, [[3, 3], [3, 3]])
        assert any(event.cpu_memory_usage for event in events.function_events if event.is_remote)


@case(sizes=(2,))
def together_with_autograd(world: World) -> None:
    """Profiling and autograd information wrap a message both, in either order."""
    if world.rank == 1:
        x = torch.ones(3, 3, requires_grad=True)
        with dist_autograd.context(), profile() as first:
            rpc.rpc_sync(world.next, torch.mul, args=(x, x))
        with profile() as second, dist_autograd.context():
            rpc.rpc_sync(world.next, torch.mul, args=(x, x))
        for events in (first, second):
            names = [event.name for event in events.function_events if event.is_remote]
            assert any(name.endswith(REMOTE + "aten::mul") for name in names), names


@case(sizes=(2,))
def chrome_trace(world: World) -> None:
    if world.rank == 1:
        with profile() as events:
            rpc.rpc_sync(world.next, compute, args=(torch.ones(3, 3),))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            events.export_chrome_trace(str(path))
            names = [event["name"] for event in json.loads(path.read_text())]
        assert any("aten::mm" in name for name in names), names


@case(sizes=(2,))
def profile_of_the_whole_server(world: World) -> None:
    if world.rank == 1:
        server = world.next
        profiler = rpc.remote(server, rpc._server_process_global_profile)
        profiler.rpc_sync().__enter__()
        rpc.rpc_sync(server, torch.sub, args=(torch.tensor(1), torch.tensor(2)))
        profiler.rpc_sync().__exit__(None, None, None)
        names = rpc.rpc_sync(server, event_names, args=(profiler,))
        assert "aten::sub" in names, names


def event_names(profiler: rpc.RRef) -> list[str]:
    return [event.name for events in profiler.local_value().process_global_function_events for event in events]
