"""What the doctor makes of hosts that are imagined: each problem with its status and its remedy."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from tools_check import MPICH, OPEN_MPI, check

from torch_rpc_mpi._system import Limits
from torch_rpc_mpi.tools import host, memory, network
from torch_rpc_mpi.tools.facts import Fact, Resources, Status
from torch_rpc_mpi.tools.network import Interface
from torch_rpc_mpi.tools.place import Place

MIB, GIB = 1 << 20, 1 << 30
OK, NOTE, WARNING, PROBLEM = Status
UNLIMITED = resource.RLIM_INFINITY
ETHERNET, DOCKER = Interface("eth0", "10.1.0.4", default=True), Interface("docker0", "172.17.0.1", bridge=True)


class TestHost:
    @pytest.mark.parametrize(
        ("free", "place", "status", "words"),
        [
            (None, Place(), PROBLEM, ["there is no /dev/shm", "mount"]),
            (64 * MIB, Place("mpirun", 0, 4, 4), OK, ["64.0 MiB free", "20.6 MiB for 4 ranks"]),
            (8 * MIB, Place("mpirun", 0, 4, 4), WARNING, ["--shm-size=41m", "at most 1 rank here"]),
            (8 * MIB, Place("torchrun", 0, 4, 4, by_store=True), PROBLEM, ["--shm-size=41m"]),
            (2 * MIB, Place("mpirun", 0, 4, 4), PROBLEM, ["--shm-size=41m"]),
            (8 * MIB, Place(), WARNING, ["for 8 ranks"]),  # as many as there are cores
            (8 * MIB, Place("mpirun", 0, 1, 1), OK, []),
        ],
    )
    def test_shared_memory(self, free: int | None, place: Place, status: Status, words: list[str]) -> None:
        check(memory.shared_memory(Limits(free), MPICH, place, 8), status, *words)

    def test_shared_memory_of_an_mpi_of_which_nothing_is_known(self) -> None:
        check(memory.shared_memory(Limits(MIB), OPEN_MPI, Place("mpirun", 0, 4, 4), 8), OK, "1.0 MiB free")

    def test_leftovers(self) -> None:
        files = {Path("/dev/shm/mpich_shm_1"): 3 * MIB, Path("/dev/shm/mpich_shm_2"): 2 * MIB}
        check(memory.leftovers(files, lambda file: True), OK, "none")
        check(memory.leftovers(files, files.keys().__contains__), OK, "none")
        left = memory.leftovers(files, lambda file: file.name.endswith("1"))
        check(left, NOTE, "1 file of MPI processes that have ended, 2.0 MiB, such as /dev/shm/mpich_shm_2", "remove")

    @pytest.mark.parametrize(
        ("own", "others", "yama", "filtered", "status", "words"),
        [
            (True, True, "", False, OK, ["allowed"]),
            (True, True, "1", False, OK, ["although Yama"]),  # root's capability
            (False, False, "", True, WARNING, ["seccomp", "--cap-add=SYS_PTRACE", "MPIR_CVAR_CH4_CMA_ENABLE=0"]),
            (False, False, "", False, WARNING, ["by this system"]),
            (True, False, "1", False, WARNING, ["ptrace_scope 1", "sysctl kernel.yama.ptrace_scope=0"]),
        ],
    )
    def test_memory_reading(
        self, own: bool, others: bool, yama: str, filtered: bool, status: Status, words: list[str]
    ) -> None:
        check(memory.memory_reading(own, others, yama, filtered), status, *words)

    @pytest.mark.parametrize(
        ("setting", "status", "words"),
        [
            ("always [madvise] never", OK, ["madvise"]),
            ("always madvise [never]", WARNING, ["never", "echo madvise"]),
            ("", NOTE, ["not known"]),
        ],
    )
    def test_huge_pages(self, setting: str, status: Status, words: list[str]) -> None:
        check(memory.huge_pages(setting), status, *words)

    @pytest.mark.parametrize(
        ("allowed", "before", "environ", "launched", "status", "words"),
        [
            (8, None, {}, False, OK, ["8 cores"]),
            (4, ("slurmstepd (pid 7)", 8), {}, True, NOTE, ["slurmstepd (pid 7), from which it was started, has 8"]),
            (1, ("prted (pid 7)", 8), {}, True, WARNING, ["prted", "--bind-to none", "--cpu-bind=none"]),
            (1, ("bash (pid 7)", 8), {}, False, WARNING, ["taskset"]),
            (1, ("bash (pid 7)", 8), {"OMP_PROC_BIND": "true"}, True, WARNING, ["unset OMP_PROC_BIND"]),
            (1, None, {}, False, WARNING, ["1 core;", "--cpus"]),
        ],
    )
    def test_affinity(
        self,
        allowed: int,
        before: tuple[str, int] | None,
        environ: dict[str, str],
        launched: bool,
        status: Status,
        words: list[str],
    ) -> None:
        check(host.affinity(allowed, before, environ, launched), status, *words)

    def test_cores(self) -> None:
        check(host.cores(Resources(2, cgroup_cores=1.5), 64), OK, "2 of the host's 64", "the cgroup allows 1.5")
        check(host.cores(Resources(), 64), NOTE, "not known")

    def test_load(self) -> None:
        check(host.load(7.5, 8), OK, "7.5 on 8 cores")
        check(host.load(9.25, 8), NOTE, "9.2 on 8 cores", "compete")

    @pytest.mark.parametrize(
        ("usable", "available", "ranks", "status", "words"),
        [
            (8 * GIB, 7 * GIB, 4, OK, ["8.0 GiB may be used of the host's 16.0 GiB (cgroup)"]),
            (GIB, 7 * GIB, 4, WARNING, ["256.0 MiB a rank", "--memory"]),
            (16 * GIB, GIB, 4, WARNING, ["256.0 MiB a rank"]),
            (None, None, None, NOTE, ["not known"]),
        ],
    )
    def test_memory(
        self, usable: int | None, available: int | None, ranks: int | None, status: Status, words: list[str]
    ) -> None:
        check(memory.usable_memory(Resources(8, usable), 16 * GIB, available, ranks), status, *words)

    @pytest.mark.parametrize(
        ("soft", "hard", "here", "others", "status", "words"),
        [
            (1024, 4096, 4, 0, OK, ["1024 (at most 4096)"]),
            (UNLIMITED, UNLIMITED, 128, 4096, OK, ["unlimited"]),
            (64, 4096, 4, 0, PROBLEM, ["ulimit -n 82"]),
            (1024, 1024, 64, 192, PROBLEM, ["a rank needs about 1978", "the administrator"]),
        ],
    )
    def test_open_files(self, soft: int, hard: int, here: int, others: int, status: Status, words: list[str]) -> None:
        check(host.open_files(soft, hard, here, others), status, *words)

    @pytest.mark.parametrize(
        ("of_user", "used", "cgroup", "ranks", "status", "words"),
        [
            (4096, 100, None, 4, OK, ["4096 for this user, who has 100"]),
            (1024, None, None, 64, OK, []),  # root
            (1024, 980, None, 4, PROBLEM, ["4 ranks may start 120", "ulimit -u"]),
            (4096, 100, 100, 4, WARNING, ["100 for the cgroup", "--pids-limit"]),
        ],
    )
    def test_threads(
        self, of_user: int, used: int | None, cgroup: int | None, ranks: int, status: Status, words: list[str]
    ) -> None:
        check(host.threads(of_user, used, cgroup, 30, ranks), status, *words)

    def test_locked_memory(self) -> None:
        check(memory.locked_memory(64 << 10, fast_network=False), OK, "64.0 KiB")
        check(memory.locked_memory(UNLIMITED, fast_network=True), OK, "unlimited")
        check(memory.locked_memory(64 << 10, fast_network=True), WARNING, "ulimit -l unlimited")

    def test_container(self, tmp_path: Path) -> None:
        check(host.container({}, tmp_path), OK, "none seen")
        (tmp_path / ".dockerenv").touch()
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/uid_map").write_text("         0       1000          1\n")
        (tmp_path / "proc/self/status").write_text("Name:\tpython\nSeccomp:\t2\n")
        found = host.container({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)
        check(found, NOTE, "Kubernetes, Docker", "user namespace", "seccomp")

    def test_this_host(self) -> None:
        found = host.host_facts(Place(), MPICH, Resources(2, GIB), others_read=True, environ={})
        assert len({fact.key for fact in found}) == len(found) == 12


class TestNetwork:
    @pytest.mark.parametrize(
        ("found", "environ", "several", "status", "words"),
        [
            ([ETHERNET], {}, True, OK, ["eth0 10.1.0.4 (default route)"]),
            (
                [DOCKER, ETHERNET],
                {},
                True,
                WARNING,
                ["docker0 172.17.0.1 (bridge)", "FI_TCP_IFACE=eth0"],
            ),
            ([DOCKER, ETHERNET], {}, False, NOTE, ["UCX_NET_DEVICES=eth0"]),
            ([DOCKER, ETHERNET], {"FI_TCP_IFACE": "eth0"}, True, OK, ["chosen by FI_TCP_IFACE=eth0"]),
            ([Interface("ib0", "10.2.0.4"), ETHERNET], {}, True, NOTE, ["FI_TCP_IFACE=eth0"]),
            ([], {}, False, NOTE, ["only the loopback"]),
        ],
    )
    def test_interfaces(
        self, found: list[Interface], environ: dict[str, str], several: bool, status: Status, words: list[str]
    ) -> None:
        check(network.interfaces(found, environ, several), status, *words)

    @pytest.mark.parametrize(
        ("name", "addresses", "status", "words"),
        [
            ("north", ["10.1.0.4"], OK, ["resolves to 10.1.0.4"]),
            ("north", ["127.0.1.1"], NOTE, ["other hosts do not find it", "/etc/hosts"]),
            ("north", [], NOTE, ["does not resolve"]),
            ("north", None, WARNING, ["did not resolve within 5 s"]),
        ],
    )
    def test_host_name(self, name: str, addresses: list[str] | None, status: Status, words: list[str]) -> None:
        check(network.host_name(MPICH, name, addresses), status, *words)

    def test_a_host_name_that_is_too_long(self) -> None:
        fact = network.host_name(MPICH, "h" * 64, ["10.1.0.4"])
        assert fact.status is PROBLEM
        assert "64 characters" in fact.value

    def test_settings(self) -> None:
        assert network.settings({"OMPI_MCA_num_procs": "2", "UCX_TLS": "tcp"}) == Fact("settings", "UCX_TLS=tcp", NOTE)
        check(network.settings({"PATH": "/bin"}), OK, "none")

    def test_network(self) -> None:
        assert "FI_PROVIDER=tcp" in network.network(MPICH, Limits(), fast=False).value
        assert "told" not in network.network(MPICH, Limits(chooses_network=True), fast=True).value
