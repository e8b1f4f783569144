"""Errors of calls: they arrive where they belong, say who, what and where, and leave everything working."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import types
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from cases_calls import APIS, identity, script_scale_and_add
from harness import World, case, equal, in_threads

from torch_rpc_mpi import functions


class DomainError(Exception):
    """A user's exception."""


class AwkwardError(Exception):
    """Cannot be made from a message alone."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(code, text)


def raise_it(kind: type[BaseException], *arguments: Any) -> None:
    raise kind(*arguments)


def raise_at(to: str, kind: type[BaseException]) -> None:
    rpc.rpc_sync(to, raise_it, args=(kind, "from afar"))


def still_works(world: World) -> None:
    for to in world.everyone:
        equal(rpc.rpc_sync(to, identity, args=(torch.ones(2),)), torch.ones(2))


# Exceptions of the function

EXCEPTIONS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    ZeroDivisionError,
    NotImplementedError,
    OSError,
    AssertionError,
    StopIteration,
    UnicodeError,
    DomainError,
)


@case(each={kind.__name__: kind for kind in EXCEPTIONS})
def exception_type(world: World, kind: type[Exception]) -> None:
    """Everywhere the type itself; TensorPipe keeps ValueError and TypeError, and every type in to_here()."""
    for to in (world.next, world.name()):
        for api in APIS.values():
            with pytest.raises((kind, RuntimeError, ValueError), match=kind.__name__) as caught:
                api(to, raise_it, args=(kind, "my message"))
            assert caught.type is kind or not (world.mpi or kind in (ValueError, TypeError))
            assert "my message" in str(caught.value)
        with pytest.raises(kind, match="my message"):
            rpc.remote(to, raise_it, args=(kind, "my message")).to_here()
    still_works(world)


TEXTS = ("C:\\x", "\\N{", "\\u12", "\\", "Grüße 你好", "two\nlines\\", "lone \ud800", "x" * 100_000)


@case(tensorpipe="torch sends the repr, and interprets what is in it")
def exception_texts_arrive_as_they_were(world: World) -> None:
    for to in (world.next, world.name()):
        for text in TEXTS:
            for api in APIS.values():
                with pytest.raises(DomainError) as caught:
                    api(to, raise_it, args=(DomainError, text))
                assert f"DomainError: {text}\n" in caught.value.args[0], text[:20]
                assert len(caught.value.args[0]) < len(text) + 4000


def raise_from(text: str) -> None:
    try:
        raise KeyError(text)
    except KeyError as error:
        raise IndexError("outer") from error


@case(tensorpipe="torch keeps two types")
def exceptions_as_programs_meet_them(world: World) -> None:
    """In the callbacks of futures, in asyncio, many times, beside others, with what they were raised from."""
    future = rpc.rpc_async(world.next, raise_from, args=("inner",))
    for _ in range(3):
        with pytest.raises(IndexError, match="outer") as caught:
            future.wait()
        assert "KeyError: 'inner'" in str(caught.value)
        assert "direct cause" in str(caught.value)
    seen: list[BaseException] = []

    def look(done: Any) -> str:
        try:
            done.wait()
        except IndexError as error:
            seen.append(error)
        return "seen"

    equal(future.then(look).wait(), "seen")
    assert [type(error) for error in seen] == [IndexError]
    with pytest.raises(RuntimeError, match="outer"):
        future.then(lambda done: done.wait()).wait()
    with pytest.raises(IndexError, match="outer"):
        torch.futures.wait_all([rpc.rpc_async(world.next, identity, args=(1,)), future])

    async def main() -> None:
        await functions.as_asyncio(future)

    with pytest.raises(IndexError, match="outer"):
        asyncio.run(main())

    def wait(_: int) -> None:
        with pytest.raises(IndexError, match="outer"):
            future.wait()

    in_threads(8, wait)


@rpc.functions.async_execution
def raise_elsewhere(to: str, kind: type[BaseException]) -> torch.futures.Future[Any]:
    return rpc.rpc_async(to, raise_it, args=(kind, "from afar"))


@case(each=APIS, tensorpipe="torch keeps two types")
def exceptions_keep_their_type_from_worker_to_worker(world: World, api: Any) -> None:
    third = world.name(world.rank + 2)
    for function in (raise_at, raise_elsewhere):
        with pytest.raises(KeyError, match="from afar") as caught:
            api(world.next, function, args=(third, KeyError))
        text = caught.value.args[0]
        assert text.index(world.next) < text.index(third) < text.index("from afar")


def local_type() -> None:
    class Local(LookupError):
        pass

    raise Local("of a local class")


@case(each=APIS, tensorpipe="torch returns the error of unpickling the type as if it were the result")
def exceptions_of_types_that_the_caller_lacks(world: World, api: Any) -> None:
    with pytest.raises(LookupError, match="of a local class"):  # the type goes by value
        api(world.next, local_type)

    def of_a_passing_module() -> None:
        module = types.ModuleType(f"module_of_{rpc.get_worker_info().name}_alone")
        sys.modules[module.__name__] = module
        exec("class Gone(LookupError): pass", module.__dict__)
        raise module.Gone("unknown to the caller")

    with pytest.raises(RuntimeError, match="Gone: unknown to the caller"):
        api(world.next, of_a_passing_module)
    still_works(world)


@case(each=APIS)
def exception_text_says_who_and_where(world: World, api: Any) -> None:
    with pytest.raises(ValueError, match="my message") as caught:
        api(world.next, raise_it, args=(ValueError, "my message"))
    text = str(caught.value)
    for part in (world.next, f"id={(world.rank + 1) % world.size}", "Traceback", "in raise_it", "cases_errors.py"):
        assert part in text, f"no {part!r} in {text!r}"


@case(
    each={f"{name}-{api}": (name, APIS[api]) for name in ("python", "builtin", "script") for api in APIS},
    tensorpipe="torch names no host, and for operators no worker either",
)
def exception_text_says_the_host(world: World, variant: Any) -> None:
    kind, api = variant
    function, arguments = {
        "python": (raise_it, (ValueError, "my message")),
        "builtin": (torch.add, (torch.ones(2), torch.ones(3))),
        "script": (script_raises, (torch.ones(2),)),
    }[kind]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        api(world.next, function, args=arguments)
    for part in (world.next, str((world.rank + 1) % world.size), socket.gethostname()):
        assert part in str(caught.value), f"no {part!r} in {caught.value!s}"


@torch.jit.script
def script_raises(x: torch.Tensor) -> torch.Tensor:
    if x.numel() > 0:
        raise ValueError("script failed")
    return x


@case()
def exception_of_a_nested_call_names_both_workers(world: World) -> None:
    third = world.name(world.rank + 2)
    with pytest.raises(ValueError, match="from afar") as caught:
        rpc.rpc_sync(world.next, raise_at, args=(third, ValueError))
    assert world.next in str(caught.value)
    assert third in str(caught.value)


@case()
def exception_that_cannot_be_made_again(world: World) -> None:
    with pytest.raises(RuntimeError, match="Failed to create original exception type") as caught:
        rpc.rpc_sync(world.next, raise_it, args=(AwkwardError, 3, "details"))
    assert "details" in str(caught.value)
    still_works(world)


@case(each=(SystemExit, KeyboardInterrupt, GeneratorExit))
def base_exceptions_do_not_end_the_callee(world: World, kind: type[BaseException]) -> None:
    with pytest.raises(RuntimeError, match=kind.__name__):
        rpc.rpc_sync(world.next, raise_it, args=(kind, "end it"))
    still_works(world)


@case()
def errors_among_successes(world: World) -> None:
    good = [rpc.rpc_async(world.next, identity, args=(i,)) for i in range(50)]
    bad = [rpc.rpc_async(world.next, raise_it, args=(ValueError, f"number {i}")) for i in range(50)]
    for i, future in enumerate(bad):
        with pytest.raises(ValueError, match=f"number {i}"):
            future.wait()
    equal(torch.futures.wait_all(good), list(range(50)))
    with pytest.raises(ValueError, match="number"):
        torch.futures.wait_all([*good, *bad])


# Operators and TorchScript


@case()
def wrong_arguments_of_operators(world: World) -> None:
    with pytest.raises(RuntimeError, match="failed to match any schema"):
        rpc.rpc_sync(world.next, torch.add, args=())
    if world.mpi:
        with pytest.raises(RuntimeError, match=r"no builtin operator aten::nonsense \(called with args: \(7,\)"):
            functions.py_rpc_builtin(rpc.get_worker_info(world.next), "aten::nonsense", (7,))
    with pytest.raises(RuntimeError, match="must match the size"):
        rpc.rpc_sync(world.next, torch.add, args=(torch.ones(2), torch.ones(3)))
    with pytest.raises(RuntimeError, match="missing value for argument"):
        rpc.rpc_sync(world.next, script_scale_and_add, args=(torch.ones(2),))
    with pytest.raises((RuntimeError, TypeError)):
        rpc.rpc_sync(world.next, script_scale_and_add, args=("text", 2.0))
    still_works(world)


# Destinations and functions

# Not rpc.remote(): see remote_calls_that_cannot_be_read in cases_exit.py.
CALLS = {name: api for name, api in APIS.items() if name != "remote"}


@case()
def unknown_workers(world: World) -> None:
    for api in APIS.values():
        with pytest.raises(RuntimeError, match="nobody"):
            api("nobody", identity, args=(1,))
        with pytest.raises((RuntimeError, IndexError, ValueError), match="99"):
            api(99, identity, args=(1,))
        with pytest.raises((RuntimeError, IndexError, ValueError, TypeError)):
            api(-1, identity, args=(1,))
        with pytest.raises(ValueError, match="Cannot get WorkerInfo from name"):
            api(2.5, identity, args=(1,))
    with pytest.raises(RuntimeError, match="nobody"):
        rpc.get_worker_info("nobody")
    with pytest.raises(RuntimeError, match="nobody"):
        rpc.api._get_current_rpc_agent().get_worker_info("nobody")
    still_works(world)


@case(tensorpipe="it prints the map of all workers")
def an_unknown_worker_is_told_who_there_is(world: World) -> None:
    with pytest.raises(RuntimeError, match=world.next):
        rpc.rpc_sync("nobody", identity, args=(1,))


@case()
def functions_that_are_none(world: World) -> None:
    with pytest.raises(TypeError, match="callable"):
        rpc.rpc_sync(world.next, "identity")


@case(each=CALLS)
def functions_that_the_callee_does_not_have(world: World, api: Any) -> None:
    def only_here() -> int:
        return 1

    # Looked up by name at the callee, where nothing has that name.
    only_here.__qualname__ = only_here.__name__ = f"only_at_{world.rank}"
    setattr(sys.modules[__name__], only_here.__name__, only_here)
    elsewhere = types.ModuleType(f"module_of_{world.rank}")
    sys.modules[elsewhere.__name__] = elsewhere
    elsewhere.only_here = types.FunctionType(only_here.__code__, {"__name__": elsewhere.__name__}, "only_here")
    elsewhere.only_here.__qualname__ = "only_here"
    try:
        with pytest.raises(Exception, match=only_here.__name__):
            api(world.next, only_here)
        with pytest.raises(Exception, match=elsewhere.__name__):
            api(world.next, elsewhere.only_here)
    finally:
        delattr(sys.modules[__name__], only_here.__name__)
        del sys.modules[elsewhere.__name__]
    still_works(world)


# Pickling


class RefusesToBePickled:
    def __reduce__(self) -> Any:
        raise ValueError("I stay here")


class RefusesToArrive:
    """Can be sent, but not be received."""

    def __reduce__(self) -> Any:
        return refuse, ()


def refuse() -> None:
    raise ValueError("I do not arrive")


def make(kind: type) -> Any:
    return kind()


def return_lock() -> Any:
    return threading.Lock()


@case(each=APIS)
def arguments_that_cannot_be_pickled(world: World, api: Any) -> None:
    with pytest.raises(Exception, match="pickle"):
        api(world.next, identity, args=(threading.Lock(),))
    with pytest.raises(ValueError, match="I stay here"):
        api(world.next, identity, args=([torch.ones(50_000), RefusesToBePickled()],))
    still_works(world)


@case(each=CALLS)
def arguments_that_do_not_arrive(world: World, api: Any) -> None:
    with pytest.raises(Exception, match="I do not arrive"):
        api(world.next, identity, args=([torch.ones(50_000), RefusesToArrive()],))
    still_works(world)


@case(each=APIS)
def results_that_cannot_be_pickled(world: World, api: Any) -> None:
    with pytest.raises(Exception, match="pickle"):
        api(world.next, return_lock)
    with pytest.raises(Exception, match="I stay here"):
        api(world.next, make, args=(RefusesToBePickled,))
    still_works(world)


@case(each=APIS)
def results_that_do_not_arrive(world: World, api: Any) -> None:
    with pytest.raises(Exception, match="I do not arrive"):
        api(world.next, make, args=(RefusesToArrive,))
    still_works(world)


# Timeouts that make no sense


@case(each=APIS, tensorpipe="it takes a negative timeout for none, or for one that is over")
def negative_timeouts(world: World, api: Any) -> None:
    for timeout in (-5, -0.001):
        with pytest.raises((ValueError, RuntimeError), match=r"timeout.*-|-.*timeout"):
            api(world.next, identity, args=(1,), timeout=timeout)
    still_works(world)
