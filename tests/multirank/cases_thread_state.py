"""Callbacks of a call's future have the thread-local state of torch that the thread had which made the call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed.rpc as rpc
from harness import World, case, equal, wait
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
