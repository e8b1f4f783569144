"""Names of __main__. Every rank runs the same program here; what only one has, it has made at run time."""

from __future__ import annotations

import sys
import textwrap
import threading
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from cases_calls import APIS, doubling_module, identity
from cases_pickling import LARGE, TORCH_CANNOT, apply, settled, tables_left
from cases_rref import fetch
from harness import World, case, equal, eventually, in_threads, program, shut_down_without_leaks
from torch import Tensor
from torch.distributed.rpc import RRef

main: Any = sys.modules["__main__"]

# What each rank runs in its own __main__; `_mine` becomes a suffix that no other rank has.
ONLY_HERE = """
import threading, torch
import torch.distributed.rpc as rpc

offset_mine = 100
lock_mine = threading.Lock()

def plus_mine(x, y=0):
    return x + y + offset_mine

def total_mine(rrefs, function=None):
    return sum(rref.to_here() for rref in rrefs)

def fail_mine(text):
    raise AttributeError(text)

def locked_mine():
    return lock_mine

def matmul_mine(x, y):
    return torch.mm(x, y)

weight_mine = torch.full((3, 3), 2.0, requires_grad=True)

def weighted_mine(x):
    return x * weight_mine

def loss_mine(x):
    return (x * weight_mine).sum()

def relay_mine(x, y, names):
    if not names:
        return torch.mm(x, y)
    return rpc.rpc_sync(names[0], relay_mine, args=(torch.sin(x), y, names[1:])) * 2

def nothing_mine():
    pass

class Point_mine:
    def __init__(self, x, *rest):
        self.x = x
        self.rest = rest

    def moved(self, by):
        return Point_mine(self.x + by)

    def get(self):
        return self.x

    class Inner:
        @staticmethod
        def who():
            return "inner"

@rpc.functions.async_execution
def later_mine(to, x):
    return rpc.rpc_async(to, torch.add, args=(x, 1))

@rpc.functions.async_execution
def relayed_mine(to, x):
    return rpc.rpc_async(to, plus_mine, args=(x,))
"""

# In the __main__ of all ranks.
EVERYWHERE = """
shared_count = 0

def shared_increment():
    global shared_count
    shared_count += 1
    return shared_count

def shared_counting(x):
    return x * shared_increment()

class Shared:
    def __init__(self, value):
        self.value = value
"""


def mine(world: World, name: str) -> Any:
    """A thing of this rank's __main__ that the others lack."""
    suffix = f"_at_{world.rank}"
    if not hasattr(main, name + suffix):
        exec(textwrap.dedent(ONLY_HERE).replace("_mine", suffix), main.__dict__)
    return getattr(main, name + suffix)


def shared(world: World, name: str) -> Any:
    """A thing that all ranks have in __main__, from here on."""
    if not hasattr(main, name):
        exec(EVERYWHERE, main.__dict__)
    world.barrier()
    return getattr(main, name)


def main_has(name: str) -> bool:
    return hasattr(main, name)


def shared_count() -> int:
    return main.shared_count


def class_name(value: Any) -> str:
    return type(value).__name__


@case(each=APIS, sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def function(world: World, api: Any) -> None:
    plus, nothing = mine(world, "plus"), mine(world, "nothing")
    for to in world.everyone:
        equal(rpc.rpc_sync(to, main_has, args=(plus.__name__,)), to == world.name())
        equal(api(to, plus, args=(1,)), 101)
        equal(api(to, plus, args=(1,), kwargs={"y": 2}), 103)
        equal(api(to, plus, args=(torch.ones(LARGE),)), torch.full((LARGE,), 101.0))
        equal(api(to, apply, args=(plus, 1)), 101)
        assert api(to, nothing) is None


@case(each=APIS, sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def class_and_instances(world: World, api: Any) -> None:
    point = mine(world, "Point")
    for to in world.everyone:
        back = api(to, point, args=(3, torch.ones(2)))
        assert type(back) is point
        equal((back.x, back.rest), (3, (torch.ones(2),)))
        equal(api(to, class_name, args=(point(1),)), point.__name__)
        equal(api(to, identity, args=({"points": [point(1), point(2)]},))["points"][1].x, 2)
        equal(api(to, point(4).moved, args=(2,)).x, 6)
        equal(api(to, point.Inner.who), "inner")
        assert type(api(to, identity, args=(point.Inner(),))) is point.Inner
        assert api(to, identity, args=(point,)) is point


@case(sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def class_at_its_owner(world: World) -> None:
    for to in world.everyone:
        rref = rpc.remote(to, mine(world, "Point"), args=(5,))
        equal(rref.owner_name(), to)
        equal(rref.rpc_sync().get(), 5)
        equal(rref.rpc_async().get().wait(), 5)
        equal(rref.remote().moved(2).to_here().x, 7)
        equal(rref.to_here().x, 5)
        eventually(rref.confirmed_by_owner, "the owner's answer has confirmed the RRef")
    del rref
    settled(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def rrefs_in_the_arguments(world: World, api: Any) -> None:
    """The attempt that fails takes up no RRef and leaves no fork."""
    rrefs = [rpc.remote(to, identity, args=(2,)) for to in world.others] + [RRef(2)]
    total, point = mine(world, "total"), mine(world, "Point")
    for to in (world.next, world.name()):
        equal(api(to, total, args=(rrefs,)), 8)
        equal(api(to, total, args=(rrefs,), kwargs={"function": lambda: 1}), 8)
        equal(api(to, fetch, args=(api(to, point, args=(rrefs[0],)).x,)), 2)
        back = api(to, identity, args=(point(rrefs[0], rrefs[-1]),))
        equal((back.x.to_here(), back.rest[0].local_value()), (2, 2))
    del rrefs, back
    settled(world)


@program(any_world=True, size=3, tensorpipe=TORCH_CANNOT)
def main_pickling_leaks_no_rref(world: World) -> None:
    world.init()
    total, point = mine(world, "total"), mine(world, "Point")
    for api in APIS.values():
        rrefs = [RRef(1), rpc.remote(world.next, identity, args=(2,))]
        for to in world.everyone:
            equal(api(to, total, args=(rrefs,)), 3)
            equal(api(to, identity, args=(point(*rrefs),)).rest[0].to_here(), 2)
        rref = rpc.remote(world.next, point, args=tuple(rrefs))
        equal(rref.rpc_sync().get().to_here(), 1)
        del rrefs, rref
    shut_down_without_leaks(world)


@program(any_world=True, size=3, tensorpipe=TORCH_CANNOT)
def main_pickling_that_fails_the_second_time_leaks_no_rref(world: World) -> None:
    world.init()
    for api in (rpc.rpc_sync, APIS["async"]):
        rrefs = [RRef(1), rpc.remote(world.next, identity, args=(2,))]
        equal(rrefs[1].to_here(), 2)
        for to in world.others:
            with pytest.raises(TypeError, match="cannot be sent"):
                api(to, apply, args=(mine(world, "locked"), *rrefs))
        del rrefs
    shut_down_without_leaks(world)


@program(any_world=True, tensorpipe=TORCH_CANNOT)
def remote_pickling_that_fails_the_second_time(world: World) -> None:
    """rpc.remote() has returned when the callee misses the name; the RRef's value is the error."""
    world.init()
    rref = rpc.remote(world.next, mine(world, "locked"))
    with pytest.raises(TypeError, match=r"function's global 'lock_at_.*' .*cannot be sent to another worker"):
        rref.to_here()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    del rref
    shut_down_without_leaks(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def async_execution(world: World, api: Any) -> None:
    third, x = world.name(world.rank + 2), torch.ones(2)
    equal(api(world.next, mine(world, "later"), args=(third, x)), x + 1)
    equal(api(world.next, mine(world, "relayed"), args=(third, x)), x + 100)


@case(tensorpipe=TORCH_CANNOT)
def arguments_as_they_were_when_called(world: World) -> None:
    """The caller may change lists and dictionaries at once, also if the call is sent again."""
    point = mine(world, "Point")
    for _ in range(20):
        values, inside = [1, 2], point([1])
        futures = [rpc.rpc_async(world.next, apply, args=(mine(world, "Point"), values)) for _ in range(5)]
        futures.append(rpc.rpc_async(world.next, identity, args=(inside,)))
        rref = rpc.remote(world.next, point, args=(values,))
        values.append(3)
        inside.x.append(2)
        equal([future.wait().x for future in futures], [[1, 2]] * 5 + [[1]])
        equal(rref.to_here().x, [1, 2])


@case(tensorpipe=TORCH_CANNOT)
def tensors_are_not_copied_for_a_second_attempt(world: World) -> None:
    from torch.distributed.rpc.internal import PythonUDF

    from torch_rpc_mpi import _pickler

    large = torch.ones(LARGE)
    data, tensors = rpc.api._default_pickler.serialize(PythonUDF(mine(world, "plus"), (large,), {}))
    assert data.by_value is True
    again, tensors_again = _pickler.again(data, tensors)
    assert len(data) < 1024
    assert len(again) < 8192
    equal([t.data_ptr() for t in (*tensors, *tensors_again)], [large.data_ptr()] * 2)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def script_modules(world: World, api: Any) -> None:
    x = torch.ones(2)
    equal(api(world.next, apply, args=(mine(world, "plus"), doubling_module()(x))), torch.full((2,), 102.0))
    back = api(world.next, mine(world, "Point"), args=(doubling_module(),))
    equal(back.x(x), x * 2)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def beside_a_lambda(world: World, api: Any) -> None:
    plus = mine(world, "plus")
    equal(api(world.next, lambda f, x: f(plus(x)), args=(plus, 1)), 201)


# By reference, if the callee has it


@case(each=APIS, sizes=(1, 4))
def names_that_the_callee_has_go_by_reference(world: World, api: Any) -> None:
    increment, kind = shared(world, "shared_increment"), shared(world, "Shared")
    world.barrier()
    before = rpc.rpc_sync(world.next, shared_count)
    equal(api(world.next, increment), before + 1)
    equal(api(world.next, apply, args=(increment,)), before + 2)
    equal(rpc.rpc_sync(world.next, shared_count), before + 2)
    back = api(world.next, identity, args=(kind(7),))
    equal((type(back), back.value), (kind, 7))
    world.barrier()


@case(options={"pickler": "cloudpickle"}, tensorpipe="about this backend")
def mode_cloudpickle_sends_main_by_value(world: World) -> None:
    increment = shared(world, "shared_increment")
    world.barrier()
    before, here = rpc.rpc_sync(world.next, shared_count), main.shared_count
    equal(rpc.rpc_sync(world.next, increment), here + 1)
    equal(rpc.rpc_sync(world.next, shared_count), before)
    equal(rpc.rpc_sync(world.next, mine(world, "plus"), args=(1,)), 101)
    world.barrier()


@case(options={"pickler": "pickle"}, tensorpipe="about this backend")
def mode_pickle_does_not_send_again(world: World) -> None:
    for api in (APIS["sync"], APIS["async"]):
        with pytest.raises((AttributeError, RuntimeError), match="Default RPC pickler does not serialize"):
            api(world.next, mine(world, "plus"), args=(1,))
    equal(rpc.rpc_sync(world.next, shared(world, "shared_increment")) > 0, True)


# Errors

MISLEADING = (
    "Can't get attribute 'name' on <module '__main__' from 'program.py'>",
    "MissingInMain: Can't get attribute 'name' on <module '__main__' from 'program.py'>",
    "torch_rpc_mpi callee lacks a name of __main__: Can't get attribute 'name' on <module '__main__'>",
    "the call was not run, because a name of __main__ is missing: Can't get attribute 'name' on <module '__main__'>",
)

COUNTED = """
import torch
import torch.distributed.rpc as rpc

runs = 0

def counted_raise(text):
    global runs
    runs += 1
    raise AttributeError(text)

@rpc.functions.async_execution
def counted_future(text):
    global runs
    runs += 1
    def fail(_):
        raise AttributeError(text)

    future = torch.futures.Future()
    future.set_result(None)
    return future.then(fail)
"""


def runs() -> int:
    return main.runs


@case(each={f"{name}-{i}": (APIS[name], text) for name in APIS for i, text in enumerate(MISLEADING)})
def functions_that_fail_run_once(world: World, variant: Any) -> None:
    """Functions of __main__ that the callee has, whose error reads as if it had not."""
    api, text = variant
    if not hasattr(main, "runs"):
        exec(COUNTED, main.__dict__)
    before = runs()
    world.barrier()
    functions = [main.counted_raise]
    if api is not APIS["remote"]:  # torch gives the RRef of a future that fails no value
        functions.append(main.counted_future)
    for count, function in enumerate(functions, before + 1):
        with pytest.raises((AttributeError, RuntimeError), match="Can't get attribute"):
            api(world.next, function, args=(text,))
        world.barrier()
        equal(runs(), count)
        world.barrier()


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def errors_of_functions_that_were_sent_again(world: World, api: Any) -> None:
    with pytest.raises((AttributeError, RuntimeError), match=r"AttributeError.*on purpose"):
        api(world.next, mine(world, "fail"), args=("on purpose",))


@case(options={"num_worker_threads": 1}, tensorpipe=TORCH_CANNOT)
def second_attempts_leave_nothing_in_the_tables_of_threads(world: World) -> None:
    point, big, rref = mine(world, "Point"), torch.ones(LARGE), RRef(1)
    equal(rpc.rpc_sync(world.next, tables_left), [])
    equal(rpc.rpc_sync(world.next, identity, args=(point(big),)).x, big)
    equal(rpc.rpc_sync(world.next, tables_left), [])
    equal(rpc.rpc_sync(world.next, identity, args=(point(rref, big),)).rest[0], big)
    equal(rpc.rpc_sync(world.next, tables_left), [])
    with pytest.raises(TypeError, match="cannot be sent"):
        rpc.rpc_sync(world.next, mine(world, "locked"))
    equal(tables_left(), [])
    equal(rpc.rpc_sync(world.next, tables_left), [])


@case(each={name: APIS[name] for name in ("sync", "async")}, tensorpipe=TORCH_CANNOT)
def what_cannot_be_sent_by_value_either(world: World, api: Any) -> None:
    locked = mine(world, "locked")
    with pytest.raises((RuntimeError, TypeError)) as caught:
        api(world.next, locked)
    path = f"function's global 'lock_at_{world.rank}' (of type _thread.lock) cannot be sent to another worker"
    assert path in str(caught.value), caught.value
    with pytest.raises(TypeError, match=r"^args\[1\] \(of type _thread.lock\)"):
        api(world.next, apply, args=(mine(world, "plus"), threading.Lock()))


@case(sizes=(4,), tensorpipe=TORCH_CANNOT)
def from_many_threads(world: World) -> None:
    plus, point, rref = mine(world, "plus"), mine(world, "Point"), RRef(5)

    def calls(thread: int) -> None:
        for index in range(15):
            to, x = world.name(world.rank + index), torch.full((8,), float(thread * 100 + index))
            equal(rpc.rpc_sync(to, plus, args=(x,)), x + 100)
            equal(rpc.rpc_async(to, point, args=(x,)).wait().x, x)
            equal(rpc.remote(to, point, args=(x,)).rpc_sync().get(), x)
            equal(rpc.rpc_sync(to, apply, args=(point(rref).get,)).local_value(), 5)

    in_threads(8, calls)


@case(options={"num_worker_threads": 1}, tensorpipe=TORCH_CANNOT)
def a_value_is_made_though_what_waits_for_it_has_the_only_thread(world: World) -> None:
    """The creation is sent twice: the question for the value's type comes between, and blocks the owner's thread."""
    plus = mine(world, "plus")
    for _ in range(5):
        equal(rpc.remote(world.next, plus, args=(torch.ones(2),)).rpc_sync().add(1), torch.full((2,), 102.0))


@case(tensorpipe=TORCH_CANNOT)
def a_result_of_a_class_that_the_caller_lacks(world: World) -> None:
    """Results are not asked for again; here the callee made the class from what the caller sent."""
    point = mine(world, "Point")
    moved: Tensor = rpc.rpc_sync(world.next, point(torch.ones(2)).moved, args=(1,)).x
    equal(moved, torch.full((2,), 2.0))
