"""The entry points beside torch's own, case by case: results, errors, RRef counts, gradients, profiler, futures."""

from __future__ import annotations

import asyncio
import gc
import threading
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_calls import wait_in_script
from functions_table import CASES, Call, Ours, Torchs, outcome, qualified, scale, script_scale, serialize
from harness import World, case, equal, eventually, in_threads, signal_and_wait
from torch.autograd.profiler_legacy import profile
from torch.distributed.rpc.internal import RPCExecMode

from torch_rpc_mpi import functions

APIS = {"torchs": Torchs, "ours": Ours}
CREATE = {
    "builtin": Call("builtin", "aten::add", (torch.ones(3), 1)),
    "function": Call("udf", scale, (torch.ones(3),)),
    "script": Call("script", qualified(script_scale), (torch.ones(3),)),
}


def counts() -> dict[str, str]:
    gc.collect()  # the errors of earlier cases hold frames, and those hold RRefs
    return rpc._rref_context_get_debug_info()


def counts_at(world: World) -> list[dict[str, str]]:
    return [rpc.rpc_sync(name, counts) for name in world.everyone]


def settled(world: World, before: list[dict[str, str]], own: bool) -> bool:
    """Whether all owners have answered, and calls to oneself have let go of the fork that stands for them."""
    now = counts_at(world)
    keys = ("num_pending_users", "num_pending_futures")
    answered = all(info[key] == old[key] for info, old in zip(now, before, strict=True) for key in keys)
    return answered and not (own and now[world.rank]["num_forks"] != before[world.rank]["num_forks"])


@case(each=CASES, sizes=(1, 2), limit=90.0)
def ends_as_with_torchs_own(world: World, call: Call) -> None:
    for name in dict.fromkeys((world.next, world.name())):
        dst = rpc.get_worker_info(name)
        expected, actual = outcome(call, Torchs, dst), outcome(call, Ours, dst)
        assert actual == expected, f"{actual} instead of {expected}"


@case(each=CREATE, sizes=(1, 2))
def reference_counts(world: World, call: Call) -> None:
    """While RRefs live and after they are gone, each count is what torch's own function makes it."""
    if world.rank != 0:
        return
    for name in world.everyone:
        dst = rpc.get_worker_info(name)
        eventually(lambda: set(chain(*(info.values() for info in counts_at(world)))) == {"0"}, "no RRef is left")
        before = counts_at(world)
        created = {}
        for key, api in APIS.items():
            rrefs = [call.create(api, dst) for _ in range(5)]
            for rref in rrefs:
                equal(rref.to_here(), torch.full((3,), 2.0))
            for rref in rrefs:
                rref._get_future().wait()
            own = dst.name == world.name()
            eventually(lambda before=before, own=own: settled(world, before, own), "calls settle")
            created[key] = counts_at(world)
            del rrefs, rref
            eventually(lambda before=before: counts_at(world) == before, f"counts {before}")
        equal(created["ours"], created["torchs"])


@case(each=CREATE, sizes=(1, 2))
def rrefs_of_either_are_alike_elsewhere(world: World, call: Call) -> None:
    """They travel, are forked, and serve proxies."""
    dst = rpc.get_worker_info(world.next)
    for api in (Torchs, Ours):
        rref = call.create(api, dst)
        equal(
            rpc.rpc_sync(world.name(world.rank + 1), torch.Tensor.add, args=(rref.to_here(), 1)), torch.full((3,), 3.0)
        )
        equal(rpc.rpc_sync(world.next, fetch, args=(rref,)), torch.full((3,), 2.0))
        equal(rref.rpc_sync().sum().item(), 6.0)


def fetch(rref: Any) -> Any:
    return rref.to_here()


@case(each=CREATE, sizes=(1, 2))
def gradients(world: World, call: Call) -> None:
    x = torch.ones(3, requires_grad=True)
    call = call._replace(args=(x, *call.args[1:]))
    dst = rpc.get_worker_info(world.next)
    results = {}
    for key, api in APIS.items():
        with dist_autograd.context() as context:
            value = call.start(api, dst).wait()
            there = call.create(api, dst).to_here()
            dist_autograd.backward(context, [(value * there).sum()])
            results[key] = dist_autograd.get_gradients(context)[x]
    equal(results["ours"], results["torchs"])
    assert results["ours"].abs().sum() > 0


@case(each=CREATE, sizes=(1, 2))
def gradients_without_a_tensor_that_needs_them(world: World, call: Call) -> None:
    """Python and TorchScript calls are recorded even then, those of builtin operators are not."""
    dst = rpc.get_worker_info(world.next)
    recorded = {}
    for key, api in APIS.items():
        with dist_autograd.context() as context:
            call.start(api, dst).wait()
            recorded[key] = dist_autograd._retrieve_context(context)._known_worker_ids()
    equal(recorded["ours"], recorded["torchs"])
    equal(recorded["ours"], set() if call.kind == "builtin" else {dst.id})


@case(each=CREATE, sizes=(2,))
def profiler_events(world: World, call: Call) -> None:
    if world.rank != 0:
        return
    dst = rpc.get_worker_info(world.next)
    names = {}
    for _ in range(3):
        call.start(Torchs, dst).wait()  # a script runs other operators until it is optimised
    for key, api in APIS.items():
        name = call.target if call.kind == "builtin" else None
        function = script_scale if call.kind == "script" else call.target
        with profile() as events, rpc.api._enable_rpc_profiler(True, name, function, RPCExecMode.ASYNC, dst) as record:
            record._call_end_callbacks_on_future(call.start(api, dst)).wait()
        names[key] = sorted(event.name for event in events.function_events)
    equal(names["ours"], names["torchs"])
    assert any("#remote_op" in name for name in names["ours"]), names["ours"]


@case(sizes=(1, 2))
def futures(world: World) -> None:
    dst = rpc.get_worker_info(world.next)
    x = torch.ones(2)
    future = functions.py_rpc_builtin(dst, "aten::add", (x, 1))
    equal(future.then(lambda done: done.wait() * 2).wait(), torch.full((2,), 4.0))
    called = threading.Event()
    future.add_done_callback(lambda _: called.set())
    assert called.wait(20)
    both = torch.futures.collect_all([future, functions.py_rpc_python_udf(dst, *serialize(scale, x))]).wait()
    equal([each.wait() for each in both], [x + 1, x * 2])
    equal(wait_in_script(functions.py_rpc_torchscript(world.next, qualified(script_scale), (x, 5.0))), x * 5)


@case(sizes=(1, 2))
def futures_in_asyncio(world: World) -> None:
    dst = rpc.get_worker_info(world.next)

    async def main() -> list[Any]:
        calls = [functions.py_rpc_builtin(dst, "aten::add", (torch.ones(2), i)) for i in range(50)]
        return await asyncio.gather(*map(functions.as_asyncio, calls))

    equal(asyncio.run(main()), [torch.full((2,), 1.0 + i) for i in range(50)])


@case(sizes=(1, 2))
def message_futures(world: World) -> None:
    dst = rpc.get_worker_info(world.next)
    x = torch.ones(2)
    for send in (
        lambda: functions.send_builtin(dst, "aten::mul", (x, 2)),
        lambda: functions.send_python_udf(dst, *serialize(scale, x)),
        lambda: functions.send_torchscript(world.next, qualified(script_scale), (x,)),
    ):
        message = send()
        equal(functions.to_py_jit_future(message).wait(), x * 2)
        assert functions.to_py_jit_future(send(), has_value=False).wait() is None
    for has_value in (True, False):
        failed = functions.send_builtin(dst, "aten::mm", (x, x))
        with pytest.raises(RuntimeError, match=r"must be 2D|2D tensors|matrix"):
            functions.to_py_jit_future(failed, has_value=has_value).wait()


@case(sizes=(2,))
def timeouts(world: World) -> None:
    """Of calls; RRefs whose creation runs out of time are tested by a program of cases_exit.py."""
    dst = rpc.get_worker_info(world.next)
    for api in (Torchs, Ours):
        arrived, release = world.event(f"{api.__name__} arrived"), world.event(f"{api.__name__} release")
        call = Call("udf", signal_and_wait, (arrived, release), timeout=0.3)
        with pytest.raises(RuntimeError, match="RPC ran for more than set timeout"):
            call.start(api, dst).wait()
        release.signal()
    world.barrier()


@case(sizes=(1, 2))
def many_threads(world: World) -> None:
    dst = rpc.get_worker_info(world.next)

    def calls(thread: int) -> None:
        for i in range(50):
            value = float(thread * 100 + i)
            x = torch.full((3,), value)
            equal(functions.py_rpc_builtin(dst, "aten::add", (x, i % 2 or x)).wait(), x + (i % 2 or x))
            equal(functions.py_rpc_python_udf(dst, *serialize(scale, x)).wait(), x * 2)
            equal(functions.py_remote_torchscript(world.next, qualified(script_scale), args=(x,)).to_here(), x * 2)

    in_threads(8, calls)


@case(sizes=(1,))
def keywords_must_be_texts(world: World) -> None:
    dst = rpc.get_worker_info(world.name())
    keywords: Any = {1: 2}
    for function in (functions.py_rpc_builtin, functions.send_builtin):
        with pytest.raises(TypeError, match="keywords must be strings"):
            function(dst, "aten::add", (torch.ones(2),), keywords)
    with pytest.raises(TypeError, match="keywords must be strings"):
        functions.py_remote_builtin(dst, "aten::add", -1.0, (torch.ones(2),), keywords)


@case(sizes=(1, 2))
def unknown_worker(world: World) -> None:
    name = qualified(script_scale)
    texts = []
    for api in (Torchs, Ours):
        for call in (
            lambda api=api: api.rpc_torchscript("nobody", name, (torch.ones(2),), {}, -1.0, False),
            lambda api=api: api.remote_torchscript("nobody", name, -1.0, False, (torch.ones(2),), {}),
        ):
            with pytest.raises(RuntimeError, match="nobody") as caught:
                call()
            texts.append(str(caught.value).splitlines()[0])
    assert len(set(texts)) == 1, texts


@case(sizes=(2,))
def operators_that_come_and_go(world: World) -> None:
    """A callee remembers how messages name an operator for as long as it has it."""
    x = torch.ones(2)

    def library() -> torch.library.Library:
        library = torch.library.Library("aten", "FRAGMENT")
        library.define("rpc_test_twice(Tensor x) -> Tensor")
        library.impl("rpc_test_twice", lambda x: 2 * x, "CPU")
        return library

    def call() -> Any:
        return functions.py_rpc_builtin(rpc.get_worker_info(world.next), "aten::rpc_test_twice", (x,)).wait()

    if world.rank == 1:
        world.wait("lacked")
        mine = library()
        world.signal("there")
        world.wait("called")
        mine._destroy()
        world.signal("gone")
        world.wait("lacked again")
        return
    mine = library()
    missing = rf"On .*{world.next}.*:\nCannot find matching operator for schema aten::rpc_test_twice"
    with pytest.raises(RuntimeError, match=missing):
        call()
    world.signal("lacked")
    world.wait("there")
    equal([call().tolist() for _ in range(2)], [[2.0, 2.0]] * 2)
    world.signal("called")
    world.wait("gone")
    with pytest.raises(RuntimeError, match=missing):
        call()
    world.signal("lacked again")
    mine._destroy()
