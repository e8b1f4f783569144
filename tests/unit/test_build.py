"""What the build says and checks: its length, and that what it made works. Fakes stand for extension and torch."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "_build_backend"))
import build_check
from build_check import check_extension, compiler_of
from build_length import announcement
from setuptools.dist import Distribution
from torch_location import Torch, version_label

SHARED = "# libstdc++.so.6\n"  # what the check looks for in the file
GOOD = """
def match_builtin(name, args, kwargs, among_all):
    raise RuntimeError(f"no operator {name}")
"""
CRASHES = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


class Built:
    """A torch and an extension, both in Python."""

    def __init__(self, directory: Path) -> None:
        self.packages = directory / "packages"
        self.torch = self.packages / "torch"
        self.torch.mkdir(parents=True)
        self.extension = directory / "_C.py"

    def check(self, extension: str, torch: str = "") -> None:
        (self.torch / "__init__.py").write_text(torch)
        self.extension.write_text(extension)
        check_extension(self.extension, self.torch, [str(self.packages), *sys.path], "/opt/gcc/bin/g++")


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path)


def test_extension_that_works(built: Built) -> None:
    # In torch's process, not hidden from it by the build's own path.
    built.check(SHARED + "import torch\nassert torch.here\n" + GOOD, torch="here = True")


def test_static_cxx_library(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/opt/gcc/bin/g++")
    monkeypatch.setenv("LDFLAGS", "-static-libstdc++")
    with pytest.raises(SystemExit) as error:
        built.check(GOOD)
    for part in (
        str(built.extension),
        "libstdc++ is linked statically",
        "compiled by /opt/gcc/bin/g++",
        "CXX='/opt/gcc/bin/g++'",
        "LDFLAGS='-static-libstdc++'",
        "CXX=g++ pip install",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("extension", "how"),
    [
        (CRASHES, "SIGSEGV"),
        ("raise ImportError('undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
        (GOOD.replace("raise RuntimeError(", CRASHES + " #"), "SIGSEGV"),
        (GOOD.replace("{name}", "garbage"), "an error has the wrong text: no operator garbage"),
        (GOOD.replace("raise RuntimeError", "return "), "an error was not raised"),
    ],
    ids=["crash", "import", "crash in an error", "wrong text", "no error"],
)
def test_extension_that_does_not_work(built: Built, extension: str, how: str) -> None:
    with pytest.raises(SystemExit) as error:
        built.check(SHARED + extension)
    for part in (f"does not work in the torch in {built.torch}", how, "compiled by /opt/gcc/bin/g++", "CXX=g++"):
        assert part in str(error.value)


def test_other_ends_of_the_process_that_loads_the_extension(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=rf"\(signal {signal.SIGRTMIN + 2}\)"):  # of a number that has no name
        built.check(SHARED + CRASHES.replace("SIGSEGV", "SIGRTMIN + 2"))
    monkeypatch.setattr(build_check, "_LIMIT", 2)
    with pytest.raises(SystemExit, match=r"(?s)\(ended after 2 s\).*torch is imported"):
        built.check(SHARED + "import time; time.sleep(600)")


def test_torch_that_cannot_be_imported(built: Built) -> None:
    with pytest.raises(SystemExit) as error:
        built.check(SHARED + GOOD, torch="raise ImportError('libcudart.so.13: cannot open')")
    for part in (f"The torch in {built.torch}", "libcudart.so.13: cannot open", "-c 'import torch'"):
        assert part in str(error.value)


def test_compiler_is_named(tmp_path: Path) -> None:
    (tmp_path / "CMakeCache.txt").write_text("A:STRING=b\nCMAKE_CXX_COMPILER:FILEPATH=/usr/bin/c++\nZ:BOOL=ON\n")
    assert compiler_of(tmp_path) == "/usr/bin/c++"


def test_length_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "compile_commands.json").write_text(json.dumps([{"file": f"{i}.cpp"} for i in range(60)]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    assert announcement(tmp_path).startswith("torch_rpc_mpi: 60 files to compile, about 5 minutes on 2 cores;")
    monkeypatch.setenv("CMAKE_BUILD_PARALLEL_LEVEL", "10")
    assert "about 2 minutes on 8 cores" in announcement(tmp_path)


@pytest.mark.parametrize(
    ("asked", "torch", "version"),
    [
        (None, "2.13.0", "0.1.0"),
        ("0", "2.13.0", "0.1.0"),
        ("1", "2.13.0", "0.1.0+torch2.13"),
        ("1", "2.6.0", "0.1.0+torch2.6"),
        ("", "2.13.0", "0.1.0"),
        ("1", None, "0.1.0"),  # a source distribution
    ],
)
def test_a_wheel_is_labelled_with_its_torch_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, torch: str | None, version: str
) -> None:
    monkeypatch.delenv("TORCH_RPC_MPI_VERSION_LABEL", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCH_RPC_MPI_VERSION_LABEL", asked)
    label = version_label(Torch(Path("/torch"), torch) if torch else None)
    # As setup.py gives it to setuptools.
    built = Distribution({"name": "torch_rpc_mpi", "version": "0.1.0", "options": {"egg_info": {"tag_build": label}}})
    assert built.get_command_obj("egg_info").tagged_version() == version


def test_a_label_is_not_asked_for_by_other_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_RPC_MPI_VERSION_LABEL", "false")
    with pytest.warns(UserWarning, match="TORCH_RPC_MPI_VERSION_LABEL='false' has no meaning"):
        assert not version_label(Torch(Path("/torch"), "2.13.0"))
