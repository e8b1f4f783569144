"""The state of threads, torch's and Python's: what a callback inherits, and what must not leak from one piece of code
into another."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import decimal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, get_type_hints

import numpy
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from harness import World, case, equal, wait
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.futures import Future
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

KEY = "a test of torch_rpc_mpi"


def state() -> dict[str, Any]:
    """What can be asked about this thread."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "forward gradients": torch._C._is_fwd_grad_enabled(),
        "multithreading": torch._C._is_multithreading_enabled(),
        "view replay": torch._C._is_view_replay_enabled(),
        "torch functions": torch._C._is_torch_function_enabled(),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "saved tensors": hooked(),
        "autocast": str(torch.get_autocast_dtype("cpu")),
        "included": str(torch._C._dispatch_tls_local_include_set()),
        "excluded": str(torch._C._dispatch_tls_local_exclude_set()),
        "objects": torch._C._is_key_in_tls(KEY) and torch._C._get_obj_in_tls(KEY),
    }


def hooked() -> bool | str:
    """Whether what is saved for a backward goes through a hook; the reason if hooks are forbidden."""
    reason = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if reason or hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return reason or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    # torch 2.6 cannot be asked, but what has hooks refuses others.
    with torch.inference_mode(False), torch.enable_grad():
        y = torch.ones(1, requires_grad=True).exp()
    try:
        y.grad_fn._raw_saved_result.register_hooks(unchanged, unchanged)
    except RuntimeError:
        return True
    return False


class PassingOn(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def autocast_type() -> Iterator[None]:
    before = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_dtype("cpu", before)


@contextlib.contextmanager
def python_object() -> Iterator[None]:
    # There is no way to take it back: the object says whether it is there.
    torch._C._stash_obj_in_tls(KEY, True)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(KEY, False)


def unchanged(x: Any) -> Any:
    return x


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "no forward gradients": lambda: torch.autograd.forward_ad._set_fwd_grad_enabled(False),
    "one thread": lambda: torch.autograd.set_multithreading_enabled(False),
    "view replay": lambda: torch.autograd._force_original_view_tracking(True),
    "no torch functions": torch._C.DisableTorchFunction,
    "function mode": PassingOn,
    "dispatch mode": Dispatching,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged),
    "no hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("not now"),
    "autocast": lambda: torch.autocast("cpu"),
    "autocast type": autocast_type,
    "python object": python_object,
}


@case(each=STATES, sizes=(1, 2))
def callback_has_the_callers_state(world: World, enter: Any) -> None:
    go = world.event("go")
    outside = state()
    with enter():
        inside = state()
        future = rpc.rpc_async(world.next, wait, args=(go,))
    assert (inside == outside) == (enter is contextlib.nullcontext), inside
    seen = future.then(lambda _: state())
    go.signal()
    equal(seen.wait(), inside)


_promises: dict[str, Future[None]] = {}


@rpc.functions.async_execution
def promise(name: str) -> Future[None]:
    """Answers when whoever has the future completes it, in its thread."""
    _promises[name] = Future()
    return _promises[name]


@case(each=STATES, sizes=(1,))
def callback_does_not_have_the_state_of_who_answers(world: World, enter: Any) -> None:
    outside = state()
    future = rpc.rpc_async(world.name(), promise, args=("later",))
    seen = future.then(lambda _: state())
    while "later" not in _promises:
        rpc.rpc_sync(world.name(), unchanged, args=(None,))
    with enter():
        _promises.pop("later").set_result(None)
        inside = state()
    equal(seen.wait(), outside)
    assert (inside == outside) == (enter is contextlib.nullcontext), inside


# What a thread does for the engine while it waits is not a part of what its user has it do.


class Watching(TorchDispatchMode):
    """Notes what is called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


class WatchingFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "fake tensors": FakeTensorMode,
    "dispatch mode": Watching,
    "function mode": WatchingFunctions,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu"),
    "deterministic": deterministic,
    "functionalization": torch._subclasses.functional_tensor.FunctionalTensorMode,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged),
}


class Holder:
    """Travels in a Python pickle, not in the plain format that needs no Python to be read."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # quantized types are deprecated
    QUANTIZED = torch.quantize_per_tensor(torch.arange(6.0), 0.5, 0, torch.qint8)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "dense": torch.arange(6.0),
        "sparse": torch.sparse_coo_tensor([[0, 1], [2, 0]], [3.0, 4.0], (2, 3), check_invariants=True),
        "view": torch.arange(1000.0)[3:9:2],
        "large": torch.ones(300_000),
        "complex": torch.ones(3, dtype=torch.complex64).conj(),
        "quantized": QUANTIZED,
    }


def made(kind: str, held: bool) -> Any:
    return Holder(tensors()[kind]) if held else tensors()[kind]


def plain(answer: Any) -> torch.Tensor:
    tensor = answer.tensor if isinstance(answer, Holder) else answer
    assert type(tensor) is torch.Tensor, type(tensor)
    assert not tensor.is_inference()
    assert tensor.is_leaf
    return values(tensor)


def values(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if tensor.is_quantized else tensor.resolve_conj().to_dense()


def summed(value: Any) -> float:
    """Fails where its argument is an inference tensor."""
    tensor = plain(value)
    tensor += 0
    return float(tensor.sum().real)


# An answer that comes in time is read by the caller's thread, another one by the engine's: both are to have their turn.
CALLS_UNDER_A_MODE = 20


@case(each=MODES, sizes=(1, 2))
def a_mode_sees_nothing_of_messages(world: World, mode: Any) -> None:
    expected = {kind: values(tensor) for kind, tensor in tensors().items()}
    given = tensors()
    for kind in given:
        for held in (False, True):
            argument = Holder(given[kind]) if held else given[kind]
            rref = rpc.remote(world.next, made, args=(kind, held))
            with mode() as entered:
                answers = [rpc.rpc_sync(world.next, made, args=(kind, held)) for _ in range(CALLS_UNDER_A_MODE)]
                sums = [rpc.rpc_sync(world.next, summed, args=(argument,)) for _ in range(CALLS_UNDER_A_MODE)]
                answers.append(rref.to_here())
                called = list(getattr(entered, "called", []))
            equal(called if world.size > 1 else [], [])  # a call to oneself runs while the mode is on, elsewhere
            for answer in answers:
                equal(plain(answer), expected[kind])
            equal(sums, [float(expected[kind].sum().real)] * CALLS_UNDER_A_MODE)


def doubled(value: torch.Tensor) -> torch.Tensor:
    return value * 2


@case(sizes=(1, 2))
def whether_gradients_are_recorded_goes_along_with_a_call(world: World) -> None:
    weight = torch.ones(3, requires_grad=True)
    with dist_autograd.context():
        for call in (rpc.rpc_sync, lambda *given, **more: rpc.rpc_async(*given, **more).wait()):
            assert call(world.next, doubled, args=(weight,)).grad_fn is not None
            with torch.no_grad():
                assert call(world.next, doubled, args=(weight,)).grad_fn is None


# What a function or a callback sets for its thread ends with it.

_variable = contextvars.ContextVar("_variable", default="new")
_local = threading.local()


def settings() -> dict[str, Any]:
    """What code finds in its thread."""
    return {
        "context variable": _variable.get(),
        "exception": sys.exc_info()[1],
        "decimal": decimal.getcontext().prec,
        "numpy": numpy.geterr()["divide"],
        "thread-local value": getattr(_local, "value", "new"),
        "event loop": asyncio._get_running_loop(),
        "tracing": sys.gettrace(),
        "profiling": sys.getprofile(),
        "generator hooks": sys.get_asyncgen_hooks()[0],
        "coroutines": sys.get_coroutine_origin_tracking_depth(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "denormals": sys.float_info.min / len("four") > 0,
        "device": str(torch.get_default_device()),
        **state(),
    }


def spoil(*_: Any) -> None:
    _variable.set("old")
    _local.value = "old"
    decimal.getcontext().prec = 3
    numpy.seterr(divide="raise")
    asyncio._set_running_loop(asyncio.new_event_loop())
    sys.set_asyncgen_hooks(firstiter=lambda _: None)
    sys.set_coroutine_origin_tracking_depth(5)
    torch.set_autocast_cache_enabled(False)
    torch.set_flush_denormal(True)
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    torch._C._stash_obj_in_tls(KEY, True)
    PassingOn().__enter__()
    Dispatching().__enter__()
    torch.inference_mode().__enter__()
    sys.setprofile(lambda *_: None)
    sys.settrace(lambda *_: None)


class Spoiling:
    """Its pickle spoils the thread that writes it and the one that reads it."""

    def __reduce__(self) -> Any:
        spoil()
        return spoil, ()


class Observed:
    """Its pickle brings the settings of the thread that writes it, and of the one that reads it."""

    def __reduce__(self) -> Any:
        return pair, (settings(), Observing())


class Observing:
    def __reduce__(self) -> Any:
        return settings, ()


def pair(*both: Any) -> Any:
    return both


def result_of(kind: type) -> Any:
    return kind()


@rpc.functions.async_execution
def spoil_later(name: str) -> Future[None]:
    """Spoils in a callback, of a future that the engine completes."""
    return rpc.rpc_async(name, result_of, args=(str,)).then(spoil)


@torch.jit.script
def stop_recording(x: torch.Tensor) -> torch.Tensor:
    torch.set_grad_enabled(False)
    return x


def spoil_in_python(x: torch.Tensor) -> torch.Tensor:
    spoil()
    return x


spoil_in_python.__annotations__ = get_type_hints(spoil_in_python)  # TorchScript reads none that are strings
torch.jit.ignore(spoil_in_python)


@torch.jit.script
def spoil_in_script(x: torch.Tensor) -> torch.Tensor:
    return spoil_in_python(x)


def in_new_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


CALLS_AT_ONCE = 24


@case(sizes=(1, 2))
def settings_end_with_the_code_that_made_them(world: World) -> None:
    new = in_new_thread(settings)
    before = settings()

    def all_clean(what: str) -> None:
        seen = torch.futures.wait_all([rpc.rpc_async(world.next, settings) for _ in range(CALLS_AT_ONCE)])
        for each in seen:
            assert each == new, f"after {what}: {each}"
        for each in rpc.rpc_sync(world.next, result_of, args=(Observed,)):  # as one writes its result, as one reads it
            assert each == new, f"after {what}, in pickles: {each}"

    spoilers: dict[str, Callable[[], Future[Any]]] = {
        "functions": lambda: rpc.rpc_async(world.next, spoil),
        "functions of futures": lambda: rpc.rpc_async(world.next, spoil_later, args=(world.name(),)),
        "pickles": lambda: rpc.rpc_async(world.next, result_of, args=(Spoiling,)),
        "scripts": lambda: rpc.rpc_async(world.next, stop_recording, args=(torch.ones(1),)),
        "scripts that call Python": lambda: rpc.rpc_async(world.next, spoil_in_script, args=(torch.ones(1),)),
        "values": lambda: rpc.remote(world.next, spoil)._get_future(),
    }
    all_clean("nothing")
    for what, spoiler in spoilers.items():
        torch.futures.wait_all([spoiler() for _ in range(CALLS_AT_ONCE)])
        all_clean(what)
    rpc.rpc_sync(world.next, result_of, args=(Spoiling,))  # read by this thread
    rpc.rpc_sync(world.next, unchanged, args=(None,))
    try:
        raise LookupError("is being handled while an answer is read")
    except LookupError as handled:
        seen_by_pickles = rpc.rpc_sync(world.next, result_of, args=(Observed,))
        stays = sys.exc_info()[1] is handled
    equal([seen_by_pickles, stays], [(new, new), True])
    assert settings() == before


@case(sizes=(1, 2))
def settings_end_with_the_callback_that_made_them(world: World) -> None:
    new = in_new_thread(settings)
    before = settings()
    go = world.event("go")
    seen: list[Any] = []
    futures: list[Future[Any]] = []
    for _ in range(CALLS_AT_ONCE):
        future = rpc.rpc_async(world.next, wait, args=(go,))
        future.add_done_callback(spoil)
        future.add_done_callback(lambda _: seen.append(settings()))
        futures.append(future.then(spoil).then(lambda _: seen.append(settings())))
    go.signal()
    torch.futures.wait_all(futures)
    equal(len(seen), 2 * CALLS_AT_ONCE)
    for each in seen:
        assert each == new, each
    assert settings() == before


@case(sizes=(1, 2))
def a_callback_of_a_complete_future_is_a_part_of_its_adder(world: World) -> None:
    future = rpc.rpc_async(world.next, unchanged, args=(1,))
    future.wait()
    token = _variable.set("mine")
    try:
        equal(future.then(lambda _: _variable.get()).wait(), "mine")
        future.add_done_callback(lambda _: _variable.set("set by a callback"))
        equal(_variable.get(), "set by a callback")
    finally:
        _variable.reset(token)


@case(sizes=(1,), session=False)
def a_callback_that_shutdown_runs_is_not_a_part_of_its_caller(world: World) -> None:
    world.init()
    new = in_new_thread(settings)
    go = world.event("go")
    seen: list[Any] = []
    future = rpc.rpc_async(world.name(), promise, args=("never",))
    future.add_done_callback(spoil)
    future.add_done_callback(lambda _: seen.append(settings()))
    while "never" not in _promises:
        rpc.rpc_sync(world.name(), unchanged, args=(None,))
    before = settings()
    rpc.shutdown(graceful=False)
    del _promises["never"]
    go.signal()
    equal(seen, [new])
    assert settings() == before


@case(sizes=(1,), session=False)
def futures_are_torchs_again_after_the_session(world: World) -> None:
    torchs = dict(vars(torch._C.Future))
    world.init()
    assert vars(torch._C.Future)["then"] is not torchs["then"]
    rpc.shutdown()
    assert dict(vars(torch._C.Future)) == torchs
