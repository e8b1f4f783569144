"""Python's handlers of signals run while the main thread waits; and what a called function starts is as the process is.

Cases run in the main thread of each rank. A signal is sent when the callee runs, and the callee ends when the handler
has run, or the main thread has got the exception that it raised: a wait that lets no signal through waits for ever.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from cases_calls import identity
from cases_rref import Account
from harness import WAIT_LIMIT, World, case, equal, eventually, program, signal_and_wait
from torch._C._distributed_rpc import PyRRef
from torch.futures import Future

import torch_rpc_mpi

LIMIT = 0.5  # seconds; 0.1 is promised, on a machine that has nothing else to do
NO_SIGNALS = "its waits let no signal through"


class Stop(Exception):
    """What a handler raises."""


def wait_for_both(to: str, function: Any, args: Any) -> Any:
    return torch.futures.wait_all([rpc.rpc_async(to, identity, args=(1,)), rpc.rpc_async(to, function, args=args)])[1]


def use_proxy(to: str, function: Any, args: Any) -> Any:
    return rpc.remote(to, Caller).rpc_sync().call(function, args)


class Caller:
    def call(self, function: Any, args: Any) -> Any:
        return function(*args)


# How the main thread waits for what a function returns.
WAITS: dict[str, Callable[[str, Any, Any], Any]] = {
    "rpc_sync": lambda to, function, args: rpc.rpc_sync(to, function, args=args),
    "rpc_sync, not direct": lambda to, function, args: rpc.rpc_sync(to, function, args=list(args)),
    "our rpc_sync": lambda to, function, args: torch_rpc_mpi.rpc_sync(to, function, args=args),
    "wait": lambda to, function, args: rpc.rpc_async(to, function, args=args).wait(),
    "wait_all": wait_for_both,
    "then": lambda to, function, args: rpc.rpc_async(to, function, args=args).then(lambda done: done.value()).wait(),
    "to_here": lambda to, function, args: rpc.remote(to, function, args=args).to_here(),
    "proxy": use_proxy,
    "local_value": lambda _, function, args: rpc.remote(rpc.get_worker_info(), function, args=args).local_value(),
    "own to_here": lambda _, function, args: rpc.remote(rpc.get_worker_info(), function, args=args).to_here(),
}


@contextlib.contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class Sender(threading.Thread):
    """Sends this process a signal as soon as something has come about. `sent` is the time of it."""

    def __init__(self, number: signal.Signals, due: Callable[[], Any]) -> None:
        super().__init__()
        self.number, self.due, self.sent = number, due, 0.0
        self.start()

    def run(self) -> None:
        self.due()
        self.sent = time.monotonic()
        os.kill(os.getpid(), self.number)


@case(each=WAITS, sizes=(2,), tensorpipe=NO_SIGNALS)
def handlers_run(world: World, wait: Callable[[str, Any, Any], Any]) -> None:
    arrived, go, ran = world.event("arrived"), world.event("go"), []

    def handler(*_: Any) -> None:
        ran.append(time.monotonic())
        equal(rpc.rpc_sync(world.next, identity, args=(2,)), 2)  # a handler may do what it likes
        equal(rpc.remote(world.next, identity, args=(3,)).to_here(), 3)
        go.signal("handled")

    with handled(signal.SIGUSR1, handler):
        sender = Sender(signal.SIGUSR1, arrived.wait)
        equal(wait(world.next, signal_and_wait, (arrived, go)), "handled")
        sender.join()
    assert ran[0] - sender.sent < LIMIT


@case(each=WAITS, sizes=(2,), tensorpipe=NO_SIGNALS)
def exceptions_of_handlers_end_the_wait(world: World, wait: Callable[[str, Any, Any], Any]) -> None:
    """The call goes on without somebody who waits, and so does the engine."""

    def stop(*_: Any) -> None:
        raise Stop("enough")

    for number, handler, error in (
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
        (signal.SIGTERM, stop, Stop),
    ):
        arrived, go = world.event(f"arrived {number}"), world.event(f"go {number}")
        with handled(number, handler):
            sender = Sender(number, arrived.wait)
            with pytest.raises(error):
                wait(world.next, signal_and_wait, (arrived, go))
            sender.join()
            assert time.monotonic() - sender.sent < LIMIT
        equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
        equal(rpc.rpc_async(world.next, identity, args=(2,)).wait(), 2)
        equal(rpc.remote(world.next, identity, args=(3,)).to_here(), 3)
        go.signal()


@case(sizes=(2,), tensorpipe=NO_SIGNALS)
def exceptions_of_handlers_at_any_moment(world: World) -> None:
    """Signals come all the time, in the middle of calls as well: afterwards everything is as before."""

    interrupted, wanted, over = 0, False, threading.Event()
    main = threading.main_thread().ident

    def stop(*_: Any) -> None:
        nonlocal wanted
        if wanted:  # on a busy machine, signals come between the calls and one after the other as well
            wanted = False
            raise Stop

    def send() -> None:
        while not over.wait(0.002):
            signal.pthread_kill(main, signal.SIGUSR1)  # no other thread gets the last one, after the handler is gone

    with handled(signal.SIGUSR1, stop):
        sender = threading.Thread(target=send)
        sender.start()
        try:
            while interrupted < 50:
                try:
                    wanted = True
                    equal(rpc.rpc_sync(world.next, identity, args=(interrupted,)), interrupted)
                    equal(rpc.remote(world.next, identity, args=(interrupted,)).to_here(), interrupted)
                    wanted = False
                except Stop:
                    interrupted += 1
        finally:
            wanted = False
            over.set()
            sender.join()
    # None of them has left the thread announced as one that drives progress: somebody looks for answers at once.
    futures = [rpc.rpc_async(world.next, identity, args=(number,)) for number in range(100)]
    equal(torch.futures.wait_all(futures), list(range(100)))


@case(sizes=(2,))
def slow_callbacks_delay_no_wait(world: World) -> None:
    answer, entered, go = world.event("answer"), threading.Event(), threading.Event()
    future = rpc.rpc_async(world.next, signal_and_wait, args=(world.event("arrived"), answer))

    def callback(_: Future) -> None:
        entered.set()
        assert go.wait(WAIT_LIMIT)

    future.add_done_callback(callback)
    threading.Thread(target=lambda: answer.signal("answered")).start()
    equal(future.wait(), "answered")
    assert entered.wait(WAIT_LIMIT)
    go.set()


@case(sizes=(2,))
def waits_keep_errors_and_times(world: World) -> None:
    """What torch's own do besides waiting."""
    future: Future = Future()
    future.set_exception(KeyError("mine"))
    with pytest.raises(KeyError, match="mine"):
        future.wait()
    never = world.event("never")
    begin = time.monotonic()
    for call in (
        lambda: rpc.rpc_sync(world.next, never.wait, timeout=0.2),
        lambda: rpc.rpc_async(world.next, never.wait, timeout=0.2).wait(),
        lambda: rpc.remote(world.next, never.wait).to_here(0.2),
        lambda: rpc.remote(world.next, never.wait).to_here(timeout=0.2),
    ):
        with pytest.raises(RuntimeError, match="RPC ran for more than set timeout"):
            call()
    assert time.monotonic() - begin < 4 * LIMIT
    with pytest.raises(TypeError):
        rpc.remote(world.next, identity, args=(1,)).to_here(time=1)
    never.signal()


METHODS = [(torch._C.Future, "wait"), (PyRRef, "to_here"), (PyRRef, "local_value")]


def methods() -> list[Any]:
    return [vars(where)[name] for where, name in METHODS]


@case(sizes=(2,), session=False, tensorpipe="it replaces nothing")
def torchs_methods_come_back(world: World) -> None:
    torchs = methods()
    world.init()
    ours = methods()
    assert not set(map(id, torchs)) & set(map(id, ours))
    rpc.shutdown()
    assert all(now is before for now, before in zip(methods(), torchs, strict=True))
    world.init()
    theirs = functools.partialmethod(ours[0].__func__ if hasattr(ours[0], "__func__") else ours[0])
    torch._C.Future.wait = theirs
    rpc.shutdown()
    assert methods()[0] is theirs
    torch._C.Future.wait = torchs[0]


# Processes and threads


STATUS = ("/proc/{}/stat", "/proc/{}/status")


def attributes(texts: str) -> tuple[int, str, str]:
    """Scheduling policy, cores and blocked signals, as /proc tells them."""
    policy = int(texts.split(") ", 1)[1].split()[38])
    fields = dict(line.split(":\t", 1) for line in texts.splitlines() if ":\t" in line)
    return policy, fields["Cpus_allowed_list"], fields["SigBlk"]


def read(who: str) -> str:
    return "".join(Path(path.format(who)).read_text() for path in STATUS)


def by_subprocess() -> str:
    return subprocess.run(["cat", *(path.format("self") for path in STATUS)], stdout=subprocess.PIPE, text=True).stdout


def by_shell(run: Callable[[str], Any]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        run(f"cat {' '.join(path.format('self') for path in STATUS)} > {scratch}/it")
        return Path(scratch, "it").read_text()


def by_spawn(command: str) -> None:
    os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", command], os.environ), 0)


def by_fork() -> str:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, read("self").encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as pipe:
        return pipe.read()


def by_thread() -> str:
    texts: list[str] = []
    thread = threading.Thread(target=lambda: texts.append(read("thread-self")))
    thread.start()
    thread.join()
    return texts[0]


def children() -> dict[str, tuple[int, str, str]]:
    """What is known of processes and threads that a function starts; a function for remote calls."""
    texts = {
        "subprocess": by_subprocess(),
        "system": by_shell(os.system),
        "posix_spawn": by_shell(by_spawn),
        "fork": by_fork(),
        "thread": by_thread(),
        "function": read("thread-self"),
    }
    return {way: attributes(text) for way, text in texts.items()}


def of_main_thread() -> tuple[int, str, str]:
    return attributes(read(f"self/task/{os.getpid()}"))


@case(sizes=(2,), tensorpipe="about this backend")
def what_functions_start_is_as_the_process(world: World) -> None:
    expected = rpc.rpc_sync(world.next, of_main_thread)
    for _ in range(2):
        equal(set(rpc.rpc_sync(world.next, children).values()), {expected})
        futures = [rpc.rpc_async(world.next, children) for _ in range(4)]  # in several threads, new ones among them
        for future in futures:
            equal(set(future.wait().values()), {expected})
        world.barrier()  # where the engine's threads sleep


# Beginning and ending, and a second Ctrl-C


def sleeps_in(name: str) -> bool:
    """Whether the main thread sleeps in a function of this name, or in what is called from there, as /C++ itself."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    in_it = names[0] == name.removesuffix("/C++") if name.endswith("/C++") else name in names
    return in_it and sleeps(os.getpid())


def sleeps(pid: int) -> bool:
    return Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(") ")[2].startswith("S")


@contextlib.contextmanager
def interrupted_in(function: str) -> Iterator[None]:
    """The body waits in a function of this name, and is interrupted there."""
    with handled(signal.SIGINT, signal.default_int_handler):
        sender = Sender(signal.SIGINT, lambda: eventually(lambda: sleeps_in(function), f"in {function}"))
        with pytest.raises(KeyboardInterrupt):
            yield
        sender.join()
        assert time.monotonic() - sender.sent < 2 * LIMIT


@program(tensorpipe=NO_SIGNALS)
def interrupted_while_a_group_forms(world: World) -> None:
    """And later it forms all the same."""
    from mpi4py import MPI

    assert MPI.COMM_WORLD.Get_size() == world.size
    if world.rank == 0:
        with interrupted_in("init_backend"):
            world.init()
        world.signal("interrupted")
    else:
        world.wait("interrupted")
    world.init()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    rpc.shutdown()


@program(tensorpipe=NO_SIGNALS)
def interrupted_in_shutdown(world: World) -> None:
    """In each of its waits; this worker has left then."""
    waits = {
        "for the other to come": "_all_gather",
        "for the other to delete an RRef": "interruptibly",
        "for the other to join": "shutdown/C++",
    }
    torchs = rpc.api._delete_all_user_and_unforked_owner_rrefs
    for stage, function in waits.items():
        interrupted = f"interrupted while it waits {stage}"
        if world.rank == 1 and function != "_all_gather":
            # This worker stops where the other one waits for it.
            rpc.api._delete_all_user_and_unforked_owner_rrefs = functools.partial(world.wait, interrupted)
        world.init()
        if world.rank == 0:
            account = rpc.RRef(Account(1))
            if function == "interruptibly":
                rpc.rpc_sync(world.next, keep, args=(account,))
            with interrupted_in(function):
                rpc.shutdown()
            world.signal(interrupted)
        elif function == "_all_gather":
            world.wait(interrupted)
            rpc.shutdown(graceful=False)
        else:
            with pytest.raises(RuntimeError, match="worker0"):
                rpc.shutdown()
            rpc.api._delete_all_user_and_unforked_owner_rrefs = torchs
        assert not rpc.api._is_current_rpc_agent_set()
        kept.clear()
        world.barrier()
    world.init()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    rpc.shutdown()


kept: list[Any] = []


def keep(rref: Any) -> None:
    kept.append(rref)


@torch.jit.script
def wait_in_script(future: torch.jit.Future[torch.Tensor]) -> torch.Tensor:
    return torch.jit.wait(future)


def never_comes_back(future: Future) -> None:
    wait_in_script(future)


SECOND = r"ended by a second Ctrl-C, because the first cannot interrupt "


@program(
    succeeds=False,
    expect=[rf"name=worker0\) \(rank 0 on host .* {SECOND}.*TorchScript", "MPI_Abort|MPI_ABORT"],
    forbid=["Traceback"],
    tensorpipe=NO_SIGNALS,
)
def interrupted_twice_in_a_script(world: World) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    world.init()
    if world.rank == 0:
        arrived, never = world.event("arrived"), world.event("never")
        future = rpc.rpc_async(world.next, signal_and_wait, args=(arrived, never))
        arrived.wait()
        threading.Thread(target=interrupt_often, daemon=True).start()
        never_comes_back(future)
    world.wait("never")


def interrupt_often() -> None:
    eventually(lambda: sleeps_in("never_comes_back/C++"), "in a script")
    while True:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)


# For a process of its own, because mpi4py keeps the GIL in MPI_Init, which that calls when its extension is loaded. No
# event tells that it has; before that, a signal would interrupt Python's import.
INTERRUPT_OFTEN = """
import os, pathlib, re, signal, sys, time
pid, looks = int(sys.argv[1]), 0
while looks < 25:
    looks += bool(re.search(r"mpi4py/MPI\\..*\\.so", pathlib.Path(f"/proc/{pid}/maps").read_text()))
    time.sleep(0.02)
while pathlib.Path(f"/proc/{pid}").exists():
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
"""


@program(
    succeeds=False,
    expect=[rf"{SECOND}MPI_Init of rank 0 of 2", "a rank ended with status 130"],
    forbid=["Traceback"],
    tensorpipe=NO_SIGNALS,
)
def interrupted_twice_in_mpi_init(world: World) -> None:
    """The other rank does not come."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if world.rank == 0:
        with subprocess.Popen([sys.executable, "-I", "-S", "-c", INTERRUPT_OFTEN, str(os.getpid())]):
            world.init()
    world.wait("never")
