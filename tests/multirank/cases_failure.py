"""Programs in which one rank fails, or ends MPI: under a launcher that ends the job, without one that rank alone."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed.rpc as rpc
from cases_calls import identity
from cases_exit import CRASHED, kept
from cases_session import AT_ONCE
from harness import World, equal, program, signal_and_wait

NO_JOB = "it knows of no launcher"
NOISE = [*CRASHED, "deletingUserRRef", "RRef Leaks", "frame #", "survived"]
ENDS_THE_JOB = (
    r"{error}\n(.*\n)*?torch_rpc_mpi: worker 'worker1' \(rank 1 on host \S+\) ends the job with status {status}, "
)


def ends_the_job(error: str, status: int = 1) -> list[str]:
    """What the output says: the traceback's last line, and who ends the job."""
    return [ENDS_THE_JOB.format(error=error, status=status) + f"because of this {error.partition(':')[0]}\n"]


def begin(world: World) -> bool:
    """RRefs live, and a call is under way. True on rank 1, which is to fail; the others wait, in two ways, for good."""
    world.init()
    rref = rpc.remote(world.next, identity, args=(1,))
    equal(rref.to_here(), 1)
    kept.append(rref)
    world.barrier()
    if world.rank == 1:
        return True
    if world.rank == 0:
        rpc.rpc_sync(world.name(1), signal_and_wait, args=(world.event("started"), world.event("never")), timeout=0)
    rpc.shutdown()
    print(f"rank {world.rank} survived", flush=True)
    return False


@program(size=3, succeeds=False, expect=ends_the_job("ValueError: on purpose"), forbid=NOISE, tensorpipe=NO_JOB)
def exception_ends_the_job(world: World) -> None:
    if begin(world):
        raise ValueError("on purpose")


@program(size=3, succeeds=False, expect=ends_the_job("KeyboardInterrupt", 130), forbid=NOISE, tensorpipe=NO_JOB)
def keyboard_interrupt_ends_the_job(world: World) -> None:
    if begin(world):
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()


@program(
    size=3,
    succeeds=False,
    expect=[*ends_the_job("ValueError: on purpose"), "the handler ran"],
    forbid=NOISE,
    tensorpipe=NO_JOB,
)
def exception_ends_the_job_though_a_handler_at_exit_waits(world: World) -> None:
    if begin(world):
        atexit.register(threading.Event().wait)
        atexit.register(print, "the handler ran", flush=True)
        raise ValueError("on purpose")


@program(size=3, succeeds=False, expect=ends_the_job("ValueError: on purpose"), forbid=NOISE, tensorpipe=NO_JOB)
def exception_ends_the_job_though_a_thread_waits(world: World) -> None:
    """Python joins it."""
    if begin(world):
        threading.Thread(target=threading.Event().wait).start()
        raise ValueError("on purpose")


@program(size=3, succeeds=False, expect=ends_the_job("ValueError: on purpose"), forbid=NOISE, tensorpipe=NO_JOB)
def exception_after_the_session_ends_the_job(world: World) -> None:
    world.init()
    rpc.shutdown()
    if world.rank == 1:
        raise ValueError("on purpose")
    world.wait("never")


@program(size=3, succeeds=False, expect=["worker1.*has left", "ends the job with status 1"], tensorpipe=NO_JOB)
def exit_of_one_ends_the_job_in_the_shutdown_of_the_others(world: World) -> None:
    world.init()
    world.barrier()
    if world.rank == 1:
        sys.exit(3)
    rpc.shutdown()


@program(size=2, tensorpipe=NO_JOB)
def exceptions_that_are_caught_end_nothing(world: World) -> None:
    world.init()
    with contextlib.suppress(ValueError):
        raise ValueError("on purpose")
    threading.Thread(target=int, args=("x",)).start()
    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    rpc.shutdown()


TERMINATED = (
    r"torch_rpc_mpi: worker 'worker{rank}' \(rank {rank} on host \S+\) is ended by SIGTERM: its job was cancelled or"
)


@program(size=3, succeeds=False, expect=[TERMINATED.format(rank=1)], forbid=NOISE, tensorpipe=NO_JOB)
def sigterm_of_one_rank_ends_the_job_with_a_line(world: World) -> None:
    if begin(world):
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()


@program(
    launcherless=True,
    succeeds=False,
    expect=[*(TERMINATED.format(rank=rank) for rank in range(2)), "(a rank ended with status 143\\n(.*\\n)*){2}"],
    forbid=NOISE[:-1],
    tensorpipe="it does not tell",
)
def sigterm_of_one_rank_ends_it_with_a_line(world: World) -> None:
    """And as it would without RPC, for who started it asks for the status. Also one that has lost a worker before."""
    world.init()
    if world.rank == 1:
        world.wait("end")
    else:
        sees_worker1_end(world)
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait()


@program(launcherless=True, succeeds=False, expect=["status 143"], forbid=["torch_rpc_mpi: "])
def sigterm_after_the_session_has_no_line(world: World) -> None:
    world.init()
    rpc.shutdown()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()


def has_a_session(world: World) -> None:
    world.init()
    world.signal(f"session of {world.rank}")
    threading.Event().wait()


@program(launcherless=True, expect=["(a rank ended with status 0\n(.*\n)*){2}"], forbid=["is ended by SIGTERM"])
def sigterm_of_multiprocessings_parent_has_no_line(world: World) -> None:
    """The parent knows why, as mp.spawn does when it ends the others after one that has failed."""
    child = multiprocessing.get_context("fork").Process(target=has_a_session, args=(world,))
    child.start()
    for rank in range(world.size):
        world.wait(f"session of {rank}")
    child.terminate()
    child.join()
    equal(child.exitcode, -signal.SIGTERM)


@contextlib.contextmanager
def names(*texts: str) -> Iterator[None]:
    """Expects an error at once, with these texts."""
    began = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        yield
    assert time.monotonic() - began < AT_ONCE
    assert all(text in str(caught.value) for text in texts), caught.value


def sees_worker1_end(world: World) -> None:
    """In the middle of a call to it, which is told to end when that runs."""
    started = world.event("started")
    pending = rpc.rpc_async(world.name(1), signal_and_wait, args=(started, world.event("never")))
    started.wait()
    world.signal("end")
    with names("worker1", "its process has ended"):
        pending.wait()


@program(
    size=3,
    launcherless=True,
    succeeds=False,
    expect=["rank 0 survived", "rank 2 survived", "ValueError: on purpose"],
    forbid=NOISE[:-1],
    tensorpipe="it does not tell",
)
def the_peers_are_told_of_an_exception(world: World) -> None:
    """At once, though the worker is executing a call; and nothing but that exception is shown."""
    world.init()
    started, never = world.event("started"), world.event("never")
    if world.rank == 1:
        kept.append(rpc.remote(world.next, identity, args=(1,)))
        equal(kept[-1].to_here(), 1)
        world.barrier()
        raise ValueError("on purpose")
    pending = rpc.rpc_async(world.name(1), signal_and_wait, args=(started, never))
    started.wait()
    world.barrier()
    with names("worker1", "it ended with ValueError: on purpose"):
        pending.wait()
    print(f"rank {world.rank} survived", flush=True)
    os._exit(0)  # torch would warn of the RRef of the one that is gone


FINALIZE = r"MPI.Finalize\(\) ends the RPC session of .*worker{rank}"


def finalize(world: World) -> None:
    world.init()
    from mpi4py import MPI  # which would initialise MPI itself if it came first

    equal(rpc.rpc_sync(world.next, identity, args=(1,)), 1)
    world.barrier()
    MPI.Finalize()
    with pytest.raises(RuntimeError, match="no longer running"):
        rpc.rpc_sync(world.next, identity, args=(1,))
    rpc.shutdown(graceful=False)


EXPECT_FINALIZE = [FINALIZE.format(rank=rank) for rank in range(2)]


@program(expect=EXPECT_FINALIZE, forbid=[*CRASHED, "UCX  WARN"], tensorpipe="it needs no MPI")
def finalising_mpi_in_a_session(world: World) -> None:
    finalize(world)


@program(launcherless=True, expect=EXPECT_FINALIZE, forbid=[*CRASHED, "UCX  WARN"], tensorpipe="it needs no MPI")
def finalising_mpi_in_a_session_without_a_launcher(world: World) -> None:
    finalize(world)


@program(launcherless=True, tensorpipe="it needs no MPI")
def finalising_mpi_of_a_world_without_a_launcher(world: World) -> None:
    """It waits for nobody."""
    world.init()
    rpc.shutdown()
    from mpi4py import MPI

    if world.rank == 1:
        MPI.Finalize()
        world.signal("finalised")
    else:
        world.wait("finalised")


@program(status=5, forbid=["survived", *CRASHED], tensorpipe="it needs no MPI")
def aborting_mpi_in_a_session(world: World) -> None:
    """The line about it is MPI's, and MPICH's launcher does not always show it."""
    world.init()
    from mpi4py import MPI

    world.barrier()
    if world.rank == 1:
        MPI.COMM_WORLD.Abort(5)
    world.wait("never")
    print("survived", flush=True)


@program(
    launcherless=True,
    succeeds=False,
    expect=[r"rank 1 of 2 \(pid \d+ on host \S+\) ends with status 5: MPI_Abort", "a rank ended with status 5"],
    tensorpipe="it needs no MPI",
)
def aborting_mpi_in_a_session_without_a_launcher(world: World) -> None:
    world.init()
    from mpi4py import MPI

    if world.rank == 1:
        world.wait("end")
        MPI.COMM_WORLD.Abort(5)
    sees_worker1_end(world)
    rpc.shutdown(graceful=False)
