"""Slips that end in an error of torch's or Python's: what they say here."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch.distributed.rpc as rpc

from torch_rpc_mpi import _hints


@pytest.mark.parametrize("name", ["mpi", "Mpi"])
def test_a_name_in_other_letters(name: str) -> None:
    with pytest.raises(TypeError, match=f"^init_rpc: there is no backend '{name}'. Write backend=\"MPI\", in capitals"):
        rpc.init_rpc("worker", backend=name, rank=0, world_size=1)  # type: ignore[arg-type]


def test_a_forgotten_backend_under_a_launcher(monkeypatch: pytest.MonkeyPatch, no_launcher: None) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"environment variable MASTER_ADDR expected, but not set$"):
        rpc.init_rpc("worker", rank=0, world_size=2)
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(
        ValueError,
        match=r'MASTER_ADDR expected, but not set\. PMI has started.*backend="MPI"\).*`python -m torch_rpc_mpi',
    ):
        rpc.init_rpc("worker", rank=0, world_size=2)


def test_a_function_of_a_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hook = sys.__excepthook__
    monkeypatch.setattr(sys, "excepthook", hook)
    monkeypatch.setattr(_hints, "_watched", False)
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    _hints.watch_spawned_child()
    assert sys.excepthook is hook
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "…", "--multiprocessing-fork"])
    _hints.watch_spawned_child()
    sys.excepthook(AttributeError, AttributeError("Can't get attribute 'run' on <module '__main__' (built-in)>"), None)
    assert "run is defined in a notebook" in capsys.readouterr().err.splitlines()[-1]
    sys.excepthook(AttributeError, AttributeError("another"), None)
    assert capsys.readouterr().err.splitlines()[-1] == "AttributeError: another"


def test_a_program_of_a_file_needs_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = sys.excepthook
    monkeypatch.setattr(_hints, "_watched", False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "…", "--multiprocessing-fork"])
    main = ModuleType("__main__")
    main.__file__ = "program.py"
    monkeypatch.setitem(sys.modules, "__main__", main)
    _hints.watch_spawned_child()
    assert sys.excepthook is hook


def test_a_function_of_a_notebook_in_a_process_that_was_spawned() -> None:
    program = "import torch, torch.multiprocessing as mp\ndef run(rank): pass\nmp.spawn(run)"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert child.stderr.count("\ntorch_rpc_mpi: run is defined in a notebook") == 1, child.stderr
