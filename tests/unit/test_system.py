"""What MPI takes for granted of its host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from torch_rpc_mpi import _system
from torch_rpc_mpi._system import Limits

MPICH = "MPICH Version:      5.0.2\nMPICH Release date: today\nMPICH Device:       ch4:ucx,ofi\n"
MIB = 1 << 20


class Rank(NamedTuple):
    node: str
    host: str
    limits: Limits


class TestSharedMemory:
    @pytest.mark.parametrize(
        ("library", "ranks", "environ", "low", "high"),
        [
            (MPICH, 4, {}, 20.6 * MIB, 22 * MIB),  # taken by 4 ranks: 20.57 MiB
            (MPICH, 1, {}, 0, 0),
            (MPICH, 4, {"MPIR_CVAR_CH4_NETMOD": "ofi"}, 4.04 * MIB, 4.5 * MIB),
            (MPICH, 2, {"MPIR_CVAR_CH4_SHM_POSIX_IQUEUE_NUM_CELLS": "1024"}, 40 * MIB, 42 * MIB),
            ("MPICH Device: ch3:nemesis", 4, {}, 0, 0),
            ("Open MPI v5.0.11, package: Open MPI", 4, {}, 0, 0),
        ],
    )
    def test_needed(self, library: str, ranks: int, environ: dict[str, str], low: float, high: float) -> None:
        assert low <= _system.needed_shared_memory(library, ranks, environ) <= high

    def test_docker_holds_twelve(self) -> None:
        assert _system.needed_shared_memory(MPICH, 12, {}) <= 64 * MIB < _system.needed_shared_memory(MPICH, 13, {})

    def test_the_host_with_too_little_is_named(self) -> None:
        ranks = [Rank("a", "north", Limits(64 * MIB)), *[Rank("b", "south", Limits(8 * MIB))] * 2]
        with pytest.raises(RuntimeError, match=r"/dev/shm of host south has 8\.0 MiB free, .* at most 1 rank"):
            _system.check_shared_memory(MPICH, ranks)
        _system.check_shared_memory(MPICH, ranks[:2])

    def test_what_is_not_known_is_no_reason(self) -> None:
        _system.check_shared_memory(MPICH, [Rank("a", "north", Limits(None))] * 64)


class TestSettings:
    """What MPI is told where the user has said nothing."""

    def test_one_host(self) -> None:
        assert _system.mpi_settings(MPICH, [Limits()] * 2, 1) == {"UCX_TLS": "sm,self"}

    @pytest.mark.parametrize("library", [MPICH, MPICH.replace("ucx,ofi", "ucx ofi"), MPICH.replace("ucx,ofi", "ofi")])
    def test_hosts_with_plain_networks(self, library: str) -> None:
        expected = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
        assert _system.mpi_settings(library, [Limits()] * 2, 2) == expected

    @pytest.mark.parametrize(
        ("library", "ranks", "nodes"),
        [
            (MPICH, [Limits(), Limits(chooses_network=True)], 2),
            (MPICH.replace("ucx,ofi", "ucx"), [Limits()] * 2, 2),
            ("Open MPI v5.0.11", [Limits()] * 2, 2),
            (MPICH, [Limits()], 0),
        ],
    )
    def test_what_is_not_ours_to_choose(self, library: str, ranks: list[Limits], nodes: int) -> None:
        assert _system.mpi_settings(library, ranks, nodes) == {}

    def test_memory_that_cannot_be_read(self) -> None:
        settings = _system.mpi_settings("", [Limits(), Limits(reads_memory=False)], 0)
        assert settings == {"MPIR_CVAR_CH4_CMA_ENABLE": "0"}

    @pytest.mark.parametrize(
        ("files", "environ", "expected"),
        [
            ([], {}, False),
            (["sys/class/infiniband/mlx5_0"], {}, True),
            (["dev/cxi0"], {}, True),
            ([], {"UCX_TLS": "tcp,self"}, True),
            ([], {"FI_PROVIDER": "verbs"}, True),
            ([], {"MPIR_CVAR_CH4_NETMOD": "ucx"}, True),
            ([], {"MY_FI_PROVIDER": "1", "MPIR_CVAR_CH4_NETMODE": "ucx"}, False),
        ],
    )
    def test_who_chooses(self, tmp_path: Path, files: list[str], environ: dict[str, str], expected: bool) -> None:
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True)
            (tmp_path / file).touch()
        assert Limits.here(tmp_path, environ).chooses_network is expected


def test_names_of_hosts() -> None:
    assert _system.host_name_problem(MPICH, "h" * 63) is None
    assert _system.host_name_problem("Open MPI v5.0.11", "h" * 64) is None
    problem = _system.host_name_problem(MPICH, "h" * 64)
    assert problem is not None
    assert "64 characters" in problem


def test_this_system_lets_memory_be_read() -> None:
    assert _system.can_read_memory()
    assert Limits.here().shared_memory is not None


def test_a_default_of_the_environment_ends_and_is_none_where_the_user_has_set_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TEST_A", raising=False)
    monkeypatch.setenv("TEST_B", "the user's")
    with _system.default_environment({"TEST_A": "ours", "TEST_B": "ours"}):
        assert os.environ["TEST_A"] == "ours"
        assert os.environ["TEST_B"] == "the user's"
    assert "TEST_A" not in os.environ
    assert os.environ["TEST_B"] == "the user's"
