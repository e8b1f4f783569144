"""Programs that end, or fail to begin, in a special way: each has a launch of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mpi4py
import pytest
import torch
import torch.distributed.rpc as rpc
from cases_calls import APIS, identity
from cases_errors import RefusesToArrive
from cases_rref import CREATE, Account, fetch
from cases_session import AT_ONCE, check_calls
from cases_timeouts import ran_out
from functions_table import Call, Ours
from harness import WAIT_LIMIT, Event, World, equal, eventually, program, signal_and_wait, wait, world

CRASHED = ["terminate called", "Fatal Python error", r"a rank ended with status (132|134|136|139)", "Assertion"]
ABORTS = "it aborts when the interpreter ends under it"
INIT_TIMEOUT = "it has no time limit of its own for that"
FIRST_AGENT = "torch's RRef context keeps the first session's agent, which is gone then"

# A wheel of mpi4py has an extension for each ABI, and an ABI's name in the files' names.
MPI4PY_IS_LINKED = Path(mpi4py.__file__).with_name(f"MPI{sysconfig.get_config_var('EXT_SUFFIX')}").exists()

kept: list[object] = []  # what is alive when the interpreter ends

# RRefs and the end of a session. Not cases: torch has one RRef context for the life of a process, and what goes wrong
# in it stays wrong.


@program(any_world=True)
def shutdown_ignores_living_rrefs(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, identity, args=(1,))
    equal(rref.to_here(), 1)
    rpc.shutdown()
    with pytest.raises(RuntimeError, match=r"Cannot call to_here\(\) on it after deletion"):
        rref.to_here()


@program(any_world=True)
def shutdown_reports_leaks_when_asked_to(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, identity, args=(1,))
    equal(rref.to_here(), 1)
    world.barrier()
    rpc.api._ignore_rref_leak = False
    # Graceful shutdown would delete the RRefs for the user first, and so find no leak.
    rpc.api._delete_all_user_and_unforked_owner_rrefs = lambda: None
    with pytest.raises(RuntimeError, match="Leaking RRef"):
        rpc.shutdown()
    assert not rpc.api._is_current_rpc_agent_set()


@program(any_world=True)
def shutdown_finds_no_leak_when_all_is_deleted(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, Account, args=(1,))
    equal(rref.rpc_sync().deposit(1), 2)
    del rref
    rpc.api._ignore_rref_leak = False
    rpc.shutdown()


@program(any_world=True, tensorpipe="only the timeout ends to_here(), and shutdown waits 100 s for the RRef")
def remote_calls_that_cannot_be_read(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, identity, args=([torch.ones(50_000), RefusesToArrive()],))
    for wait_for in (rref._get_future().wait, rref.to_here):
        with pytest.raises(Exception, match="I do not arrive"):
            wait_for()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    del rref
    rpc.shutdown()


@program(any_world=True, tensorpipe="rpc.remote() itself raises there if the error is early")
def rrefs_at_one_who_left(world: World) -> None:
    """The call fails at once, but the error is the RRef's: the caller has one, and a profile ends as it should."""
    world.init()
    world.barrier()
    if world.rank == 1:
        rpc.shutdown(graceful=False)
    world.barrier()
    if world.rank == 0:
        for create in CREATE.values():
            rref = create(world.name(1))
            with pytest.raises(RuntimeError, match=r"worker1.*has left"):
                rref._get_future().wait()
            with pytest.raises(RuntimeError, match=r"worker1.*has left"):
                rref.to_here()
        rpc.shutdown(graceful=False)


def known_to_have_run_out(rref: Any) -> bool:
    """torch tells the RRef after it has told those who wait for the future."""
    with pytest.raises(RuntimeError) as caught:
        rref.to_here(timeout=0.2)
    return "RRef creation via rpc.remote() timed out" in str(caught.value)


@program(any_world=True, size=3)
def creation_of_rrefs_that_runs_out(world: World) -> None:
    world.init()
    go = world.event("go")
    dst = rpc.get_worker_info(world.next)
    # One for each rank: torch's own tells all later RRefs' failures to the first one.
    if world.rank == 1:
        rref = Call("udf", wait, (go,), timeout=0.1).create(Ours, dst)
    else:
        rref = rpc.remote(dst, wait, args=(go,), timeout=0.1)
    with pytest.raises(RuntimeError, match=ran_out(100)):
        rref._get_future().wait()
    eventually(lambda: known_to_have_run_out(rref), "the RRef knows of the failure")
    with pytest.raises(RuntimeError, match=r"RRef creation via rpc.remote\(\) timed out"):
        rpc.rpc_sync(world.name(world.rank + 2), fetch, args=(rref,))
    go.signal()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    world.barrier()
    rpc.shutdown(graceful=False)  # torch's would wait for what may still be made


@contextlib.contextmanager
def standard_error() -> Iterator[Callable[[], str]]:
    """What the process writes to it, also in C++; in the end it goes there."""
    with tempfile.TemporaryFile() as file:
        original = os.dup(2)
        os.dup2(file.fileno(), 2)
        written = functools.partial(os.pread, file.fileno(), 1 << 20, 0)
        try:
            yield lambda: written().decode()
        finally:
            os.dup2(original, 2)
            os.close(original)
            sys.stderr.write(written().decode())


@program(any_world=True, size=4)
def rrefs_whose_owners_do_not_answer(world: World) -> None:
    """Rank 1 tells two owners in vain that it has RRefs of theirs: rank 2 has left, and all threads of rank 3 are busy.

    After six times, in 13 s, torch throws in a callback of a future.
    """
    world.init(**{1: {"rpc_timeout": 0.2}, 3: {"num_worker_threads": 1}}.get(world.rank, {}))
    if world.rank == 0:
        rrefs = [rpc.remote(world.name(owner), identity, args=(1,)) for owner in (2, 3)]
        equal([rref.to_here() for rref in rrefs], [1, 1])
        arrived, go = world.event("arrived"), world.event("go")
        busy = rpc.rpc_async(world.name(3), signal_and_wait, args=(arrived, go))
        arrived.wait()
    world.barrier()
    if world.rank == 2:
        rpc.shutdown(graceful=False)
        world.barrier()
        world.wait("over")
        return
    if world.rank == 0:
        world.barrier()
        for rref in rrefs:
            with pytest.raises(RuntimeError, match=ran_out(500)):
                rpc.rpc_sync(world.name(1), identity, args=(rref,), timeout=0.5)
        world.wait("over")
        equal(rpc.rpc_sync(world.name(1), identity, args=(1,)), 1)  # it lives
        go.signal("done")
        equal(busy.wait(), "done")
        world.signal("seen")
    elif world.rank == 1:
        gives_up = "after the specified number of max retries"
        with standard_error() as written:
            world.barrier()
            eventually(lambda: written().count(gives_up) == 2, "torch gives up twice", timeout=40)
        world.signal("over")
        world.wait("seen")
    else:
        world.barrier()
        world.wait("seen")
    rpc.shutdown(graceful=False)


@program(any_world=True, tensorpipe=FIRST_AGENT)
def rrefs_in_a_later_session(world: World) -> None:
    for _ in range(2):
        world.init()
        account = rpc.remote(world.next, Account, args=(1,))
        equal(account.rpc_sync().deposit(1), 2)
        equal(rpc.rpc_sync(world.next, fetch, args=(rpc.RRef(7),)), 7)
        del account
        rpc.shutdown()


@rpc.functions.async_execution
def never() -> torch.futures.Future:
    return torch.futures.Future()


@program(any_world=True, tensorpipe=FIRST_AGENT)
def unconfirmed_rrefs_of_an_earlier_session(world: World) -> None:
    """A graceful shutdown, which gives unconfirmed RRefs 100 s, waits for those of its own session only."""
    world.init()
    unconfirmed = rpc.remote(world.next, never)
    world.barrier()
    rpc.shutdown(graceful=False)
    world.barrier()
    world.init()
    account = rpc.remote(world.next, Account, args=(1,))
    equal(account.rpc_sync().deposit(1), 2)
    equal(rpc.rpc_sync(world.next, fetch, args=(rpc.RRef(7),)), 7)
    del account
    world.barrier()
    begin = time.monotonic()
    rpc.shutdown()
    assert time.monotonic() - begin < 2 * AT_ONCE
    del unconfirmed


# How it begins


@program(tensorpipe="about this backend")
def literally_as_documented(world: World) -> None:
    """Nothing of this backend is imported by the program."""
    rpc.init_rpc(world.name(), backend="MPI")
    assert type(rpc.api._get_current_rpc_agent()).__module__.startswith("torch_rpc_mpi")
    equal(rpc.rpc_sync(world.next, torch.add, args=(torch.ones(2), 1)), torch.full((2,), 2.0))
    rpc.shutdown()


@program(tensorpipe="about this backend")
def mpi_started_by_the_user(world: World) -> None:
    from mpi4py import MPI

    equal(MPI.COMM_WORLD.allreduce(1), world.size)
    world.init()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    rpc.shutdown()
    equal(MPI.COMM_WORLD.allreduce(1), world.size)


def world_rank() -> int:
    return world().rank


@program(size=6, tensorpipe="about this backend")
def groups_of_their_own(here: World) -> None:
    """Two groups at once, with the same names, and ranks of their own (which, for torch, a process has for life)."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Split(here.rank % 2, -here.rank)
    here.init(f"member{comm.rank}", comm=comm)
    equal((rpc.get_worker_info().id, rpc.get_worker_info().name), (comm.rank, f"member{comm.rank}"))
    members = comm.allgather(here.rank)
    equal([rpc.rpc_sync(f"member{rank}", world_rank) for rank in range(comm.size)], members)
    rpc.shutdown()
    here.init(f"again{comm.rank}", comm=comm)
    equal([rpc.rpc_sync(rank, world_rank) for rank in range(comm.size)], members)
    rpc.shutdown()


@program(size=4, tensorpipe="about this backend")
def a_group_of_some_ranks(here: World) -> None:
    """The others take no part, and may leave early."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Split(0 if here.rank in (1, 3) else MPI.UNDEFINED)
    if comm == MPI.COMM_NULL:
        return
    here.init(comm=comm)
    equal([rpc.rpc_sync(f"worker{rank}", world_rank) for rank in (1, 3)], [1, 3])
    rpc.shutdown()


@program(launcher=False, succeeds=False, expect=["mpirun"], tensorpipe="it needs no launcher")
def no_launcher(world: World) -> None:
    rpc.init_rpc("worker0", backend="MPI")


@program(launcher=False, tensorpipe="it needs no launcher")
def no_launcher_for_one_rank(world: World) -> None:
    rpc.init_rpc("worker0", backend="MPI", rank=0, world_size=1)
    equal(rpc.rpc_sync("worker0", identity, args=(1,)), 1)
    rpc.shutdown()


@program(
    launcher=False,
    succeeds=False,
    expect=["no MPI library", "pip install", "MPI4PY_LIBMPI"],
    env={"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"},
    tensorpipe="it needs no MPI",
    skip="this mpi4py is linked to one MPI and does not search" if MPI4PY_IS_LINKED else None,
)
def no_mpi_library(world: World) -> None:
    rpc.init_rpc("worker0", backend="MPI")


@program(succeeds=False, expect=["(?i)thread.level|MPI_THREAD"], tensorpipe="it needs no MPI")
def thread_level_too_low(world: World) -> None:
    import mpi4py

    mpi4py.rc.thread_level = "funneled"
    from mpi4py import MPI

    if MPI.Query_thread() > MPI.THREAD_FUNNELED:
        raise RuntimeError("MPI_THREAD_FUNNELED asked for, but this MPI gives more")
    world.init()


@program(succeeds=False, expect=["(?i)finali"], tensorpipe="it needs no MPI")
def mpi_finalised_before(world: World) -> None:
    from mpi4py import MPI

    MPI.Finalize()
    world.init()


@program(
    size=4, succeeds=None, expect=[r"rank 0 saw .*ranks? 3\b", r"rank 2 saw .*ranks? 3\b"], tensorpipe=INIT_TIMEOUT
)
def missing_worker(world: World) -> None:
    """All ranks are in MPI, but one never calls init_rpc."""
    from mpi4py import MPI

    equal(MPI.COMM_WORLD.allreduce(1), world.size)
    if world.rank == 3:
        for rank in range(3):
            world.wait(f"rank {rank} gave up")
        return
    with pytest.raises((RuntimeError, TimeoutError)) as caught:
        world.init(init_timeout=3)
    seen = " ".join(str(caught.value).split())
    print(f"rank {world.rank} saw {seen}", flush=True)  # in one piece, since others print as well
    world.signal(f"rank {world.rank} gave up")


@program(size=2, succeeds=False, expect=["MPI_Init", "init_timeout"], tensorpipe=INIT_TIMEOUT)
def missing_worker_in_mpi_init(world: World) -> None:
    """One rank never starts MPI; the launcher ends it with the others."""
    if world.rank == 1:
        world.wait("never")
    world.init(init_timeout=3)


@program(size=4, succeeds=False, expect=["must match", "init_timeout"], tensorpipe=INIT_TIMEOUT)
def bad_name_on_one_rank(world: World) -> None:
    """Found before MPI starts; the others do not wait for that rank without a limit."""
    world.init("a bad name" if world.rank == 1 else None, init_timeout=5)


@program(size=2, tensorpipe=INIT_TIMEOUT)
def longest_init_timeout(world: World) -> None:
    """It is no limit, and not one that is over at once."""
    world.init(init_timeout=sys.float_info.max)
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    rpc.shutdown()


# How it ends


@program(size=4)
def exit_after_shutdown(world: World) -> None:
    world.init()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    rpc.shutdown()


@program(size=4, forbid=CRASHED, tensorpipe=ABORTS)
def exit_without_shutdown(world: World) -> None:
    world.init()
    rref = rpc.remote(world.next, identity, args=(1,))
    equal(rref.to_here(), 1)
    kept.append(rref)
    world.barrier()


def leave_early(world: World) -> bool:
    """Ranks 0 and 2 have calls pending at rank 1. True on rank 1, which is to leave while it runs them."""
    world.init()
    started, never = world.event("started"), world.event("never")
    if world.rank == 1:
        world.barrier()
        return True
    pending = rpc.rpc_async(world.name(1), signal_and_wait, args=(started, never))
    started.wait()
    world.barrier()
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        pending.wait()
    assert time.monotonic() - begin < AT_ONCE, "the pending call failed only by its timeout"
    if world.mpi:
        assert world.name(1) in str(caught.value), caught.value
    for api in APIS.values():
        begin = time.monotonic()
        with pytest.raises(RuntimeError):
            api(world.name(1), identity, args=(1,))
        assert time.monotonic() - begin < AT_ONCE, "the call failed only by its timeout"
    equal(rpc.rpc_sync(world.name(2 - world.rank), identity, args=(1,)), 1)
    world.signal(f"rank {world.rank} is done")
    world.wait(f"rank {2 - world.rank} is done")
    rpc.shutdown(graceful=False)
    print(f"rank {world.rank} survived", flush=True)
    return False


SURVIVED = ["rank 0 survived", "rank 2 survived"]


@program(size=3, expect=SURVIVED, forbid=CRASHED)
def one_exits_without_shutdown(world: World) -> None:
    leave_early(world)


@program(size=3, launcherless=True, succeeds=False, expect=[*SURVIVED, "KeyboardInterrupt"], forbid=CRASHED)
def keyboard_interrupt_in_one_rank(world: World) -> None:
    if leave_early(world):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in the background
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()


@program(size=3, launcherless=True, succeeds=False, expect=[*SURVIVED, "ValueError: on purpose"], forbid=CRASHED)
def exception_in_one_rank(world: World) -> None:
    if leave_early(world):
        raise ValueError("on purpose")


@program(size=3, tensorpipe="it waits for the one who left without a limit")
def graceful_shutdown_without_one_who_left(world: World) -> None:
    """It may raise, as not everyone came, but it ends the session in time, and the next one is as good as the first."""
    world.init()
    check_calls(world)
    world.barrier()
    if world.rank == 1:
        rpc.shutdown(graceful=False)
    world.barrier()
    if world.rank != 1:
        begin = time.monotonic()
        try:
            rpc.shutdown(timeout=5)
        except RuntimeError as error:
            assert world.name(1) in str(error)  # noqa: PT017 (whether it raises is torch's affair)
        assert time.monotonic() - begin < 5 + AT_ONCE
        assert not rpc.api._is_current_rpc_agent_set()
    world.barrier()
    world.init()
    check_calls(world)
    rpc.shutdown()


@program(limit=150, forbid=CRASHED, tensorpipe=ABORTS)
def shutdown_while_threads_call(world: World) -> None:
    """A call made in the moment in which RPC ends is refused or fails, as any other: nobody waits for ever."""
    for leaving in ({0}, {1}, {0, 1}):
        world.init()
        threads = [Caller(world.next) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            assert thread.called.wait(WAIT_LIMIT)
        world.barrier()
        if world.rank in leaving:
            rpc.shutdown(graceful=False)
        deadline = time.monotonic() + 2 * AT_ONCE
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0))
        waiting = sum(thread.is_alive() for thread in threads)
        assert waiting == 0, f"{waiting} threads still wait for an answer (leaving: {leaving})"
        equal([type(thread.error) for thread in threads], [RuntimeError] * len(threads))
        world.barrier(2 * WAIT_LIMIT)
        if world.rank not in leaving:
            rpc.shutdown(graceful=False)
        world.barrier()


class Caller(threading.Thread):
    """Calls another worker until that fails."""

    def __init__(self, to: str) -> None:
        super().__init__(daemon=True)  # one that hangs must not hold up the end of the process
        self.to, self.called, self.error = to, threading.Event(), None

    def run(self) -> None:
        try:
            while True:
                equal(rpc.rpc_sync(self.to, identity, args=(1,)), 1)
                self.called.set()
        except Exception as error:
            self.error = error


@program(any_world=True)
def shutdown_waits_for_callbacks(world: World) -> None:
    """Those of answers that came before it, which may make calls, to workers that are shutting down as well."""
    world.init()
    answer, entered, go = world.event("answer"), threading.Event(), threading.Event()

    def call_again(future: torch.futures.Future) -> int:
        entered.set()
        assert go.wait(WAIT_LIMIT)
        return rpc.rpc_sync(world.next, identity, args=(future.wait(),))

    future = rpc.rpc_async(world.next, wait, args=(answer,)).then(call_again)
    answer.signal("answered")
    assert entered.wait(WAIT_LIMIT)
    world.barrier()
    threading.Timer(1.5, go.set).start()  # far longer than a shutdown that waits for nothing
    rpc.shutdown()
    assert future.done()
    equal(future.wait(), "answered")


@program(size=2, forbid=CRASHED, tensorpipe=ABORTS)
def exit_while_calls_are_under_way(world: World) -> None:
    """Requests come in while the interpreter ends."""
    world.init()
    futures = [rpc.rpc_async(world.next, identity, args=(torch.ones(10_000),)) for _ in range(500)]
    world.barrier()
    kept.append(futures)


@program(size=2, forbid=CRASHED, tensorpipe=ABORTS)
def exit_from_within_a_session_thread(world: World) -> None:
    """sys.exit in the main thread while others wait for answers."""
    world.init()
    never = world.event("never")
    threading.Thread(target=wait_and_ignore, args=(world, never), daemon=True).start()
    world.barrier()
    sys.exit(0)


@program(size=2, forbid=CRASHED, tensorpipe=ABORTS)
def exit_while_daemon_threads_call(world: World) -> None:
    """Python is gone when some of them have their answers, or want to call again."""
    world.init()
    for _ in range(16):
        threading.Thread(target=call_and_ignore, args=(world,), daemon=True).start()
    world.barrier()
    sys.exit(0)


def call_and_ignore(world: World) -> None:
    while True:
        with contextlib.suppress(RuntimeError):
            rpc.rpc_sync(world.next, identity, args=(1,))


def wait_and_ignore(world: World, never: Event) -> None:
    with contextlib.suppress(RuntimeError):
        rpc.rpc_sync(world.next, signal_and_wait, args=(world.event("started"), never))
