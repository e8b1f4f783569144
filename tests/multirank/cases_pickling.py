"""What Python's pickle cannot send goes by value: lambdas, closures, local classes, and what they hold."""

from __future__ import annotations

import collections
import gc
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from cases_autograd import expect_gradients, pair
from cases_calls import APIS, doubling_module, identity
from cases_errors import CALLS, raise_it, still_works
from cases_rref import fetch
from cases_rref_lifetime import settle
from harness import World, case, debug_info, equal, in_threads, program, shut_down_without_leaks
from torch import Tensor
from torch.distributed import nn as dist_nn
from torch.distributed.rpc import RRef, internal

TORCH_CANNOT = "torch refuses what pickle cannot send"
LARGE = (2 << 20) + 1  # numbers: more than 8 MiB, several pieces of a bulk transfer
SMALL_PICKLE = 8 << 10  # bytes: room for the code of a function, not for data


def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def make_adder(bias: Any) -> Callable[[Any], Any]:
    return lambda value: value + bias


def make_counter() -> Callable[[], int]:
    count = 0

    def next_one() -> int:
        nonlocal count
        count += 1
        return count

    return next_one


def make_local_instance(value: int) -> Any:
    class Local:
        def __init__(self) -> None:
            self.value = value

    return Local()


class Shelf:
    """A remote object that takes and gives functions."""

    def __init__(self, value: int) -> None:
        self.value = value

    def apply(self, function: Callable[[int], Any]) -> Any:
        return function(self.value)

    def adder(self) -> Callable[[Any], Any]:
        value = self.value
        return lambda other: other + value

    @rpc.functions.async_execution
    def later(self, function: Callable[[int], Any]) -> Any:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(function(self.value))
        return future


calls = 0


def count_call() -> int:
    global calls
    calls += 1
    return calls


def calls_so_far() -> int:
    return calls


def pickle_here(function: Callable[..., Any], *args: Any) -> tuple[bytes, list[Tensor]]:
    """What a call would send."""
    return rpc.api._default_pickler.serialize(internal.PythonUDF(function, args, {}))


# Functions


@case(each=APIS, sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def lambdas(world: World, api: Any) -> None:
    for to in world.everyone:
        equal(api(to, lambda: 1), 1)
        equal(api(to, lambda x, *more, y, **named: (x, more, y, named), args=(1, 2), kwargs={"y": 3, "z": 4}),
              (1, (2,), 3, {"z": 4}))  # fmt: skip
        equal(api(to, apply, args=(lambda x: x * 2, 21)), 42)
        equal(api(to, apply, args=(sorted, [3, 1, 2]), kwargs={"key": lambda x: -x}), [3, 2, 1])
        equal(
            api(to, lambda functions: [f() for f in functions["all"]], args=({"all": [lambda: 1, lambda: 2]},)), [1, 2]
        )
        equal(api(to, lambda: rpc.get_worker_info().name), to)


@case(each=APIS, sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def closures(world: World, api: Any) -> None:
    number, words, counter = 3, ["a", "b"], make_counter()
    equal(counter(), 1)

    def inner(x: int) -> int:
        return x * number

    def outer(x: int) -> tuple[int, list[str]]:
        return inner(x) + 1, words

    def factorial(n: int) -> int:
        return 1 if n == 0 else n * factorial(n - 1)

    for to in world.everyone:
        equal(api(to, outer, args=(5,)), (16, ["a", "b"]))
        equal(api(to, factorial, args=(10,)), 3_628_800)
        equal(api(to, make_adder(4), args=(3,)), 7)
        equal(api(to, counter), 2)  # the caller's own state stays what it was
    equal(counter(), 2)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def generators_defaults_and_decorated_functions(world: World, api: Any) -> None:
    def squares(count: int = 4, *, offset: int = 1) -> list[int]:
        return list(i * i + offset for i in range(count))  # noqa: C400

    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (function.__name__, function(*args))

    equal(api(world.next, squares), [1, 2, 5, 10])
    equal(api(world.next, squares, args=(2,), kwargs={"offset": 0}), [0, 1])
    equal(api(world.next, logged(squares), args=(2,)), ("squares", [1, 2]))


@case(each=APIS, sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def local_classes(world: World, api: Any) -> None:
    class Point:
        scale = 10

        def __init__(self, x: int) -> None:
            self.x = x

        def scaled(self) -> int:
            return self.x * self.scale

        @classmethod
        def at_origin(cls) -> Any:
            return cls(0)

    class Named(Shelf):
        def apply(self, function: Callable[[int], Any]) -> Any:
            return "named", super().apply(function)

    for to in world.everyone:
        for back in (api(to, Point, args=(3,)), api(to, identity, args=(Point(3),))):
            assert type(back) is Point, "a class that has travelled is still the same class at home"
            equal(back.x, 3)
        equal(api(to, Point(4).scaled), 40)
        equal(api(to, Point.at_origin).x, 0)
        equal(api(to, apply, args=(Named(5).apply, lambda x: x + 1)), ("named", 6))


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def callable_results(world: World, api: Any) -> None:
    equal(api(world.next, make_adder, args=(5,))(2), 7)
    counter = api(world.next, make_counter)
    equal([counter(), counter()], [1, 2])
    equal(api(world.next, make_local_instance, args=(9,)).value, 9)
    equal(api(world.next, lambda: [lambda: 1, {"two": lambda: 2}])[1]["two"](), 2)
    equal(api(world.next, make_adder, args=(torch.ones(3),))(1), torch.full((3,), 2.0))


@case(tensorpipe=TORCH_CANNOT)
def callables_through_rrefs(world: World) -> None:
    third = world.name(world.rank + 2)
    rref = rpc.remote(world.next, make_adder, args=(torch.full((LARGE,), 2.0),))
    equal(rref.to_here()(1), torch.full((LARGE,), 3.0))
    equal(rpc.rpc_sync(third, lambda: rref.to_here()(1).sum().item()), 3.0 * LARGE)
    shelf = rpc.remote(world.next, Shelf, args=(6,))
    for proxy, value in (
        (shelf.rpc_sync, identity),
        (shelf.rpc_async, torch.futures.Future.wait),
        (shelf.remote, fetch),
    ):
        equal(value(proxy().apply(lambda x: x * 7)), 42)
        equal(value(proxy().adder())(1), 7)
        equal(value(proxy().later(lambda x: lambda: x + 2))(), 8)
    equal(rpc.RRef(make_adder(1)).to_here()(1), 2)


@case(tensorpipe=TORCH_CANNOT)
def objects_of_local_classes_stay_with_their_owner(world: World) -> None:
    class Account:
        def __init__(self, balance: int) -> None:
            self.balance = balance

        def deposit(self, amount: int) -> int:
            self.balance += amount
            return self.balance

        def fail(self) -> None:
            raise ValueError("account is closed")

    account = rpc.remote(world.next, Account, args=(1,))
    equal(account.rpc_sync().deposit(1), 2)
    equal(account.rpc_async().deposit(1).wait(), 3)
    equal(account.remote().deposit(1).to_here(), 4)
    equal(account.to_here().balance, 4)
    with pytest.raises(ValueError, match="account is closed"):
        account.rpc_sync().fail()


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def local_functions_of_async_execution(world: World, api: Any) -> None:
    third, x = world.name(world.rank + 2), torch.ones(2)

    @rpc.functions.async_execution
    def add_elsewhere(y: Tensor) -> torch.futures.Future[Tensor]:
        return rpc.rpc_async(third, lambda: x + y)

    @rpc.functions.async_execution
    def gives_a_function() -> Any:
        return rpc.rpc_async(third, make_adder, args=(x,))

    equal(api(world.next, add_elsewhere, args=(x,)), torch.full((2,), 2.0))
    equal(api(world.next, gives_a_function)(1), torch.full((2,), 2.0))


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def functions_sent_on(world: World, api: Any) -> None:
    """A function that came by value is sent further by value, and may itself call."""
    second, third = world.name(world.rank + 2), world.name(world.rank + 3)

    def relay(names: list[str], value: int) -> int:
        return rpc.rpc_sync(names[0], relay, args=(names[1:], value + 1)) if names else value

    equal(api(world.next, relay, args=([second, third, world.next], 0)), 3)


# Tensors


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def captured_tensors(world: World, api: Any) -> None:
    small, large = torch.arange(5), torch.arange(float(LARGE)) + world.rank
    view, weight = large[10:20], torch.nn.Parameter(torch.full((3,), 2.0))
    holder = {"list": [small, (large,)]}
    back = api(world.next, lambda: (small, large, holder["list"][1][0], view + 0, weight))
    equal(back[:4], (small, large, large, view))
    equal(back[4].data, weight.data)
    equal(type(back[4]), torch.nn.Parameter)
    equal(api(world.next, lambda t: (t * 2, large[:3]), args=(large,)), (large * 2, large[:3]))
    linear = torch.nn.Linear(3, 2)
    equal(api(world.next, lambda x: linear(x).detach(), args=(torch.ones(1, 3),)), linear(torch.ones(1, 3)).detach())


@case(tensorpipe=TORCH_CANNOT)
def tensors_travel_beside_the_pickle(world: World) -> None:
    large, weight = torch.ones(LARGE), torch.nn.Parameter(torch.ones(LARGE))

    class Box:
        def __init__(self) -> None:
            self.weight = weight

    for function, arguments, expected in (
        (lambda: large.sum(), (), [large]),
        (lambda t: t + large, (large,), [large]),
        (lambda box: box, (Box(),), [weight]),
        (lambda module: module, (torch.nn.ParameterList([weight]),), [weight]),
    ):
        data, tensors = pickle_here(function, *arguments)
        assert len(data) < SMALL_PICKLE, f"{len(data)} bytes of pickle"
        assert {t.data_ptr() for t in tensors} == {t.data_ptr() for t in expected}
        assert {t.untyped_storage().data_ptr() for t in tensors} == {
            t.untyped_storage().data_ptr() for t in expected
        }, "a tensor was copied"
    data, tensors = rpc.api._default_pickler.serialize(make_adder(large))  # a result
    assert len(data) < SMALL_PICKLE
    equal([t.data_ptr() for t in tensors], [large.data_ptr()])


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def gradients_through_closures(world: World, api: Any) -> None:
    x, y = pair(world.rank)
    with dist_autograd.context() as context_id:
        loss = api(world.next, lambda z: torch.mm(x, z), args=(y,)).sum()
        dist_autograd.backward(context_id, [loss])
        expect_gradients(context_id, (x, y), torch.mm(x, y).sum())


# RRefs


def sum_of(rrefs: list[RRef], function: Callable[[Any], Any]) -> Any:
    return sum(function(rref.to_here()) for rref in rrefs)


def settled(world: World) -> None:
    """All counts are back to zero; pytest.raises and frames may hold RRefs in cycles."""
    gc.collect()
    settle(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def rrefs_before_a_lambda(world: World, api: Any) -> None:
    rrefs = [rpc.remote(to, identity, args=(2,)) for to in world.others] + [RRef(2)]
    for to in (world.next, world.name()):
        equal(api(to, sum_of, args=(rrefs, lambda value: value * 10)), 80)
    del rrefs
    settled(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def rrefs_in_closures(world: World, api: Any) -> None:
    third = world.name(world.rank + 2)
    mine, theirs, thirds = RRef("mine"), *(rpc.remote(to, identity, args=(to,)) for to in (world.next, third))

    def values() -> list[Any]:
        return [rref.to_here() for rref in (mine, theirs, thirds)]

    equal(api(world.next, values), ["mine", world.next, third])
    equal(api(world.name(), values), ["mine", world.next, third])
    back = api(world.next, lambda: lambda: (mine, theirs))()
    equal([rref.to_here() for rref in back], ["mine", world.next])
    equal([rref.is_owner() for rref in back], [True, False])
    equal(api(world.next, lambda: theirs.local_value()), world.next)
    mine = theirs = thirds = back = None
    settled(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def rrefs_of_calls_that_are_never_sent(world: World, api: Any) -> None:
    rrefs = [rpc.remote(world.next, identity, args=(1,)), RRef(1)]
    equal(rrefs[0].to_here(), 1)
    for arguments in ((rrefs, lambda: 1, threading.Lock()), (threading.Lock(), rrefs), ((lambda: rrefs, [gc_lock]),)):
        with pytest.raises(TypeError, match="cannot be sent"):
            api(world.next, identity, args=arguments)
    equal(debug_info("num_pending_futures"), 0)
    rrefs, arguments = [], ()
    settled(world)


gc_lock = threading.Lock()


@program(any_world=True, size=3, tensorpipe=TORCH_CANNOT)
def pickling_leaks_no_rref(world: World) -> None:
    world.init()
    third = world.name(world.rank + 2)
    for api in APIS.values():
        mine, theirs = RRef(1), rpc.remote(world.next, identity, args=(2,))
        for to in (world.next, third):
            equal(api(to, sum_of, args=([mine, theirs], lambda value: value + 1)), 5)
            equal(api(to, lambda mine=mine, theirs=theirs: mine.to_here() + theirs.to_here()), 3)
            with pytest.raises(TypeError, match=r"args\[2\]"):
                api(to, sum_of, args=([mine, theirs], lambda: 1, threading.Lock()))
        del mine, theirs
    shut_down_without_leaks(world)


# torch's other objects


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def script_modules(world: World, api: Any) -> None:
    module, x = doubling_module(), torch.ones(2)
    equal(api(world.next, apply, args=(module, x)), x * 2)
    equal(api(world.next, lambda: module(x)), x * 2)
    equal(api(world.next, lambda y: [module, y], args=(x,))[0](x), x * 2)
    equal(api(world.next, identity, args=({"module": module},))["module"](x), x * 2)
    equal(api(world.next, doubling_module)(x), x * 2)
    equal(api(world.next, lambda: doubling_module())(x), x * 2)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def futures_are_refused_alike(world: World, api: Any) -> None:
    future: torch.futures.Future[int] = torch.futures.Future()
    future.set_result(1)
    refused = []
    for function, arguments, path in (
        (identity, (future,), "args[0]"),
        (identity, ([lambda: 1, future],), "args[0][1]"),
        (lambda: future, (), "function's variable 'future'"),
    ):
        with pytest.raises(Exception, match="Future") as caught:
            api(world.next, function, args=arguments)
        text = str(caught.value)
        assert text.startswith(path), text
        refused.append((caught.type, text.removeprefix(path)))
    assert len(set(refused)) == 1, refused
    still_works(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def remote_modules_beside_a_lambda(world: World, api: Any) -> None:
    third, x = world.name(world.rank + 2), torch.ones(1, 3)
    module = dist_nn.RemoteModule(f"{third}/cpu", torch.nn.Linear, (3, 2))
    expected = module.forward(x).detach() * 2
    equal(api(world.next, lambda m, f: f(m.forward(x).detach()), args=(module, lambda y: y * 2)), expected)
    equal(api(world.next, lambda: module.forward(x).detach() * 2), expected)


# By reference as ever


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def importable_names_go_by_reference(world: World, api: Any) -> None:
    """Beside a lambda, too: what a function counts, it counts where it runs."""
    world.barrier()
    before = rpc.rpc_sync(world.next, calls_so_far)
    equal(api(world.next, count_call), before + 1)
    equal(api(world.next, lambda: count_call()), before + 2)
    equal(api(world.next, apply, args=(lambda f: f(), count_call)), before + 3)
    equal(rpc.rpc_sync(world.next, calls_so_far), before + 3)
    for data in (pickle_here(identity, Shelf(1), [1, "text"])[0], pickle_here(torch.Tensor.add, torch.ones(1), 1)[0]):
        assert b"cloudpickle" not in data


@case(each=CALLS)
def importable_names_that_the_callee_lacks(world: World, api: Any) -> None:
    name = f"only_at_{world.rank}"
    exec(f"def {name}(): return 1", globals())
    try:
        with pytest.raises((AttributeError, RuntimeError), match="Default RPC pickler does not serialize") as caught:
            api(world.next, globals()[name])
        assert name in str(caught.value)
        assert "AttributeError" in str(caught.value)
        if world.mpi:
            with pytest.raises((AttributeError, RuntimeError), match="Default RPC pickler does not serialize"):
                api(world.next, apply, args=(lambda f: f(), globals()[name]))
    finally:
        del globals()[name]
    still_works(world)


def raise_counted(text: str) -> None:
    count_call()
    raise AttributeError(text)


MISLEADING = (
    "Can't get attribute 'name' on <module '__main__' from 'program.py'>",
    "MissingInMain: Can't get attribute 'name' on <module '__main__' from 'program.py'>",
    "torch_rpc_mpi callee lacks a name of __main__: Can't get attribute 'name' on <module '__main__'>",
    "the call was not run, because a name of __main__ is missing: Can't get attribute 'name' on <module '__main__'>",
)


@case(each={f"{api}-{i}": (APIS[api], text) for api in APIS for i, text in enumerate(MISLEADING)})
def functions_that_fail_are_not_run_twice(world: World, variant: Any) -> None:
    """Whatever the error says. The keyword names __main__, so that the call would be sent again if it could be."""
    api, text = variant
    world.barrier()
    before = rpc.rpc_sync(world.next, calls_so_far)
    with pytest.raises((AttributeError, RuntimeError), match="Can't get attribute"):
        api(world.next, raise_counted, args=(text,))
    equal(rpc.rpc_sync(world.next, calls_so_far), before + 1)
    if world.mpi:
        with pytest.raises((AttributeError, RuntimeError), match="Can't get attribute"):
            api(world.next, lambda: raise_counted(text))
        equal(rpc.rpc_sync(world.next, calls_so_far), before + 2)


# What cannot be sent at all


class Config:
    def __init__(self) -> None:
        self.size = 3
        self.lock = threading.Lock()


class Worker:
    def __init__(self) -> None:
        self.config = Config()

    def run(self) -> int:
        return self.config.size


class Slotted:
    __slots__ = ("lock", "unset")

    def __init__(self) -> None:
        self.lock = threading.Lock()


Pair = collections.namedtuple("Pair", ["left", "right"])


def unsendable_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """By the path in the error: a function, its arguments and keywords."""
    lock, name = threading.Lock(), threading.Lock()

    def inner() -> Any:
        return name

    class Local:
        def __init__(self) -> None:
            self.lock = lock

    cyclic: list[Any] = [1]
    cyclic += [cyclic, lock]
    return {
        "args[0]": (identity, (lock,), {}),
        "args[0].config.lock": (identity, (Worker(),), {}),
        "args[1]['a'][2]": (apply, (identity, {"b": 1, "a": [1, lambda: 1, lock]}), {}),
        "args[0].right[1]": (identity, (Pair(1, [lambda: 1, lock]),), {}),
        "args[0].lock": (identity, (Slotted(),), {}),
        "args[0][2]": (identity, (cyclic,), {}),
        "kwargs['x']": (apply, (dict,), {"y": lambda: 1, "x": lock}),
        "kwargs['x'].lock": (apply, (dict,), {"x": Local()}),
        "function's variable 'name'": (lambda: name, (), {}),
        "function's variable 'inner''s variable 'name'": (lambda: inner(), (), {}),
        "function's global 'gc_lock'": (lambda: gc_lock, (), {}),
        "function.__defaults__[0]": (lambda x=lock: x, (), {}),
        "function.__self__.config.lock": (Worker().run, (), {}),
        "args[0].__self__.config.lock": (apply, (Worker().run,), {}),
    }


@case(each={f"{path}-{api}": (path, api) for path in unsendable_calls() for api in APIS}, tensorpipe=TORCH_CANNOT)
def unsendable_argument(world: World, variant: Any) -> None:
    path, api = variant
    function, arguments, keywords = unsendable_calls()[path]
    with pytest.raises(TypeError) as caught:
        APIS[api](world.next, function, args=arguments, kwargs=keywords)
    text = str(caught.value)
    assert text.startswith(f"{path} (of type _thread.lock) cannot be sent to another worker: cannot pickle"), text


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def unsendable_argument_fails_before_anything_is_sent(world: World, api: Any) -> None:
    world.barrier()
    before = rpc.rpc_sync(world.next, calls_so_far)
    with pytest.raises(TypeError, match=r"^args\[1\] \(of type _thread.lock\)"):
        api(world.next, apply, args=(count_call, threading.Lock()))
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"^function's variable 'lock'"):
        api(world.next, lambda: (lock, count_call()))
    equal(rpc.rpc_sync(world.next, calls_so_far), before)
    still_works(world)


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def a_closure_with_an_empty_cell(world: World, api: Any) -> None:
    def make(lock: Any) -> Callable[[], Any]:
        def function() -> Any:
            return late if lock else "fine"

        return function
        late = 1  # never reached: the variable stays without a value

    equal(api(world.next, make(None)), "fine")
    with pytest.raises(TypeError, match=r"^function's variable 'lock' \(of type _thread.lock\) cannot be sent"):
        api(world.next, make(threading.Lock()))


def unsendable_results() -> dict[str, Any]:
    lock = threading.Lock()
    return {
        "result": lock,
        "result.config.lock": Worker(),
        "result['a'][1]": {"a": [lambda: 1, lock]},
        "result's variable 'lock'": lambda: lock,
    }


def unsendable_result(path: str) -> Any:
    return unsendable_results()[path]


@case(each={f"{path}-{api}": (path, api) for path in unsendable_results() for api in APIS}, tensorpipe=TORCH_CANNOT)
def unsendable_result_of_a_call(world: World, variant: Any) -> None:
    path, api = variant
    with pytest.raises((TypeError, RuntimeError)) as caught:
        APIS[api](world.next, unsendable_result, args=(path,))
    assert f"{path} (of type _thread.lock) cannot be sent to another worker" in str(caught.value), caught.value
    still_works(world)


class Stubborn:
    def __reduce__(self) -> Any:
        raise OSError("I stay here")


@case(each=APIS, tensorpipe=TORCH_CANNOT)
def objects_that_refuse_are_named_too(world: World, api: Any) -> None:
    with pytest.raises(Exception, match="I stay here") as caught:
        api(world.next, identity, args=([1, Stubborn()],))
    assert str(caught.value).startswith("args[0][1] (of type cases_pickling.Stubborn) cannot be sent"), caught.value


@case(tensorpipe=TORCH_CANNOT)
def nesting_without_end(world: World) -> None:
    """Deeper than Python's pickle goes: Python's own error."""
    deep: Any = []
    for _ in range(3 * sys.getrecursionlimit()):
        deep = [deep]
    with pytest.raises(RecursionError, match="maximum recursion depth"):
        rpc.rpc_sync(world.next, identity, args=(deep,))
    still_works(world)


def tables_left() -> list[str]:
    """Names of this thread's tables that are not empty between messages."""
    from torch_rpc_mpi import _pickler

    tables = {f"{side}.{name}": getattr(getattr(_pickler, side), name)
              for side in ("_sending", "_receiving") for name in ("tensors", "rrefs")}  # fmt: skip
    torchs = internal._thread_local_tensor_tables
    tables.update({name: getattr(torchs, name, None) for name in ("send_tables", "recv_tables")})
    return [name for name, table in tables.items() if table is not None]


@case(options={"num_worker_threads": 1}, tensorpipe=TORCH_CANNOT)
def failures_leave_nothing_in_the_tables_of_threads(world: World) -> None:
    big = torch.ones(LARGE)
    rref = RRef(1)
    for function, arguments in (
        (identity, (big, rref, threading.Lock())),
        (lambda: (big, rref, gc_lock), ()),
        (identity, (big, Stubborn())),
    ):
        with pytest.raises(Exception, match="cannot be sent"):
            rpc.rpc_sync(world.next, function, args=arguments)
        equal(tables_left(), [])
    with pytest.raises(TypeError, match="cannot be sent"):
        rpc.rpc_sync(world.next, lambda: (big, unsendable_result("result")))
    with pytest.raises(TypeError, match="cannot be sent"):
        rpc.rpc_sync(world.next, lambda: unsendable_result("result"))
    equal(rpc.rpc_sync(world.next, tables_left), [])


# Modes


@case(options={"pickler": "pickle"}, tensorpipe="about this backend")
def mode_pickle(world: World) -> None:
    """Everything is torch's own."""
    from torch._C import _distributed_rpc as torchs

    assert rpc.api._default_pickler is internal._internal_rpc_pickler
    assert rpc.api._invoke_rpc_python_udf is torchs._invoke_rpc_python_udf
    function = lambda: 1  # noqa: E731
    with pytest.raises(Exception, match="pickle") as expected:
        internal.serialize(internal.PythonUDF(function, (), {}))
    for api in APIS.values():
        with pytest.raises(expected.type) as caught:
            api(world.next, function)
        equal(str(caught.value), str(expected.value))
        with pytest.raises(TypeError, match=r"^cannot pickle '_thread.lock' object"):
            api(world.next, identity, args=(threading.Lock(),))
        with pytest.raises((RuntimeError, AttributeError), match="pickle"):
            api(world.next, make_adder, args=(1,))
        equal(api(world.next, identity, args=([torch.ones(2), 1],)), [torch.ones(2), 1])
    still_works(world)


@case(options={"pickler": "cloudpickle"}, tensorpipe="about this backend")
def mode_cloudpickle(world: World) -> None:
    third, large = world.name(world.rank + 2), torch.ones(LARGE)
    rref, module = rpc.remote(third, identity, args=(torch.ones(2),)), doubling_module()
    for api in APIS.values():
        equal(api(world.next, lambda x: x + 1, args=(1,)), 2)
        equal(api(world.next, make_adder, args=(large,))(1), large + 1)
        equal(api(world.next, identity, args=([large, 1, "text"],)), [large, 1, "text"])
        equal(api(world.next, fetch, args=(rref,)), torch.ones(2))
        equal(api(world.next, apply, args=(module, torch.ones(2))), torch.full((2,), 2.0))
        equal(api(world.next, torch.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))
        with pytest.raises(TypeError, match=r"^args\[0\]\[1\] \(of type _thread.lock\) cannot be sent"):
            api(world.next, identity, args=([1, threading.Lock()],))
        with pytest.raises(ValueError, match="on purpose"):
            api(world.next, raise_it, args=(ValueError, "on purpose"))
    world.barrier()
    before = rpc.rpc_sync(world.next, calls_so_far)
    equal(rpc.rpc_sync(world.next, count_call), before + 1)  # importable names go by reference
    equal(rpc.rpc_sync(world.next, calls_so_far), before + 1)
    data, tensors = pickle_here(identity, large)
    assert len(data) < SMALL_PICKLE
    equal([t.data_ptr() for t in tensors], [large.data_ptr()])
    del rref
    settled(world)


@case(session=False, tensorpipe="about this backend")
def modes_may_differ_between_workers(world: World) -> None:
    """Each says how this worker sends; all understand everything."""
    modes = ("auto", "pickle", "cloudpickle", "auto")
    world.init(pickler=modes[world.rank])
    for rank, mode in enumerate(modes):
        to = world.name(rank)
        if modes[world.rank] == "pickle":
            with pytest.raises(Exception, match="pickle"):
                rpc.rpc_sync(to, lambda: 1)
        else:
            equal(rpc.rpc_sync(to, lambda: 1), 1)
        if mode == "pickle":
            with pytest.raises(Exception, match="pickle"):
                rpc.rpc_sync(to, make_adder, args=(1,))
        else:
            equal(rpc.rpc_sync(to, make_adder, args=(1,))(1), 2)
    rpc.shutdown()


class OfTheUser(internal._InternalRPCPickler):
    """A pickler for torch's _use_rpc_pickler."""

    used = 0

    def serialize(self, obj: Any) -> Any:
        self.used += 1
        return super().serialize(obj)


@case(tensorpipe=TORCH_CANNOT)
def a_pickler_of_the_users_own(world: World) -> None:
    theirs = OfTheUser()
    with rpc.api._use_rpc_pickler(theirs):
        equal(rpc.rpc_sync(world.next, identity, args=([1, torch.ones(2)],)), [1, torch.ones(2)])
        rref = rpc.remote(world.next, identity, args=(2,))
        equal(rpc.rpc_sync(world.next, fetch, args=(rref,)), 2)
    equal(theirs.used, 3)
    equal(rpc.rpc_sync(world.next, lambda: 1), 1)


# Many at once


@case(sizes=(1, 4), tensorpipe=TORCH_CANNOT)
def from_many_threads(world: World) -> None:
    rref = rpc.remote(world.next, identity, args=(1000,))

    def calls_of(thread: int) -> None:
        class Mine:
            def __init__(self, value: int) -> None:
                self.value = value

        for index in range(20):
            to, x = world.name(world.rank + index), torch.full((8,), float(thread * 100 + index))
            large = torch.full((20_000,), float(index))
            equal(rpc.rpc_sync(to, lambda y, x=x: x + y, args=(x,)), x * 2)
            equal(rpc.rpc_async(to, lambda large=large: large).wait(), large)
            equal(rpc.remote(to, make_adder, args=(x,)).to_here()(1), x + 1)
            equal(rpc.rpc_sync(to, Mine, args=(index,)).value, index)
            equal(rpc.rpc_sync(to, lambda r, f: f(r.to_here()), args=(rref, lambda v, x=x: v + x)), x + 1000)
            with pytest.raises(TypeError, match=r"^args\[1\] "):
                rpc.rpc_sync(to, identity, args=(x, threading.Lock()))

    in_threads(8, calls_of)


@case(tensorpipe=TORCH_CANNOT)
def many_outstanding(world: World) -> None:
    offset = torch.full((16,), float(world.rank))
    futures = [rpc.rpc_async(world.name(i), lambda i=i: offset + i) for i in range(300)]
    equal([f.wait()[0].item() for f in futures], [world.rank + float(i) for i in range(300)])


@case(tensorpipe=TORCH_CANNOT)
def modules_made_on_the_fly(world: World) -> None:
    """A function of a module that nobody can import goes by value, as one without a name."""
    module = types.ModuleType(f"made_at_{world.rank}")
    exec("factor = 3\ndef scale(x): return x * factor", module.__dict__)
    equal(rpc.rpc_sync(world.next, module.scale, args=(2,)), 6)
