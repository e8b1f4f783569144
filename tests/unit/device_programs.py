"""What test_rpctest_device.py runs, each function in a process of its own: the device is torch's accelerator there."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable

import rpctest_device as device
import torch

POISON = 0xDB
runtime = device.runtime


class Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


def ok(error: int) -> None:
    assert error == 0, runtime.rpctestGetErrorString(error)


def pinned(*size: int) -> torch.Tensor:
    return torch.zeros(*size).pin_memory()


def malloc(size: int) -> ctypes.c_void_p:
    memory = ctypes.c_void_p()
    ok(runtime.rpctestMalloc(ctypes.byref(memory), ctypes.c_size_t(size)))
    return memory


def copy(to: int | ctypes.c_void_p, source: int | ctypes.c_void_p, size: int, stream: int | None = None) -> None:
    to, source = (ctypes.cast(pointer, ctypes.c_void_p) for pointer in (to, source))
    ok(runtime.rpctestMemcpyAsync(to, source, ctypes.c_size_t(size), 4, ctypes.c_void_p(stream)))


def copies_wait_for_nobody() -> None:
    host = pinned(4)
    with device.held():
        written = torch.ones(4, device="rpctest")
        host.copy_(written, non_blocking=True)
        done = device.Event()
        done.record()
        assert not done.query()
        assert host.tolist() == [0] * 4
    done.synchronize()
    assert done.query()
    assert host.tolist() == [1] * 4
    assert (written * 2).cpu().tolist() == [2] * 4  # to memory that is not pinned: it waits


def seeds_show_missing_waits() -> None:
    def wrong(wait: bool) -> int:
        """How often one stream does not see what another has written before."""
        written, read = device.Stream(), device.Stream()
        source = torch.zeros(1, device="rpctest")
        seen = []
        device.synchronize()
        with device.held(read), device.held(written):  # all is queued first, however slow this thread is
            for number in range(1, 30):
                with device.stream(written):
                    source.fill_(number)
                if wait:
                    read.wait_stream(written)
                with device.stream(read):
                    seen.append(source + 0)
                written.wait_stream(read)
        device.synchronize()
        return sum(float(value) != number for number, value in enumerate(seen, 1))

    assert wrong(wait=False) > 0
    assert wrong(wait=True) == 0


def recorded_streams_keep_memory() -> None:
    def read_after_free(record: bool) -> tuple[list[float], bool]:
        side = device.Stream()
        written = torch.ones(4, device="rpctest")
        host = pinned(4)
        side.wait_stream(device.current_stream())
        with device.held(side):
            with device.stream(side):
                host.copy_(written, non_blocking=True)
            if record:
                written.record_stream(side)
            address = written.data_ptr()
            del written
            again = torch.zeros(4, device="rpctest")
            device.current_stream().synchronize()
            reused = again.data_ptr() == address
        device.synchronize()
        return host.tolist(), reused

    assert read_after_free(record=True) == ([1] * 4, False)
    assert read_after_free(record=False) == ([0] * 4, True)


def freed_memory_is_overwritten() -> None:
    freed = torch.ones(4, device="rpctest")
    address = freed.data_ptr()
    host = pinned(4)
    with device.held():
        copy(host.data_ptr(), address, 16)
        del freed
        after = torch.zeros(4).pin_memory()
        copy(after.data_ptr(), address, 16)
    device.synchronize()
    assert host.tolist() == [1] * 4  # before, in the stream's order
    assert after.view(torch.uint8).tolist() == [POISON] * 16


def operators_are_queued() -> None:
    x = torch.arange(6.0, device="rpctest").reshape(2, 3)
    other = torch.ones(2, 3, device="rpctest:1")
    host = torch.ones(2, 3).pin_memory()
    device.synchronize()
    before = device.counts().synchronizations
    with device.held():
        y = x + 1
        y += x
        y = (y * 2 - x).mul_(x)
        z = torch.zeros_like(y).fill_(3).add_(y).t().contiguous()
        product = torch.mm(x, z)
        total = (product.sum() + product.sum(0).sum()).double()
        moved = host.to("rpctest", non_blocking=True) + other.to("rpctest:0")
        half = x.half()[:, 1].clone().zero_()
        x.sub_(x).resize_(0)
        assert device.unqueued() == set()
        assert device.counts().synchronizations == before
    start = torch.arange(6.0).reshape(2, 3)
    expected = ((2 * start + 1) * 2 - start) * start
    assert torch.equal(z.cpu(), (expected + 3).t())
    assert total.item() == 2 * torch.mm(start, (expected + 3).t()).sum()
    assert moved.tolist() == [[2] * 3] * 2
    assert half.tolist() == [0, 0]
    assert torch.equal(z, z.clone())
    assert device.unqueued() == {"aten::equal"}


def a_model_trains_across_devices() -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)
    twins = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)]
    for model, twin in zip((first, second), twins, strict=True):
        twin.load_state_dict(model.state_dict())
    data, target = torch.randn(16, 4), torch.randn(16, 1)
    losses = []
    for one, two, places in ((first, second, ("rpctest:0", "rpctest:1")), (*twins, ("cpu", "cpu"))):
        one.to(places[0])
        two.to(places[1])
        optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            hidden = torch.nn.functional.relu(one(data.to(places[0])))
            loss = torch.nn.functional.mse_loss(two(hidden.to(places[1])), target.to(places[1]))
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 1e-5
    for model, twin in zip((first, second), twins, strict=True):
        assert torch.allclose(model.weight.cpu(), twin.weight, atol=1e-5)


def contexts_appear_where_cuda_makes_them() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("rpctest")
    assert torch.accelerator.device_count() == 2
    assert device.contexts() == []
    written = torch.ones(1, device="rpctest:1")
    assert device.contexts() == [1]
    assert device.current_device() == 0
    stream = device.Stream(1)
    event = device.Event()
    with device.device(1):
        event.record(stream)
        event.synchronize()
        assert event.query()
    assert device.contexts() == [1]
    thread = threading.Thread(target=event.record, args=(stream,))  # it goes back to the device that new threads have
    thread.start()
    thread.join()
    assert device.contexts() == [0, 1]
    assert written.item() == 1


def queries_spoil_captures() -> None:
    x = torch.zeros(1, device="rpctest")
    event = device.Event()
    event.record()
    device.synchronize()

    def capture(query: Callable[[], object]) -> device.Graph:
        with device.stream(device.Stream()):
            device.begin_capture()
            x.add_(1)
            thread = threading.Thread(target=query)
            thread.start()
            thread.join()
            return device.end_capture()

    def relaxed() -> None:
        mode = ctypes.c_int(2)
        ok(runtime.rpctestThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
        assert event.query()

    errors = []

    def unaware() -> None:
        try:
            event.query()
        except RuntimeError as error:
            errors.append(str(error))

    graph = capture(relaxed)
    assert x.item() == 0
    graph.replay()
    graph.replay()
    assert x.item() == 2
    try:
        capture(unaware)
    except RuntimeError as error:
        assert "previous error during capture" in str(error)  # noqa: PT017
    else:
        raise AssertionError("the capture was not spoiled")
    assert "not permitted when stream is capturing" in errors[0]


def what_is_made_is_counted() -> None:
    nothing = device.counts()
    kept = torch.ones(3, device="rpctest")
    assert device.counts().tensors == nothing.tensors + 1
    memory, host, stream, event = malloc(100), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    own = torch.zeros(1024)
    ok(runtime.rpctestHostAlloc(ctypes.byref(host), ctypes.c_size_t(100), 1))
    ok(runtime.rpctestHostRegister(ctypes.c_void_p(own.data_ptr()), ctypes.c_size_t(4096), 1))
    assert runtime.rpctestHostRegister(ctypes.c_void_p(own.data_ptr()), ctypes.c_size_t(4096), 1) == 712
    assert runtime.rpctestGetLastError() == 712
    ok(runtime.rpctestStreamCreateWithFlags(ctypes.byref(stream), 1))
    ok(runtime.rpctestEventCreateWithFlags(ctypes.byref(event), 2))
    ok(runtime.rpctestEventRecord(event, stream))
    with device.device(1):
        assert runtime.rpctestEventRecord(event, None) == 400  # an event is its device's
    made = device.counts()
    assert (made.allocations, made.pinned, made.registered, made.events, made.streams) == (1, 1, 1, 1, 1)
    assert own.is_pinned()
    ok(runtime.rpctestEventDestroy(event))
    ok(runtime.rpctestStreamDestroy(stream))
    ok(runtime.rpctestHostUnregister(ctypes.c_void_p(own.data_ptr())))
    ok(runtime.rpctestFreeHost(host))
    ok(runtime.rpctestFree(memory))
    del kept
    left = device.counts()
    assert left.synchronizations == nothing.synchronizations + 3  # what frees waits
    assert left[:-1] == nothing[:-1]


def a_forked_child_has_no_device() -> None:
    torch.ones(1, device="rpctest")
    child = os.fork()
    if child == 0:
        os._exit(runtime.rpctestSetDevice(0) if device._is_in_bad_fork() else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
