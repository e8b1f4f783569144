"""``rpc_sync`` and ``rpc_async`` end as they would with torch's own ``_invoke_rpc``, whatever they are given.

Which calls are made without it is seen with ``sys.setprofile``: Note [Direct calls] in csrc/python/direct_calls.h.
"""

from __future__ import annotations

import math
import sys
import time
import types
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed.rpc as rpc
from cases_calls import Counter, identity, my_id, script_scale_and_add
from functions_table import attempt, later, raises, scale
from harness import World, case, equal
from torch.autograd.profiler_legacy import profile
from torch.distributed.rpc import api
from torch.distributed.rpc.internal import RPCExecMode

_X = torch.arange(6.0).reshape(2, 3)
_UNSET = -1.0


class Text(str):
    __slots__ = ()


class Closed:
    """Something callable that does not want to be looked into."""

    def __call__(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise LookupError(f"no {name} here")


@rpc.functions.async_execution
@torch.jit.script
def script_later(to: str, x: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
    return rpc.rpc_async(to, script_scale_and_add, (x, 2.0))


class Call(NamedTuple):
    """Its callee is what ``to`` makes of a worker's name; ``direct``: whether it needs nothing of torch's function."""

    direct: bool
    function: Any
    args: Any = None
    kwargs: Any = None
    timeout: Any = _UNSET
    to: Callable[[str], Any] = identity

    def end(self, name: str, invoke: Callable[..., Any]) -> Any:
        args = tuple(name if arg is _NAME else arg for arg in self.args) if type(self.args) is tuple else self.args
        return attempt(lambda: invoke(self.to(name), self.function, args, self.kwargs, self.timeout))


_NAME = "to be replaced by the callee's name"

CALLS = {
    # Usual ones
    "operator": Call(True, torch.add, (_X, 1)),
    "operator with keywords": Call(True, torch.clamp, (_X,), {"min": 1, "max": 3.5}),
    "operator of the math module": Call(True, math.gcd, (12, 18)),
    "operator without arguments": Call(True, torch.add),
    "operator that fails": Call(True, torch.mm, (_X, _X)),
    "operator of what cannot be sent": Call(True, torch.add, (_X.to_mkldnn(), 1)),
    "function": Call(True, scale, (_X,), {"factor": 3.0}),
    "function, no arguments": Call(True, dict, (), {}),
    "function that raises": Call(True, raises, (KeyError,)),
    "function that does not take these": Call(True, scale, (), {"nope": 1}),
    "method": Call(True, Counter(3).plus, (4,)),
    "class": Call(True, Counter, (5,)),
    "lambda": Call(True, lambda x: x + 1, (_X,)),
    "function of what cannot be sent": Call(True, identity, (sys.stdout,)),
    "long arguments": Call(True, identity, ("x" * 100_000, list(range(30_000)))),
    "async execution": Call(True, later, (_NAME, _X)),
    "script": Call(True, script_scale_and_add, (_X, 2.0), {"bias": 1.0}),
    "script of other types": Call(True, script_scale_and_add, ("text", 2.0)),
    "script of what cannot be sent": Call(True, script_scale_and_add, (_X.to_mkldnn(), 2.0)),
    "script, async execution": Call(True, script_later, (_NAME, _X)),
    "timeout of an integer": Call(True, scale, (_X,), timeout=30),
    "no timeout": Call(True, scale, (_X,), timeout=0),
    "timed out": Call(True, time.sleep, (0.4,), timeout=0.05),
    "worker's id": Call(True, scale, (_X,), to=lambda name: rpc.get_worker_info(name).id),
    "worker's info": Call(True, scale, (_X,), to=rpc.get_worker_info),
    "no such worker": Call(True, scale, (_X,), to=lambda name: name + "'s brother"),
    "no such id": Call(True, scale, (_X,), to=lambda name: 99),
    "who raises when looked into": Call(True, Closed()),
    # Others
    "not callable": Call(False, "text", (_X,)),
    "arguments in a list": Call(False, scale, [_X]),
    "arguments in another sequence": Call(False, torch.add, deque((_X, 1))),
    "arguments in another sequence, of a function": Call(False, scale, deque((_X,))),
    "a tensor for arguments": Call(False, scale, _X),
    "falsy arguments": Call(False, dict, 0, 0),
    "keywords in another dict": Call(False, torch.clamp, (_X,), OrderedDict(min=1, max=3)),
    "keywords in a mapping": Call(False, torch.clamp, (_X,), types.MappingProxyType({"min": 1})),
    "keywords that are none": Call(False, torch.clamp, (_X,), {1: 2}),
    "keywords that are none, of a function": Call(False, scale, (_X,), {1: 2}),
    "keywords that are none, of a script": Call(False, script_scale_and_add, (_X,), {1: 2}),
    "timeout of a text": Call(False, scale, (_X,), timeout="30"),
    "timeout of none": Call(False, scale, (_X,), timeout=None),
    "timeout of a tensor": Call(False, scale, (_X,), timeout=torch.tensor(30.0)),
    "timeout of infinity": Call(False, scale, (_X,), timeout=math.inf),
    "timeout of no number": Call(False, scale, (_X,), timeout=math.nan),
    "timeout of too much": Call(False, scale, (_X,), timeout=10**400),
    "worker of another text": Call(False, scale, (_X,), to=Text),
    "worker of a text that is none": Call(False, scale, (_X,), to=lambda name: "\ud800"),
    "worker's id as a bool": Call(False, scale, (_X,), to=lambda name: False),
    "worker's id below 0": Call(False, scale, (_X,), to=lambda name: -1),
    "worker's id beyond all": Call(False, scale, (_X,), to=lambda name: 2**40),
    "worker of none": Call(False, scale, (_X,), to=lambda name: None),
}
APIS = {
    RPCExecMode.SYNC: rpc.rpc_sync,
    RPCExecMode.ASYNC: lambda *call: rpc.rpc_async(*call).wait(),
}


def torchs(mode: Any) -> Callable[..., Any]:
    return lambda to, func, *call: api._invoke_rpc.__wrapped__(to, func, mode, *call).wait()


def uses_torchs(call: Callable[[], Any]) -> bool:
    code, used = api._invoke_rpc.__wrapped__.__code__, []
    sys.setprofile(lambda frame, event, _: used.append(event) if frame.f_code is code else None)
    try:
        attempt(call)
    finally:
        sys.setprofile(None)
    return bool(used)


@case(each=CALLS, sizes=(1, 2), tensorpipe="about this backend")
def ends_as_with_torchs_function(world: World, call: Call) -> None:
    for mode, ours in APIS.items():
        equal(call.end(world.next, ours), call.end(world.next, torchs(mode)))
        equal(uses_torchs(lambda ours=ours: call.end(world.next, ours)), not call.direct)


@case(sizes=(2,), tensorpipe="about this backend")
def a_function_of_main_that_the_callee_lacks(world: World) -> None:
    """And RRefs, of which each message has forks of its own."""
    main = sys.modules["__main__"]
    exec(f"def only_at_{world.rank}(x): return x + {world.rank}", vars(main))
    function = vars(main)[f"only_at_{world.rank}"]
    rref = rpc.remote(world.next, identity, args=(_X,))
    for ours in APIS.values():
        equal(ours(world.next, function, (_X,)), _X + world.rank)
        equal(ours(world.next, fetch_and, (rref, function)), _X + world.rank)
        assert not uses_torchs(lambda ours=ours: ours(world.next, fetch_and, (rref, function)))


def fetch_and(rref: Any, function: Callable[[Any], Any]) -> Any:
    return function(rref.to_here())


@case(each={"legacy": profile, "kineto": torch.profiler.profile}, sizes=(2,), tensorpipe="about this backend")
def profilers_go_through_torchs_function(world: World, profiler: Any) -> None:
    for ours in APIS.values():
        with profiler():
            assert uses_torchs(lambda ours=ours: ours(world.next, scale, (_X,)))
        assert not uses_torchs(lambda ours=ours: ours(world.next, scale, (_X,)))


@case(sizes=(2,), tensorpipe="about this backend")
def what_is_callable_later_is_found(world: World) -> None:
    """torch's table of builtin operators is looked at when a call is made, not when the session begins."""
    for ours in APIS.values():
        torch.jit._builtins._register_builtin(scale, "aten::neg")
        try:
            equal(ours(world.next, scale, (_X,)), -_X)
        finally:
            del torch.jit._builtins._get_builtin_table()[id(scale)]
        equal(ours(world.next, scale, (_X,)), 2 * _X)


@case(each=("pickle", "cloudpickle"), session=False, sizes=(2,), tensorpipe="about this backend")
def other_picklers_get_the_calls_of_functions(world: World, pickler: str) -> None:
    world.init(pickler=pickler)
    for ours in APIS.values():
        assert uses_torchs(lambda ours=ours: ours(world.next, scale, (_X,)))
        assert not uses_torchs(lambda ours=ours: ours(world.next, torch.add, (_X, 1)))
    rpc.shutdown()


@case(sizes=(2,), tensorpipe="about this backend")
def workers_are_found_by_name_without_asking_the_agent(world: World) -> None:
    """Also by ``remote``, which makes its calls by torch's function."""
    for to in (world.next, world.name(0)):
        equal(rpc.remote(to, torch.add, args=(_X, 1)).to_here(), _X + 1)
        assert api._to_worker_info(to) is api._to_worker_info(to)
    info = rpc.get_worker_info(world.next)
    for to in (Text(world.next), info, info.id):
        equal(api._to_worker_info(to), info)
    for to in (world.next + "'s brother", 99, None, []):
        equal(
            attempt(lambda to=to: api._to_worker_info(to)), attempt(lambda to=to: api._to_worker_info.__wrapped__(to))
        )


@case(session=False, sizes=(2,), tensorpipe="about this backend")
def what_has_stood_in_torchs_place_makes_the_calls_of_a_later_session_as_well(world: World) -> None:
    """As where a patch of it begins in one session and ends in the next. Names may be other workers' by then."""
    world.init()
    earlier, next_name = (api._invoke_rpc, api._to_worker_info), world.next
    rpc.shutdown()
    world.init(world.name(1 - world.rank))  # so that the name of the other one is now this one's
    current = api._invoke_rpc, api._to_worker_info
    api._invoke_rpc, api._to_worker_info = earlier
    for mode in APIS:
        equal(api._invoke_rpc(next_name, my_id, mode).wait(), world.rank)
    equal(api._to_worker_info(next_name).id, world.rank)
    equal(rpc.remote(next_name, my_id).to_here(), world.rank)
    api._invoke_rpc, api._to_worker_info = current
    rpc.shutdown()
