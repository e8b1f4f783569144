"""What the commands make of what they have found, and how they try what may end a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tools_check import MPICH, OPEN_MPI, check
from unit_fakes import RunPython

from torch_rpc_mpi.tools import heat_map, memory, pairs, report, self_test, software
from torch_rpc_mpi.tools.facts import Fact, Resources, Status, size_text
from torch_rpc_mpi.tools.pairs import Pair
from torch_rpc_mpi.tools.place import Place
from torch_rpc_mpi.tools.trial import Trial

GIB = 1 << 30
OK, NOTE, WARNING, PROBLEM = Status

# What a child that opens MPI tells.
FOUND = {"built_for": "2.13.0", "resources": [2, GIB, None, 1.5, None], "mpi4py": "4.1.2 in /env"}
OPENED = {"library": MPICH, "file": "/env/lib/libmpi.so.12", "abi": "mpich", "shim": "_mpi_shim_mpich.so"}
# What one tells that was in a session.
NO_HUGE_PAGES = memory.huge_pages("[never]").as_json()
RANKS = [
    {"host": "north", "cores": [0, 1], "files": 40, "threads": 8, "facts": []},
    {"host": "south", "cores": [0], "files": 41, "threads": 9, "facts": [NO_HUGE_PAGES]},
    {"host": "south", "cores": [0], "files": 41, "threads": 9, "facts": [NO_HUGE_PAGES]},
]
SESSION = {"thread_level": 3, "init_seconds": 0.5, "ranks": RANKS, "pairs": []}
HOSTS = ["north", "north", "south", "south", "south"]  # of the pairs


class TestSoftware:
    @pytest.mark.parametrize(
        ("library", "says", "status", "words"),
        [
            (MPICH, "/usr/bin/mpirun\nHYDRA build details:", OK, ["of MPICH"]),
            (MPICH, "/opt/mpirun\nIntel(R) MPI Library for Linux* OS, Version 2021.18", OK, ["Intel MPI"]),
            (
                MPICH,
                "/usr/bin/mpirun\nmpirun (Open MPI) 4.1.4",
                WARNING,
                ["but mpi4py has loaded MPICH"],
            ),
            (OPEN_MPI, "/usr/bin/mpirun\nHYDRA build details:", WARNING, ["start with Open MPI's own"]),
            (OPEN_MPI, None, NOTE, ["none on PATH"]),
            (MPICH, "/usr/bin/mpirun\nTimeoutExpired: …", NOTE, ["unknown MPI"]),
        ],
    )
    def test_launcher_on_path(self, library: str, says: str | None, status: Status, words: list[str]) -> None:
        check(software.launcher_on_path(library, says), status, *words)

    def test_a_library_that_opens(self) -> None:
        library = software.Library(Trial({**FOUND, **OPENED}, "library"))
        assert [fact.status for fact in library.facts()] == [OK] * 4
        assert library.facts()[2] == Fact("mpi_library", "MPICH Version: 5.0.2, /env/lib/libmpi.so.12")
        assert library.resources == Resources(2, GIB, None, 1.5, None)

    @pytest.mark.parametrize(
        ("trial", "key", "words"),
        [
            (Trial({}, "extension", "the process was killed by SIGSEGV"), "extension", ["SIGSEGV", "reinstall"]),
            (Trial({}, "extension", "it did not end within 60 s", "at x"), "extension", ["printed: at x", "reinstall"]),
            (Trial(FOUND, "mpi4py", "ImportError: no mpi4py. Install one"), "mpi4py", ["no mpi4py. Install one"]),
            (Trial(FOUND, "library", "RuntimeError: found no MPI: a: b"), "mpi_library", ["found no MPI: a: b"]),
        ],
    )
    def test_one_that_does_not(self, trial: Trial, key: str, words: list[str]) -> None:
        *before, failure = software.Library(trial).facts()
        assert all(fact.status is OK for fact in before)
        assert (failure.key, failure.status) == (key, PROBLEM)
        assert all(word in f"{failure.value} {failure.remedy}" for word in words), failure

    def test_a_launcher_of_another_mpi(self) -> None:
        library = software.Library(Trial({**FOUND, **OPENED, "refusal": "MPI will not learn of it. Start it with x"}))
        (fact,) = software.launch_facts(Place("mpirun", 0, 2), library, {})
        assert fact == Fact("launcher", "MPI will not learn of it. Start it with x", PROBLEM)

    def test_how_the_world_would_form(self) -> None:
        library = software.Library(Trial({**FOUND, **OPENED}))
        address = {"MASTER_ADDR": "north", "MASTER_PORT": "29500"}
        for place, environ, world, method in (
            (Place("mpirun", 0, 2), {}, "the launcher's", "needs no address"),
            (Place("torchrun", 0, 2, by_store=True), address, "through torch's store", "north:29500"),
            (Place(), {}, "this process alone", "MASTER_ADDR is not set"),
            (Place(), address, "this process alone", "north:29500"),
        ):
            facts = {fact.key: fact for fact in software.launch_facts(place, library, environ)}
            assert world in facts["world"].value
            assert method in facts["init_method"].value


def test_places() -> None:
    mpirun = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    slurm = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    assert Place.find(environ={}) == Place()
    assert Place.find(environ={}).alone
    under_mpirun = Place.find(environ=mpirun)
    assert (under_mpirun.rank, under_mpirun.size, under_mpirun.ranks_here, under_mpirun.by_store) == (1, 4, 2, False)
    assert Place.find(environ={**mpirun, **torchrun}) == Place("torchrun", 2, 3, 3, by_store=True)
    assert Place.find(environ=slurm) == Place("Slurm's srun", 1, 2, 2)
    assert Place.find((1, 2), environ=slurm) == Place("Slurm's srun", 1, 2, 2, by_store=True)


TRIALS = """
import json, os, signal, sys, time
from torch_rpc_mpi.tools import trial

def works(tell): tell({"a": 1}, "second"); tell({"b": [2]}, ""); print("nobody sees this")
def raises(tell): tell({}, "first"); raise ValueError("of this")
def crashes(tell): tell({"a": 1}, "first"); os.write(2, b"going down\\n"); os.kill(os.getpid(), signal.SIGSEGV)
def ends(tell): os._exit(16)
def hangs(tell): tell({}, "first"); time.sleep(600)

for body, limit in ((works, 60), (raises, 60), (crashes, 60), (ends, 60), (hangs, 1)):
    done = trial.run(body, limit)
    print(json.dumps([done.found, done.step, done.failure, done.said]))
"""


def test_trials(run_python: RunPython) -> None:
    """In a process of their own, as they are in the command: this one may have threads."""
    printed = run_python(TRIALS)
    works, raises, crashes, ends, hangs = map(json.loads, printed.splitlines())
    assert works[:3] == [{"a": 1, "b": [2]}, "second", ""]
    assert raises[:3] == [{}, "first", "ValueError: of this"]
    assert crashes[:3] == [{"a": 1}, "first", "the process was killed by SIGSEGV"]
    assert crashes[3].startswith("going down")
    assert "in crashes" in crashes[3]
    assert ends[:3] == [{}, "", "the process has ended with status 16"]
    assert hangs[:3] == [{}, "first", "it did not end within 1 s"]
    assert "in hangs" in hangs[3]


LOOK_UPS = """
import json, socket, time
from torch_rpc_mpi.tools import network

found = [network.resolve("localhost"), network.resolve("no.such.host.invalid")]
socket.getaddrinfo = lambda *arguments, **options: time.sleep(600)
print(json.dumps([*found, network.resolve("north", limit=0.5)]))
"""


def test_a_name_server_that_does_not_answer_is_not_waited_for(run_python: RunPython) -> None:
    localhost, unknown, silent = json.loads(run_python(LOOK_UPS))
    assert "127.0.0.1" in localhost
    assert unknown in ([], None)  # as the system's name servers have it
    assert silent is None


class TestPairs:
    @pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
    def test_rounds(self, size: int) -> None:
        found = pairs.rounds(size)
        for met in found:
            ranks = [rank for pair in met for rank in pair]
            assert len(ranks) == len(set(ranks))
        every = {(first, second) for second in range(size) for first in range(second)}
        assert sorted(pair for met in found for pair in met) == sorted(every)

    def measured(self, change: Callable[[Pair], None]) -> list[Pair]:
        found = []
        for second in range(5):
            for first in range(second):
                near = HOSTS[first] == HOSTS[second]
                found.append(Pair(first, second, 20e-6 if near else 60e-6, 8e9 if near else 1e9))
        for pair in found:
            change(pair)
        pairs.mark_slow(found, HOSTS)
        return found

    def test_none_is_slow_of_its_kind(self) -> None:
        facts = pairs.verdicts(self.measured(lambda pair: None), HOSTS)
        assert [fact.key for fact in facts] == ["within_a_host", "across_hosts", "pairs"]
        assert "60 µs a call, 1.00 GB/s one way, median of 6 pairs" in facts[1].value

    def test_slow_ones_are_named(self) -> None:
        def change(pair: Pair) -> None:
            if pair.second == 4 and HOSTS[pair.first] == "north":
                pair.latency, pair.bandwidth = 900e-6, 0.1e9

        found = self.measured(change)
        assert [(pair.first, pair.second) for pair in found if pair.slow] == [(0, 4), (1, 4)]
        fact = pairs.verdicts(found, HOSTS)[-1]
        assert (fact.key, fact.status) == ("slow_pairs", WARNING)
        assert "rank 0 (north) with rank 4 (south): 900 µs, where the median is 60" in fact.value
        assert "0.10 GB/s, where the median is 1.00" in fact.value
        assert fact.value.endswith("rank 4 (south) is in all of them")

    def test_a_host_that_is_in_all_is_named(self) -> None:
        def change(pair: Pair) -> None:
            if HOSTS[pair.first] != HOSTS[pair.second]:
                pair.latency, pair.bandwidth, pair.error = None, None, "no answer"

        fact = pairs.verdicts(self.measured(change), HOSTS)[-1]
        assert (fact.key, fact.status) == ("broken_pairs", PROBLEM)
        assert "is in all of them" in fact.value

    def test_heat_map(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        heat_map.save(tmp_path / "map.png", [Pair(0, 1, error="no answer"), Pair(0, 2, 1e-5, 1e9)], ["a", "a", "b"])
        assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


class TestSession:
    def test_what_other_hosts_lack_is_told_once(self) -> None:
        facts = self_test.facts_of(Trial(SESSION, "the end"), Place("mpirun", 0, 3))
        assert [fact.key for fact in facts if fact.host == "south"] == ["huge_pages"]
        assert next(fact for fact in facts if fact.key == "ranks").value.startswith(
            "3 on 2 hosts (north: 0, south: 1 2)"
        )
        (placement,) = [fact for fact in facts if fact.key == "placement"]
        check(placement, WARNING, "2 ranks of host south share 1 core")
        assert facts[-1].status is OK

    def test_a_session_that_fails(self) -> None:
        done = Trial({}, "init_rpc", "the process has ended with status 16", "Abort: unsupported PMI")
        (fact,) = self_test.facts_of(done, Place("mpirun", 0, 3))
        check(fact, PROBLEM, "init_rpc failed: the process has ended with status 16; it printed: Abort", "the launcher")

    def test_a_session_for_which_there_is_no_shared_memory(self) -> None:
        (fact,) = self_test.facts_of(Trial({}, "init_rpc", "the process was killed by SIGBUS"), Place())
        check(fact, PROBLEM, "killed by SIGBUS", "make /dev/shm larger")

    def test_thread_level(self) -> None:
        fact = self_test.facts_of(Trial({"thread_level": 2, "init_seconds": 0.5}), Place())[0]
        check(fact, WARNING, "MPI_THREAD_SERIALIZED")


def test_a_fact_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    report.show([Fact("a", "b\tc\nd"), Fact("e", "f", Status.WARNING, "g\nh", host="south")], parsable=True)
    assert capsys.readouterr().out == "a\tb c d\tok\nsouth:e\tf\twarning\tg h\n"
    report.show([Fact("e", "f\n", Status.WARNING, "g")], parsable=False)
    assert capsys.readouterr().out.split() == ["warning", "e", "f", "--", "g"]


def test_tables_are_left_out_for_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    found = [Pair(0, 1, 20e-6, 8e9), Pair(0, 2, error="no answer"), Pair(1, 2, 1e-3, 1e9, slow="x")]
    report.print_matrices(found, list("abc"))
    assert [line.split() for line in capsys.readouterr().out.splitlines()[-3:]] == [
        ["0", "-", "20", "broken", "a"],
        ["1", "8.00", "-", "1000!", "b"],
        ["2", "broken", "1.00!", "-", "c"],
    ]
    report.print_matrices([], ["a"] * 17)
    assert "17 ranks is left out" in capsys.readouterr().out


def test_sizes() -> None:
    assert [size_text(size) for size in (0, 1023, 1024, 5 << 20, 3 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "5.0 MiB",
        "3072.0 GiB",
    ]
