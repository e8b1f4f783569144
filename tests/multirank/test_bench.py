"""The benchmark, small: that it measures what it says, in worlds of its own and in one that it is given."""

import contextlib
import json
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import launcher
import psutil
import pytest

BENCH = [sys.executable, "-m", "torch_rpc_mpi.bench"]
LIMIT = 250.0  # seconds


def run(command: list[str], output: Path, **env: str) -> tuple[str, dict[str, Any]]:
    # From a directory without the sources: what is installed is tested.
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=output.parent,
        env=launcher.environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads((output / "bench.json").read_text())


def test_worlds_of_its_own(tmp_path: Path) -> None:
    cases = "builtin,async_udf_64,echo_1MiB,take_64MiB,training,neighbours,many_to_one,all_to_all_64KiB,idle,session"
    text, found = run([*BENCH, f"--cases={cases}", "--ranks=2,3", "--rounds=2"], tmp_path / "out")
    results = {(result["case"], result["ranks"]): result["backends"] for result in found["results"]}
    everywhere = {(name, ranks) for name in ("builtin", "all_to_all_64KiB", "session") for ranks in (2, 3)}
    everywhere |= {("neighbours", 3), ("many_to_one", 3)}
    assert set(results) == everywhere | {
        (name, 2) for name in ("async_udf_64", "echo_1MiB", "take_64MiB", "training", "idle")
    }
    assert found["failures"] == {}
    for (name, ranks), backends in results.items():
        raw = set() if name in ("training", "idle", "session") else {"raw"}
        assert set(backends) == {"mpi", "tensorpipe", "tensorpipe-uv"} | raw, name
        for backend, measured in backends.items():
            assert len(measured["medians"]) == 2
            assert measured["percentiles"] == sorted(measured["percentiles"])
            assert all(0 < median < 60 for median in measured["medians"]), (name, ranks, backend)
            assert set(measured["grown_bytes"]) == (set() if backend == "raw" else {str(rank) for rank in range(ranks)})
    # The callee keeps a tensor that it has received for as long as its function runs.
    assert all(results["take_64MiB", 2][backend]["grown_bytes"]["1"] >= 60 << 20 for backend in ("mpi", "tensorpipe"))
    assert found["starts"] == {}
    assert re.search(r"rpc_sync, builtin .* µs", text)
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {
        f"{name}.svg" for name in ("latency", "bandwidth", "rate", "start")
    }


def test_tensors_on_devices(tmp_path: Path) -> None:
    cases = "builtin,take_1MiB,gradients,pinned_64MiB"
    where = ["--device=rpctest", "--import=bench_device", "--backends=mpi,limit"]
    text, found = run(
        [*BENCH, *where, f"--cases={cases}", "--rounds=2"], tmp_path / "out", PYTHONPATH=str(launcher.HERE)
    )
    assert found["failures"] == {}
    results = {result["case"]: result["backends"] for result in found["results"]}
    assert set(results) == set(cases.split(","))
    for name, backends in results.items():
        assert set(backends) == {"mpi", "limit"}, name
        assert all(len(measured["medians"]) == 2 for measured in backends.values()), name
    assert found["device"] == "test device"
    assert "2 ranks, test device" in text


def test_first_sessions_alone(tmp_path: Path) -> None:
    """Started where a package of this name lies that does not work, such as the sources: `make bench`."""
    (tmp_path / "torch_rpc_mpi").mkdir()
    (tmp_path / "torch_rpc_mpi" / "__init__.py").write_text("raise ImportError('not the one installed')")
    arguments = ["--cases=start", "--ranks=2", "--rounds=2", "--backends=mpi,tensorpipe,raw"]
    text, found = run([BENCH[0], "-I", *BENCH[1:], *arguments], tmp_path / "out")
    assert found["results"] == []
    assert found["failures"] == {}
    assert found["versions"]["mpi"]
    starts = found["starts"]["2"]
    assert set(starts) == {"mpi", "tensorpipe"}
    for backend, measured in starts.items():
        assert len(measured["rounds"]) == 2
        for start in measured["rounds"]:
            assert min(start["init"], start["calls"], start["shutdown"]) > 0
            assert start["mpi_init"] is None if backend != "mpi" else 0 < start["mpi_init"] < start["init"]
    assert re.search(r"2 +mpi +2 ", text)


def test_a_first_session_that_fails_leaves_no_process_and_the_others_go_on(tmp_path: Path) -> None:
    arguments = ["--cases=start", "--ranks=2", "--rounds=1", "--backends=mpi,tensorpipe"]
    command = [*BENCH, *arguments, "--output", str(tmp_path / "out")]
    with (tmp_path / "log").open("w") as log:
        bench = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        tensorpipe = find_descendant(bench.pid, "--backend=tensorpipe")
        others = psutil.Process(bench.pid).children(recursive=True)
        tensorpipe.kill()
        assert bench.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    finally:
        bench.kill()
    assert not any(other.is_running() for other in others)
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert "its process was killed by SIGKILL" in found["failures"]["2"]["tensorpipe"]
    assert set(found["starts"]["2"]) == {"mpi"}


@pytest.mark.mpi
def test_given_world(tmp_path: Path) -> None:
    command = [*launcher.mpirun(), "-n", "3", *BENCH, "--cases=udf,echo_1KiB,all_to_all", "--rounds=2"]
    _, found = run(command, tmp_path / "out")
    assert {(result["case"], result["ranks"]) for result in found["results"]} == {
        ("udf", 3),
        ("echo_1KiB", 3),
        ("all_to_all", 3),
    }
    assert found["failures"] == {}
    assert found["versions"]["mpi"]
    assert all(len(start["rounds"]) == 1 for start in found["starts"]["3"].values())
    assert found["starts"]["3"]["mpi"]["rounds"][0]["shutdown"] > 0


@pytest.mark.parametrize("started", [False, True], ids=["while it starts", "between its turns"])
def test_a_backend_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, started: bool) -> None:
    arguments = ["--cases=udf,script", "--ranks=2", "--rounds=2", "--backends=mpi,tensorpipe"]
    command = [*BENCH, *arguments, "--output", str(tmp_path / "out")]
    with (tmp_path / "log").open("w") as log:
        bench = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        tensorpipe = find_descendant(bench.pid, "--backend=tensorpipe")
        while started and tensorpipe.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)  # it is stopped for the short turns of the others
        tensorpipe.kill()
        assert bench.wait(LIMIT) == 0, (tmp_path / "log").read_text()
    finally:
        bench.kill()
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert "its process was killed by SIGKILL" in found["failures"]["2"]["tensorpipe"]
    assert "tensorpipe failed in a world of 2 ranks" in (tmp_path / "log").read_text()
    results = {result["case"]: result["backends"]["mpi"]["medians"] for result in found["results"]}
    assert {name: len(medians) for name, medians in results.items()} == {"udf": 2, "script": 2}


def find_descendant(pid: int, argument: str) -> psutil.Process:
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if argument in process.cmdline():
                    return process
        time.sleep(0.05)
    raise TimeoutError(f"no process with {argument}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--cases=builtins", "builtins is none of start, builtin, "),
        ("--ranks=1", "a world has at least 2 ranks"),
        ("--rounds=0", "--rounds: at least 1"),
        ("--backends=limit", "limit needs --device"),
        ("--device=cuda --cases=builtin,start", "start is not for --device cuda"),
        ("--device=cuda --backends=mpi,raw", "raw is not for --device cuda"),
    ],
)
def test_arguments(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("torch_rpc_mpi.bench", run_name="__main__")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_ranks_are_those_of_a_given_world() -> None:
    command = [*launcher.mpirun(), "-n", "2", *BENCH, "--ranks=4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=launcher.environment({}))
    assert done.returncode != 0
    assert "--ranks: mpirun started 2" in done.stderr
