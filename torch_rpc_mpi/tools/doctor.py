"""``torch-rpc-mpi doctor``: what would run here and whether it does, one fact a line."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import _system
from . import devices, heat_map, report, self_test, trial
from .devices import Devices
from .facts import Fact, Status
from .host import host_facts
from .network import network_facts
from .pairs import Pair
from .place import Place
from .software import Library, launch_facts, package_facts
from .trial import Tell

_READ_LIMIT = 10.0  # seconds
_NEEDED = ("torch", "backend", "options", "extension", "mpi4py", "mpi_library", "launcher")  # for a session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--parsable", action="store_true", help="lines of key, value, status and perhaps a remedy, between tabs")
    add("--json", action="store_true", help="one JSON document, with the figures of every pair of ranks")
    add("--plot", type=Path, metavar="FILE", help="a heat map of the pairs (needs matplotlib)")
    add("--no-session", action="store_true", help="look only: no MPI_Init, no calls")
    add("--timeout", type=float, default=30.0, metavar="S", help="seconds to wait for other ranks (default 30)")


def main(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 1 if something will not work."""
    place = Place.find()
    examination = _Examination(place, arguments)
    signal.signal(signal.SIGTERM, examination.end_early)
    facts = examination.look()
    if not arguments.no_session:
        examination.try_it(facts)
    return examination.finish()


class _Examination:
    """The facts as they are found, which rank 0 shows."""

    def __init__(self, place: Place, arguments: argparse.Namespace) -> None:
        self._place, self._arguments = place, arguments
        self._facts: list[Fact] = []
        self._pairs: list[Pair] = []
        self._hosts: list[str] = []
        self._devices = Devices()
        self._device_paths: list[dict[str, Any]] = []
        self._print = report.printer(arguments.parsable)

    @property
    def _reports(self) -> bool:
        return self._place.rank == 0

    def _add(self, facts: Sequence[Fact]) -> None:
        self._facts += facts
        if self._reports and not self._arguments.json:
            self._print(facts)

    def look(self) -> list[Fact]:
        """What can be seen without MPI_Init."""
        self._add(package_facts())
        library = Library.open()
        self._add(library.facts())
        self._place = Place.find(library.place)
        self._look_with(lambda: launch_facts(self._place, library), "launcher")
        self._look_with(lambda: host_facts(self._place, library.text, library.resources, _children_read()), "host")
        self._look_with(lambda: network_facts(self._place, library.text), "network")
        self._look_with(self._look_at_devices, "devices")
        return self._facts

    def _look_at_devices(self) -> list[Fact]:
        looked = devices.look()
        self._devices = devices.found_by(looked)
        return devices.facts(looked, self._place)

    def _look_with(self, look: Callable[[], list[Fact]], what: str) -> None:
        """A system that has not what is looked for is a fact, too."""
        try:
            self._add(look())
        except Exception as error:
            self._add([Fact(what, f"could not be looked at: {type(error).__name__}: {error}", Status.NOTE)])

    def try_it(self, facts: Sequence[Fact]) -> None:
        """A session of all ranks, if there can be one."""
        keys = [fact.key for fact in facts if fact.status is Status.PROBLEM]
        if any(key in _NEEDED for key in keys):
            self._add([Fact("session", f"not tried, because of {', '.join(keys)}", Status.NOTE)])
            return
        done = self_test.run(self._place, facts, self._devices, self._arguments.timeout)
        self._pairs = [Pair(**pair) for pair in done.found.get("pairs", [])]
        self._hosts = [rank["host"] for rank in done.found.get("ranks", [])]
        self._device_paths = done.found.get("device_paths", [])
        found = self_test.facts_of(done, self._place)
        self._add(found)
        if done.failure and not self._reports:
            if done.step == "init_rpc":  # rank 0 has nobody to ask
                where = f"rank {self._place.rank} on {socket.gethostname()}"
                print(f"{where}: {found[-1].value}", file=sys.stderr, flush=True)
            self._wait_for_the_report()

    def _wait_for_the_report(self) -> None:
        """Until the launcher ends this process, as it does when rank 0 has reported a problem and ended.

        The other way round it would end rank 0 before that: this rank's MPI has not said goodbye to it.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.sigtimedwait({signal.SIGTERM}, self_test.limit_of(self._place, self._arguments.timeout))

    def finish(self) -> int:
        if not self._reports:
            return 0  # a launcher might end rank 0, which finds the same, before it has printed that
        failed = any(fact.status is Status.PROBLEM for fact in self._facts)
        arguments = self._arguments
        if arguments.plot is not None and self._pairs:
            self._add([self._plot(arguments.plot)])
        if arguments.json:
            about = {"host": socket.gethostname(), "works": not failed}
            report.print_json(self._facts, about, self._pairs, self._hosts, self._device_paths)
        elif self._pairs and not arguments.parsable:
            report.print_matrices(self._pairs, self._hosts)
        return int(failed)

    def _plot(self, path: Path) -> Fact:
        try:
            heat_map.save(path, self._pairs, self._hosts)
        except ImportError as error:
            return Fact("plot", f"none: {error}", Status.WARNING, "pip install 'torch_rpc_mpi[demo]'")
        except OSError as error:
            return Fact("plot", f"none: {error}", Status.WARNING, "give a file that can be written")
        return Fact("plot", str(path))

    def end_early(self, *signal_and_frame: object) -> None:
        """By a launcher that has lost another rank."""
        remedy = "see what other ranks have printed"
        self._add([Fact("session", "ended from outside, by SIGTERM", Status.PROBLEM, remedy)])
        os._exit(self.finish())


def _children_read() -> bool:
    """Whether a child of this process may read its memory, as ranks of a host read each other's."""

    def read(tell: Tell) -> None:
        tell({"read": _system.can_read_memory(os.getppid())}, "")

    return bool(trial.run(read, _READ_LIMIT).found.get("read"))
