"""As device_programs.py, with two processes: the second opens what the first has made."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable

import rpctest_device as device
import torch
from device_programs import Handle, copy, malloc, ok, pinned

runtime = device.runtime
SIZE = 4096
INTERPROCESS = 2 | 4


class Pipe:
    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def send(self, data: bytes = b"!") -> None:
        os.write(self._write, data)

    def receive(self, size: int = 1) -> bytes:
        data = os.read(self._read, size)
        assert len(data) == size
        return data


def second(program: Callable[[], None], **environment: str) -> int:
    """Before this process has used a device."""
    child = os.fork()
    if child != 0:
        return child
    os.environ.update(environment)
    try:
        program()
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended_well(child: int) -> None:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def memory_handle(memory: ctypes.c_void_p) -> bytes:
    handle = Handle()
    ok(runtime.rpctestIpcGetMemHandle(ctypes.byref(handle), memory))
    return bytes(handle)


def open_memory(data: bytes, flags: int = 1) -> tuple[int, ctypes.c_void_p]:
    opened = ctypes.c_void_p()
    return runtime.rpctestIpcOpenMemHandle(ctypes.byref(opened), Handle.from_buffer_copy(data), flags), opened


def shared_event() -> tuple[ctypes.c_void_p, bytes]:
    event, handle = ctypes.c_void_p(), Handle()
    ok(runtime.rpctestEventCreateWithFlags(ctypes.byref(event), INTERPROCESS))
    ok(runtime.rpctestIpcGetEventHandle(ctypes.byref(handle), event))
    return event, bytes(handle)


def open_event(data: bytes) -> ctypes.c_void_p:
    event = ctypes.c_void_p()
    ok(runtime.rpctestIpcOpenEventHandle(ctypes.byref(event), Handle.from_buffer_copy(data)))
    return event


def read(source: int | ctypes.c_void_p) -> torch.Tensor:
    host = pinned(SIZE // 4)
    copy(host.data_ptr(), source, SIZE)
    return host


def memory_and_events_cross_processes() -> None:
    to_second, to_first = Pipe(), Pipe()

    def reader() -> None:
        data, event = to_second.receive(64), open_event(to_second.receive(64))
        error, memory = open_memory(data)
        ok(error)
        assert open_memory(data)[1].value == memory.value  # as long as it is open
        before = read(memory)
        device.synchronize()
        ok(runtime.rpctestStreamWaitEvent(None, event, 0))
        after = read(memory)
        to_first.send()
        device.synchronize()
        assert before.eq(0).all()
        assert after.eq(7).all()
        assert device.counts().opened == 2
        for _ in range(2):
            ok(runtime.rpctestIpcCloseMemHandle(memory))
        ok(runtime.rpctestEventDestroy(event))
        assert device.counts().opened == device.counts().events == 0

    child = second(reader)
    memory = malloc(SIZE)
    assert memory.value is not None
    event, event_handle = shared_event()
    handle = memory_handle(memory)
    assert memory_handle(ctypes.c_void_p(memory.value + 100)) == handle  # wherever in it
    assert open_memory(handle)[0] == 201  # in its own process
    sevens = torch.full((SIZE // 4,), 7.0)
    with device.held():
        copy(memory, sevens.data_ptr(), SIZE)
        ok(runtime.rpctestEventRecord(event, None))
        to_second.send(handle + event_handle)
        to_first.receive()  # and still nothing is written
    ended_well(child)


def handles_are_refused() -> None:
    to_blind, to_other = Pipe(), Pipe()

    def blind() -> None:
        data = to_blind.receive(64)
        assert open_memory(data)[0] == 101  # this process does not see the device
        assert device.get_device_properties(0).uuid.bytes == to_blind.receive(16)

    def other() -> None:
        data = to_other.receive(64)
        assert open_memory(data, flags=0)[0] == 217  # memory of another device than the current one
        device.allow_ipc(False)
        assert open_memory(data)[0] == 801
        assert runtime.rpctestIpcGetMemHandle(ctypes.byref(Handle()), malloc(SIZE)) == 801

    children = [second(blind, RPCTEST_VISIBLE_DEVICES="0"), second(other)]
    with device.device(1):
        handle = memory_handle(malloc(SIZE))
    to_blind.send(handle + device.get_device_properties(0).uuid.bytes)
    to_other.send(handle)
    for child in children:
        ended_well(child)


def the_dead_are_not_awaited() -> None:
    to_first = Pipe()

    def recorder() -> None:
        event, handle = shared_event()
        with device.held():
            ok(runtime.rpctestEventRecord(event, None))
            to_first.send(handle)
            time.sleep(100)  # until it is killed

    child = second(recorder)
    event = open_event(to_first.receive(64))
    ok(runtime.rpctestStreamWaitEvent(None, event, 0))
    assert runtime.rpctestEventQuery(event) == 600
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    device.synchronize()
