"""What rank programs are made of: cases, programs, and the world they run in.

A *case* is a function that every rank of one launch runs. A launch takes seconds and a case milliseconds, so
many cases share one launch per world size, and by default one RPC session. A *program* has a launch of its
own, because it ends, or fails to begin, in a special way. `ranks.py` runs them, `launcher.py` starts that.

Ranks meet through events.py, never through the backend under test.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed.rpc as rpc
from events import EventClient

WAIT_LIMIT = 45.0

# Below the watchdog of a case, so that a lost answer is reported as torch's timeout error, with the call in its stack.
SESSION_OPTIONS = {"rpc_timeout": 40.0, "num_worker_threads": 16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One behaviour, run by every rank of a launch; see `case()` for the fields."""

    name: str
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    sizes: tuple[int, ...]
    session: bool
    options: Mapping[str, Any]
    limit: float
    large: bool
    launched: bool
    tensorpipe: str | None


@dataclasses.dataclass(frozen=True)
class Program:
    """One launch of its own; see `program()` for the fields."""

    name: str
    function: Callable[[World], None]
    size: int
    launcher: bool
    any_world: bool
    launcherless: bool
    succeeds: bool | None
    status: int | None
    expect: Sequence[str]
    forbid: Sequence[str]
    env: Mapping[str, str]
    limit: float
    tensorpipe: str | None
    skip: str | None


CASES: dict[str, dict[str, Case]] = {}
PROGRAMS: dict[str, dict[str, Program]] = {}


def find_case(name: str) -> Case:
    """The case of a name like MODULE:CASE; the module has been imported."""
    module, _, case_name = name.partition(":")
    return CASES[module][case_name]


def case(
    *,
    each: Mapping[str, Any] | Iterable[Any] | None = None,
    sizes: Sequence[int] = (4,),
    session: bool = True,
    options: Mapping[str, Any] | None = None,
    limit: float = 60.0,
    large: bool = False,
    launched: bool = False,
    tensorpipe: str | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function of the world as a case.

    Args:
        each: values (or id → value) to make one case each of; the value is the function's second argument.
        sizes: the world sizes that it runs at.
        session: False if the case itself calls `World.init()`; else RPC is up while it runs.
        options: backend options that differ from the shared session's; the runner makes a session with them.
        limit: seconds after which the case counts as hanging.
        large: the case needs several GiB.
        launched: it is about what MPI's launcher tells the ranks; the case is skipped in other worlds.
        tensorpipe: why TensorPipe cannot do this; the case is then skipped there.
    """
    if each is None:
        variants: dict[str, tuple[Any, ...]] = {"": ()}
    elif isinstance(each, Mapping):
        variants = {f"[{key}]": (value,) for key, value in each.items()}
    else:
        variants = {f"[{str(value).removeprefix('torch.')}]": (value,) for value in each}

    def register(function: Callable[..., None]) -> Callable[..., None]:
        registry = CASES.setdefault(function.__module__, {})
        for suffix, arguments in variants.items():
            name = function.__name__ + suffix
            registry[name] = Case(
                name,
                function,
                arguments,
                tuple(sizes),
                session,
                dict(options or {}),
                limit,
                large,
                launched,
                tensorpipe,
            )
        return function

    return register


def program(
    *,
    size: int = 2,
    launcher: bool = True,
    any_world: bool = False,
    launcherless: bool = False,
    succeeds: bool | None = True,
    status: int | None = None,
    expect: Sequence[str] = (),
    forbid: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    limit: float = 60.0,
    tensorpipe: str | None = None,
    skip: str | None = None,
) -> Callable[[Callable[[World], None]], Callable[[World], None]]:
    """Registers a function of the world as a program.

    Args:
        size: number of ranks.
        launcher: False to start it without mpirun.
        any_world: it is about nothing of MPI or its launcher, and only needs a process of its own.
        launcherless: as any_world, but under MPI's launcher something else happens.
        succeeds: whether the launch must end with status 0, or with another; None if either will do.
        status: the status with which the launch must end, instead.
        expect: regular expressions that its output must contain.
        forbid: regular expressions that its output must not contain.
        env: environment variables on top of the launcher's.
        limit: seconds after which the program counts as hanging.
        tensorpipe: why TensorPipe cannot do this.
        skip: why this environment cannot do this.
    """

    def register(function: Callable[[World], None]) -> Callable[[World], None]:
        name = function.__name__
        PROGRAMS.setdefault(function.__module__, {})[name] = Program(
            name,
            function,
            size,
            launcher,
            any_world or launcherless,
            launcherless,
            succeeds if status is None else None,
            status,
            expect,
            forbid,
            dict(env or {}),
            limit,
            tensorpipe,
            skip,
        )
        return function

    return register


class Aborted(Exception):
    """Another rank failed in this case, so what this rank waits for will not come."""


def _environment(*names: str, default: int) -> int:
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


class World:
    """The ranks of one launch, as one of them sees it."""

    def __init__(self) -> None:
        # The launchers' variables, not mpi4py: importing it would initialise MPI before init_rpc gets the chance.
        self.rank = _environment("RPC_TEST_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", default=0)
        self.size = _environment("RPC_TEST_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", default=1)
        self.backend = os.environ["RPC_TEST_BACKEND"]
        self._scope = ""
        self._barriers = 0
        self._sessions = 0
        self.events: Any = EventClient(os.environ["RPC_TEST_EVENTS"])

    @property
    def mpi(self) -> bool:
        return self.backend != "tensorpipe"

    @property
    def launched(self) -> bool:
        """Whether an MPI launcher started the ranks."""
        return self.backend == "mpi"

    def name(self, rank: int | None = None) -> str:
        """The worker name of a rank, counted round the world; of this one by default."""
        return f"worker{(self.rank if rank is None else rank) % self.size}"

    @property
    def next(self) -> str:
        return self.name(self.rank + 1)

    @property
    def others(self) -> list[str]:
        return [self.name(rank) for rank in range(self.size) if rank != self.rank]

    @property
    def everyone(self) -> list[str]:
        return [self.name(rank) for rank in range(self.size)]

    # RPC sessions

    def options(self, **options: Any) -> rpc.RpcBackendOptions:
        """The backend's options object, for a session of its own."""
        if self.mpi:
            import torch_rpc_mpi

            if not self.launched:
                options.setdefault("init_method", f"file://{os.environ['RPC_TEST_SCRATCH']}/store")
            return torch_rpc_mpi.MPIRpcBackendOptions(**options)
        options.setdefault("init_method", f"file://{os.environ['RPC_TEST_SCRATCH']}/session{self._sessions}")
        return rpc.TensorPipeRpcBackendOptions(**options)

    def init(self, name: str | None = None, **options: Any) -> None:
        """init_rpc as a user of the backend would write it."""
        self._sessions += 1
        name = name or self.name()
        backend_options = self.options(**{**SESSION_OPTIONS, **options})
        place = {} if self.launched else {"rank": self.rank, "world_size": self.size}
        backend = rpc.BackendType["MPI" if self.mpi else "TENSORPIPE"]
        rpc.init_rpc(name, backend, rpc_backend_options=backend_options, **place)

    # Events between ranks. A scope is the case that runs; every rank enters the same ones in the same order.

    def enter(self, scope: str) -> None:
        self._scope, self._barriers = scope, 0

    def event(self, key: str) -> Event:
        """An event of this rank alone."""
        return Event(self._scope, f"{key} of rank {self.rank}")

    def signal(self, key: str, value: str = "") -> None:
        """Signals an event that all ranks know by this name."""
        Event(self._scope, key).signal(value)

    def wait(self, key: str, timeout: float = WAIT_LIMIT) -> str:
        """Waits for an event that all ranks know by this name."""
        return Event(self._scope, key).wait(timeout)

    def barrier(self, timeout: float = WAIT_LIMIT) -> None:
        self._barriers += 1
        key = f"barrier {self._barriers}"
        if self.events("count", self._scope, key) == self.size:
            self.signal(key)
        self.wait(key, timeout)

    def fail(self) -> None:
        """Wakes the ranks that wait for this one in the current scope."""
        self.events("fail", self._scope, str(self.rank))


class Event(NamedTuple):
    """An event of one rank, that others can be told of: it keeps its scope wherever it is sent."""

    scope: str
    key: str

    def signal(self, value: str = "") -> None:
        world().events("signal", self.scope, self.key, value)

    def wait(self, timeout: float = WAIT_LIMIT) -> str:
        """Waits for the signal, and returns its value. Raises if another rank fails meanwhile."""
        kind, value = world().events("wait", self.scope, self.key, timeout)
        if kind == "failed":
            raise Aborted(f"rank {value} failed while this rank waited for {self.key!r}")
        if kind == "timeout":
            raise TimeoutError(f"no signal {self.key!r} within {timeout} s")
        return value


_worlds: list[World] = []


def world() -> World:
    """The world of this process."""
    if not _worlds:
        _worlds.append(World())
    return _worlds[0]


def wait(event: Event) -> str:
    """Blocks a callee until the event; a function for remote calls."""
    return event.wait()


def signal_and_wait(arrived: Event, event: Event) -> str:
    """Tells that the call has arrived, then blocks; a function for remote calls."""
    arrived.signal()
    return event.wait()


def debug_info(key: str) -> int:
    """A number of torch's RPC debug information; a function for remote calls."""
    return int(rpc._get_debug_info()[key])


def equal(actual: Any, expected: Any) -> None:
    """Asserts equality, exactly, and shows both sides; tensors may be anywhere in lists, tuples and dictionaries."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=False)
    elif isinstance(expected, (list, tuple)):
        assert type(actual) is type(expected), f"{type(actual)} instead of {type(expected)}"
        assert len(actual) == len(expected), f"{len(actual)} items instead of {len(expected)}"
        for left, right in zip(actual, expected, strict=True):
            equal(left, right)
    elif isinstance(expected, dict):
        equal(sorted(actual), sorted(expected))
        for key, value in expected.items():
            equal(actual[key], value)
    else:
        assert actual == expected, f"{actual!r} instead of {expected!r}"


def eventually(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """Polls what torch offers no event for (reference counts, counters)."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"still not after {timeout} s: {what}"
        time.sleep(0.002)


def shut_down_without_leaks(world: World) -> None:
    """Ends the session of every rank, none of which may know of an RRef any more."""
    gc.collect()
    for key in ("num_owner_rrefs", "num_pending_users", "num_forks"):
        eventually(lambda key=key: int(rpc._rref_context_get_debug_info()[key]) == 0, f"{key} is 0")
    world.barrier()
    rpc.api._ignore_rref_leak = False
    rpc.shutdown()


def in_threads(count: int, function: Callable[[int], Any]) -> list[Any]:
    """Runs function(0 … count-1) on as many threads at once, and raises the first error."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    together = threading.Barrier(count)

    def body(index: int) -> None:
        try:
            together.wait()
            results[index] = function(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
