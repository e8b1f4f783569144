"""What the environment says of launchers. The variables are those of real launches where the table says so."""

from __future__ import annotations

import builtins
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from torch_rpc_mpi import _launchers
from torch_rpc_mpi._launchers import PMI, PMIX, SLURM, Launcher

HERE = socket.gethostname()
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[08-11]", "SLURM_NTASKS": "16", "SLURM_PROCID": "0"}
STEP = {
    **JOB,
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NODELIST": "n[09-11]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
PMI2 = {"PMI_FD": "11", "PMI_JOBID": "7.2", "PMI_RANK": "5", "PMI_SIZE": "7"}
SLURMS_PMIX = {"PMIX_NAMESPACE": "slurm.pmix.7.2", "PMIX_RANK": "5"}
SRUN = Launcher(SLURM, 5, 7, 1, 3, "n09", "7.2")
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-north-339@1",
}
PALS = {"PALS_RANKID": "5", "PALS_APID": "a", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}
FLUX = {
    "FLUX_TASK_RANK": "5",
    "FLUX_JOB_SIZE": "8",
    "FLUX_JOB_NNODES": "2",
    "FLUX_TASK_LOCAL_ID": "1",
    "FLUX_JOB_ID": "f",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_FD": "9",
}
MPIRUN = "mpirun of MPICH or Intel MPI"


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        (HYDRA, Launcher(MPIRUN, 1, 4, 1, 2, None, None, (PMI,))),
        ({**HYDRA, "MPI_LOCALNRANKS": "4"}, Launcher(MPIRUN, 1, 4, 1, 4, HERE, None, (PMI,))),
        (OPEN_MPI, Launcher("Open MPI's mpirun", 1, 4, 1, 4, HERE, "prterun-north-339@1", (PMIX,))),
        (STEP, SRUN),
        ({**STEP, **PMI2}, Launcher(SLURM, 5, 7, 1, 3, "n09", "7.2", (PMI,))),
        ({**STEP, **SLURMS_PMIX}, Launcher(SLURM, 5, 7, 1, 3, "n09", "7.2", (PMIX,))),
        ({**STEP, "I_MPI_PMI_LIBRARY": "libpmi.so"}, Launcher(SLURM, 5, 7, 1, 3, "n09", "7.2", (PMI,))),
        (PALS, Launcher("PALS", 5, None, 1, 4, None, "a")),
        ({**PALS, "PMI_RANK": "5", "PMI_SIZE": "8"}, Launcher("PALS", 5, 8, 1, 4, None, "a", (PMI,))),
        (FLUX, Launcher("Flux", 5, 8, 1, 4, None, "f", (PMI,))),
        (
            {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4"},
            Launcher("MVAPICH's mpirun", 1, 4, interfaces=(PMI,)),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, Launcher("PMI", 1, 4, interfaces=(PMI,))),
        ({"PMIX_RANK": "3"}, Launcher("PMIx", 3, None, interfaces=(PMIX,))),
        # mpirun within a job of Slurm, whose daemons are the tasks of a step
        ({**STEP, **HYDRA}, Launcher(MPIRUN, 1, 4, 1, 2, "n08", None, (PMI,))),
        ({**STEP, **PMI2, **HYDRA}, Launcher(MPIRUN, 1, 4, 1, 2, "n08", None, (PMI,))),
        ({**STEP, **OPEN_MPI}, Launcher("Open MPI's mpirun", 1, 4, 1, 4, HERE, "prterun-north-339@1", (PMIX,))),
        (
            {**STEP, "PMIX_RANK": "1", "PMIX_NAMESPACE": "prterun-x"},
            Launcher("PMIx", 1, None, None, None, "n08", "prterun-x", (PMIX,)),
        ),
    ],
)
def test_of_a_launcher(environment: dict[str, str], launcher: Launcher) -> None:
    assert _launchers.find_launcher(environment) == launcher


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "4"},
        JOB,  # a batch script, or salloc's shell
        {"PMI_RANK": "x", "PMI_SIZE": "y"},
    ],
)
def test_is_not_invented(environment: dict[str, str]) -> None:
    assert _launchers.find_launcher(environment) is None


def test_pbs_names_the_first_host(tmp_path: Path) -> None:
    hosts = tmp_path / "nodefile"
    hosts.write_text("n08\nn08\nn09\n")
    launcher = _launchers.find_launcher({**HYDRA, "PBS_NODEFILE": str(hosts)})
    assert launcher is not None
    assert launcher.first_host == "n08"


def test_torchrun_within_a_task() -> None:
    environment = {
        **STEP,
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n09",
    }
    assert _launchers.find_torchrun(environment) == Launcher("torchrun", 1, 4, 1, 2, "n09", "none")
    assert _launchers.find_launcher(environment) == SRUN


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({**HYDRA, "MPI_LOCALRANKID": "0"}, True),
        ({**HYDRA, "MPI_LOCALRANKID": "1"}, False),
        ({**STEP, "TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, True),
        ({**STEP, "TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, False),
    ],
)
def test_one_process_speaks_for_its_host(environment: dict[str, str], speaks: bool) -> None:
    assert _launchers.is_first_of_host(environment) is speaks


@pytest.mark.parametrize("environment", [{}, {"RANK": "1", "WORLD_SIZE": "4"}])
def test_torchrun_is_not_invented(environment: dict[str, str]) -> None:
    assert _launchers.find_torchrun(environment) is None


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("vm", "vm"),
        ("n1,n2", "n1"),
        ("n[1-3]", "n1"),
        ("n[01-04,07],x1", "n01"),
        ("rack[2,4]n[08-11]-ib,login", "rack2n08-ib"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
        ("my-host[3]", "my-host3"),
    ],
)
def test_first_of_a_list_of_hosts(hosts: str, first: str) -> None:
    assert _launchers.first_of(hosts) == first


@pytest.mark.parametrize(("rank", "size", "expected"), [(0, 4, 4), (2, None, 3), (0, None, 1), (0, 1, 1)])
def test_tells_the_least_number_of_ranks(rank: int, size: int | None, expected: int) -> None:
    assert Launcher("any", rank, size).expected_size == expected


def test_nothing_is_imported_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "__import__", lambda name, *_: pytest.fail(f"import {name}"))
    _launchers.find_launcher({})
    _launchers.find_torchrun({})


@pytest.mark.parametrize("answers", [True, False])
def test_the_end_of_a_job_waits_for_no_launcher_that_is_silent(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    monkeypatch.setattr(_launchers, "_ANSWER_LIMIT", 0.01)
    ours, launchers = socket.socketpair()
    with ours, launchers:
        if answers:
            launchers.sendall(b"cmd=response_to_init rc=0\n")
        _launchers.end_job(3, {"PMI_FD": str(ours.fileno())})
        asked = launchers.recv(1024)
    assert (b"cmd=abort exitcode=3\n" in asked) == answers


def test_the_launcher_has_read_what_is_written_before_it_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may not do when it ends the job."""
    ours, launchers = socket.socketpair()
    reads, writes = os.pipe()
    with ours, launchers, open(reads, "rb") as shown, open(writes, "w") as errors:
        monkeypatch.setattr(_launchers, "_READ_LIMIT", 60.0)
        monkeypatch.setattr(_launchers, "_OUTPUTS", (writes,))
        launchers.sendall(b"cmd=response_to_init rc=0\n")
        print("why", file=errors, flush=True)
        looked = threading.Event()
        monkeypatch.setattr(time, "sleep", lambda _: looked.set())
        ends = threading.Thread(target=_launchers.end_job, args=(3, {"PMI_FD": str(ours.fileno())}))
        ends.start()
        assert looked.wait(60)
        assert b"cmd=abort" not in launchers.recv(1024)
        assert shown.readline() == b"why\n"
        ends.join()
        assert b"cmd=abort" in launchers.recv(1024)


@pytest.mark.parametrize(
    ("environ", "here"),
    [
        ({"MPI_LOCALNRANKS": "4", "PMI_SIZE": "4"}, True),
        ({"MPI_LOCALNRANKS": "2", "PMI_SIZE": "4"}, False),
        ({"PMI_SIZE": "4"}, False),
        ({}, False),
    ],
)
def test_all_ranks_are_here(environ: dict[str, str], here: bool) -> None:
    assert _launchers.all_ranks_are_here(environ) == here


@pytest.mark.parametrize(
    "environment",
    [HYDRA, OPEN_MPI, PALS, PMI2, SLURMS_PMIX, {"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_LOCAL_SIZE": "2"}],
)
def test_tells_the_variables_from_which_mpi_learns(environment: dict[str, str]) -> None:
    assert _launchers.variables_for_mpi({**environment, **JOB, "PMIND": "1", "RANK": "0"}) == list(environment)
