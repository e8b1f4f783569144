"""One rank: runs cases, or one program. Started by launcher.py.

    python ranks.py cases MODULE:CASE...
    python ranks.py program MODULE PROGRAM
    python ranks.py main MODULE ARGUMENT...  a module with a main() of its own, as if it were the program
    python ranks.py script PATH ARGUMENT...  what `python PATH ARGUMENT...` does
    python ranks.py serve DESCRIPTOR         a process that forks such ranks: see fork_server.py

Cases write what happens to $RPC_TEST_SCRATCH/rankN.jsonl, one JSON object a line: {"pid"}, {"begin": case},
{"end": case, "error": traceback or null, "seconds"}. Their output goes to rankN.log, and so do the stacks of all
threads of a case that passes its limit; the launcher then sees no progress and ends the launch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import fork_server
import harness
import torch
import torch.distributed.rpc as rpc

EXIT_LIMIT = 30.0
STACKS_LIMIT = 5.0  # to write the stacks


class Recorder:
    """Writes one rank's results, complete lines only, so that a crash loses nothing before it."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1)  # noqa: SIM115 (open until the process ends)

    def write(self, **record: Any) -> None:
        self._file.write(json.dumps(record) + "\n")


def _report(error: BaseException) -> str:
    """The traceback, without this file's own frames at its top."""
    frames = error.__traceback__
    while frames and frames.tb_next and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frames)))


class Runner:
    """Runs cases one after the other, and keeps the RPC session that they ask for."""

    def __init__(self, world: harness.World, recorder: Recorder) -> None:
        self._world = world
        self._recorder = recorder
        self._options: dict[str, Any] | None = None  # of the session that is up

    def run(self, name: str) -> None:
        case = harness.find_case(name)
        error = self._guarded(name, case.limit, lambda: self._body(case))
        if error and not case.session:
            self._recover()

    def end(self) -> None:
        """Graceful shutdown is what every launch tests last; the launcher checks the exit status as well."""
        self._guarded("end", EXIT_LIMIT, self._close)

    def _recover(self) -> None:
        """Ends the session that a failed case leaves behind, so that the next case fails of its own faults only."""
        with contextlib.suppress(Exception):
            rpc.shutdown(graceful=False)
        # torch counts collective calls for the life of the process, and the ranks have made different numbers of them.
        rpc.api._all_gather_sequence_id.clear()

    def _guarded(self, name: str, limit: float, body: Callable[[], None]) -> str | None:
        self._recorder.write(begin=name)
        print(f"--- {name}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(limit)
        begin, error = time.perf_counter(), None
        self._world.enter(name)
        try:
            body()
        except (
            BaseException
        ) as raised:  # a KeyboardInterrupt or SystemExit here is the case's failure, not the runner's
            error = _report(raised)
            self._world.fail()
        self._world.enter(f"{name}/after")
        together = True
        try:
            self._world.barrier(limit + STACKS_LIMIT)
        except Exception as raised:
            error, together = error or _report(raised), False
        faulthandler.cancel_dump_traceback_later()
        self._recorder.write(end=name, error=error, seconds=round(time.perf_counter() - begin, 3))
        if not together:
            # A rank hangs, and has written its stacks. The next cases need a launch in which they all are there.
            os._exit(1)
        return error

    def _body(self, case: harness.Case) -> None:
        options = dict(case.options) if case.session else None
        if options != self._options or (options is not None and not rpc.api._is_current_rpc_agent_set()):
            self._close()
            if options is not None:
                self._world.init(**options)
                self._options = options
        self._world.barrier()
        case.function(self._world, *case.arguments)

    def _close(self) -> None:
        self._options = None
        if rpc.api._is_current_rpc_agent_set():
            rpc.shutdown()


def run_cases(world: harness.World, names: list[str]) -> None:
    scratch = os.environ["RPC_TEST_SCRATCH"]
    log = os.open(f"{scratch}/rank{world.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    recorder = Recorder(f"{scratch}/rank{world.rank}.jsonl")
    recorder.write(pid=os.getpid())
    for module in dict.fromkeys(name.partition(":")[0] for name in names):
        importlib.import_module(module)
    runner = Runner(world, recorder)
    for name in names:
        runner.run(name)
    runner.end()
    faulthandler.dump_traceback_later(EXIT_LIMIT)


def run_program(world: harness.World, module: str, name: str) -> None:
    importlib.import_module(module)
    this = harness.PROGRAMS[module][name]
    faulthandler.dump_traceback_later(this.limit)
    world.enter(name)
    this.function(world)


def run_script(path: str, *arguments: str) -> None:
    sys.path[0] = os.path.dirname(path)
    with open(path) as file:
        program = file.read()
    fork_server.run_as_main(program, [path, *arguments], path)


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    arguments = sys.argv[1:]
    if arguments[0] == "serve":
        # What the first optimizer imports. That and the rest of torch live as long as the process: that a rank's
        # garbage collection, and with it its end, goes through them would cost more than the rest of a short rank.
        importlib.import_module("torch._dynamo")
        gc.collect()
        gc.freeze()
        arguments = fork_server.serve(arguments[1])
        if arguments is None:
            return
    kind, *names = arguments
    if kind == "main":
        sys.argv[1:] = names[1:]
        importlib.import_module(names[0]).main()
        return
    if kind == "script":
        run_script(*names)
        return
    sys.path.insert(0, os.environ["RPC_TEST_MODULES"])
    if kind == "program":
        run_program(harness.world(), *names)
    else:
        run_cases(harness.world(), names)


if __name__ == "__main__":
    main()
