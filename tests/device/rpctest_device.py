"""The device of the tests, as torch.rpctest: `import rpctest_device` makes it torch's accelerator.

Its library is built by ci/test_device.sh; RPCTEST_LIBRARY names another. tests/device/README.md says what it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY = os.environ.get("RPCTEST_LIBRARY") or str(
    Path(__file__).parents[2] / "build" / f"device-{torch.__version__}" / "rpctest.so"
)
PREFIX = "rpctest"  # of the runtime's functions


class Counts(NamedTuple):
    """What this process has of the runtime now, and how often it has waited for a stream, a device or an event."""

    allocations: int
    pinned: int
    registered: int
    opened: int
    events: int
    streams: int
    tensors: int
    tensor_bytes: int
    synchronizations: int


@dataclass(frozen=True)
class Properties:
    name: str
    uuid: uuid.UUID
    total_memory: int


def _load() -> ctypes.CDLL:
    if not Path(LIBRARY).is_file():
        raise ImportError(f"{LIBRARY} is missing: ci/test_device.sh builds it")
    library = ctypes.CDLL(LIBRARY)
    stream = [ctypes.c_int, ctypes.c_int64]
    pointer = ctypes.c_void_p
    for name, result, arguments in [
        ("AllowIpc", None, [ctypes.c_int]),
        ("Contexts", ctypes.c_uint64, []),
        ("Counts", None, [pointer]),
        ("GetErrorString", ctypes.c_char_p, [ctypes.c_int]),
        ("GraphDestroy", None, [pointer]),
        ("GraphLaunch", ctypes.c_int, [pointer, *stream]),
        ("Hold", pointer, stream),
        ("LetGo", None, [pointer]),
        ("Sleep", None, [*stream, ctypes.c_int64]),
        ("StreamBeginCapture", ctypes.c_int, [*stream, ctypes.c_int]),
        ("StreamEndCapture", ctypes.c_int, [*stream, pointer]),
        ("Unqueued", ctypes.c_char_p, []),
    ]:
        function = getattr(library, PREFIX + name)
        function.restype = result
        function.argtypes = arguments
    return library


runtime = _load()  # for tests that call the runtime themselves
torch.utils.rename_privateuse1_backend("rpctest")


def _check(error: int) -> None:
    if error != 0:
        raise RuntimeError(f"rpctest: {runtime.rpctestGetErrorString(error).decode()}")


def _index(device: torch.device | str | int | None) -> int:
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        device = device.index
    return current_device() if device is None else device


# What torch asks of a device's module.


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return runtime.rpctestContexts() != 0


def _is_in_bad_fork() -> bool:
    return bool(runtime.rpctestInBadFork())


def device_count() -> int:
    count = ctypes.c_int()
    runtime.rpctestGetDeviceCount(ctypes.byref(count))
    return count.value


def current_device() -> int:
    current = ctypes.c_int()
    runtime.rpctestGetDevice(ctypes.byref(current))
    return current.value


def set_device(device: torch.device | str | int) -> None:
    _check(runtime.rpctestSetDevice(_index(device)))


@contextlib.contextmanager
def device(chosen: torch.device | str | int) -> Iterator[None]:
    before = current_device()
    set_device(chosen)
    try:
        yield
    finally:
        runtime.rpctestReturnToDevice(before)


def _boot() -> uuid.UUID:
    return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())


@cache
def get_device_properties(device: torch.device | str | int | None = None) -> Properties:
    physical = runtime.rpctestPhysicalDevice(_index(device))
    if physical < 0:
        raise AssertionError("Invalid device id")
    return Properties("test device", uuid.uuid5(_boot(), f"rpctest:{physical}"), 1 << 34)


def get_device_name(device: torch.device | str | int | None = None) -> str:
    return get_device_properties(_index(device)).name


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Also where this process has no tensor there: torch's own does nothing then."""
    _check(runtime.rpctestSynchronizeDevice(_index(device)))


def empty_cache() -> None:
    runtime.rpctestEmptyCache()


def Stream(device: torch.device | str | int | None = None, priority: int = 0) -> torch.Stream:
    return torch.Stream(device=torch.device("rpctest", _index(device)), priority=priority)


def Event(enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> torch.Event:
    return torch.Event(device="rpctest", enable_timing=enable_timing)


def current_stream(device: torch.device | str | int | None = None) -> torch.Stream:
    return torch._C._accelerator_getStream(_index(device))


def default_stream(device: torch.device | str | int | None = None) -> torch.Stream:
    current = current_stream(device)
    return torch.Stream(stream_id=0, device_index=current.device_index, device_type=current.device_type)


def set_stream(stream: torch.Stream) -> None:
    """As torch.accelerator's, the stream's device becomes the current one."""
    torch._C._accelerator_setStream(stream)


@contextlib.contextmanager
def stream(chosen: torch.Stream | None) -> Iterator[None]:
    if chosen is None:
        yield
        return
    before_device = current_device()
    before = current_stream(chosen.device_index)
    set_stream(chosen)
    try:
        yield
    finally:
        set_stream(before)
        runtime.rpctestReturnToDevice(before_device)


def manual_seed_all(seed: int) -> None:
    """Nothing to do: random numbers come from the CPU's generator."""


def get_rng_state(device: torch.device | str | int = "rpctest") -> torch.Tensor:
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: torch.device | str | int = "rpctest") -> None:
    torch.default_generator.set_state(new_state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16]


# What tests ask of it.


def contexts() -> list[int]:
    """The devices that this process has used."""
    mask = runtime.rpctestContexts()
    return [device for device in range(64) if mask >> device & 1]


def counts() -> Counts:
    numbers = (ctypes.c_int64 * len(Counts._fields))()
    runtime.rpctestCounts(numbers)
    return Counts(*numbers)


def unqueued() -> set[str]:
    """The operators that have run at once, because they cannot be queued."""
    return set(runtime.rpctestUnqueued().decode().split())


def allow_ipc(allowed: bool) -> None:
    runtime.rpctestAllowIpc(allowed)


def _place(stream: torch.Stream | None) -> tuple[int, int]:
    chosen = stream or current_stream()
    return chosen.device_index, chosen.stream_id


def _sleep(microseconds: int) -> None:
    """The current stream does nothing for so long, as after torch.cuda._sleep()."""
    runtime.rpctestSleep(*_place(None), microseconds)


@contextlib.contextmanager
def held(stream: torch.Stream | None = None) -> Iterator[None]:
    """The stream stands still at this point until the block ends."""
    hold = runtime.rpctestHold(*_place(stream))
    try:
        yield
    finally:
        runtime.rpctestLetGo(hold)


class Graph:
    """What was queued on a stream during a capture, to be run again."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def replay(self) -> None:
        _check(runtime.rpctestGraphLaunch(self._handle, *_place(None)))

    def __del__(self) -> None:
        runtime.rpctestGraphDestroy(self._handle)


def begin_capture(mode: str = "global") -> None:
    """The current stream's capture begins."""
    _check(runtime.rpctestStreamBeginCapture(*_place(None), ["global", "thread_local", "relaxed"].index(mode)))


def end_capture() -> Graph:
    """Raises an error if somebody spoiled the capture."""
    handle = ctypes.c_void_p()
    _check(runtime.rpctestStreamEndCapture(*_place(None), ctypes.byref(handle)))
    assert handle.value is not None
    return Graph(handle.value)


torch._register_device_module("rpctest", sys.modules[__name__])
