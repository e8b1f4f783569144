"""cmake/ImportTorch.cmake on what real wheels say, recorded by recorded_torch/record.py, and on what cannot be read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "recorded_torch"
WHEELS = sorted(path.name for path in RECORDED.iterdir() if (path / "Caffe2Targets.cmake").is_file())

PROJECT = f"""
cmake_minimum_required(VERSION 3.25)
project(import_torch LANGUAGES NONE)
include("{SOURCES}/cmake/ImportTorch.cmake")
foreach(target torch torch_python)
  get_target_property(definitions torch_rpc_mpi::${{target}} INTERFACE_COMPILE_DEFINITIONS)
  message(NOTICE "${{target}}=${{definitions}}")
endforeach()
"""


class Torch:
    """A directory that looks to ImportTorch like the recorded torch."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.targets = directory / "share" / "cmake" / "Caffe2" / "Caffe2Targets.cmake"
        self.targets.parent.mkdir(parents=True)
        (directory / "lib").mkdir()
        shutil.copy(RECORDED / name / "Caffe2Targets.cmake", self.targets)
        for library in ("c10", "torch_python"):
            shutil.copy(RECORDED / name / f"lib{library}.txt", self.library(library))

    def library(self, name: str) -> Path:
        return self.directory / "lib" / f"lib{name}.so"

    def configure(self) -> tuple[int, str]:
        """CMake's status and output, in one line."""
        project = self.directory / "project"
        project.mkdir()
        (project / "CMakeLists.txt").write_text(PROJECT)
        done = subprocess.run(
            ["cmake", "-S", project, "-B", project / "build", f"-DTORCH_RPC_MPI_TORCH_DIR={self.directory}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.returncode, " ".join(done.stdout.split())


@pytest.mark.parametrize("name", WHEELS)
def test_wheel(tmp_path: Path, name: str) -> None:
    status, output = Torch(tmp_path, name).configure()
    assert status == 0, output
    # PyPI's CUDA wheels had GCC 4's strings up to 2.6; 2.9 came with pybind11 3.
    strings = 0 if name == "2.6.0-cuda" else 1
    definitions = f"USE_DISTRIBUTED;USE_C10D_GLOO;USE_RPC;USE_TENSORPIPE;_GLIBCXX_USE_CXX11_ABI={strings}"
    assert f"torch={definitions} " in output
    if name == "2.6.0-cuda":
        abi = 'PYBIND11_COMPILER_TYPE="_gcc";PYBIND11_STDLIB="_libstdcpp";PYBIND11_BUILD_ABI="_cxxabi1011"'
    else:
        abi = "definitions-NOTFOUND"
    assert f"torch_python={abi} " in output


def test_wheels_of_every_kind_are_recorded() -> None:
    assert {name.partition("-")[2] for name in WHEELS} == {"cpu", "cuda"}


def refused(torch: Torch, *parts: str) -> None:
    status, output = torch.configure()
    assert status != 0, output
    for part in (f"The torch in {torch.directory} cannot be built against: ", *parts):
        assert part in output


@pytest.mark.parametrize("name", WHEELS)
def test_torch_without_rpc(tmp_path: Path, name: str) -> None:
    torch = Torch(tmp_path, name)
    torch.targets.write_text(torch.targets.read_text().replace("USE_RPC;", ""))
    refused(
        torch,
        "built without torch.distributed.rpc (USE_RPC is not among the definitions "
        f"'USE_DISTRIBUTED;USE_C10D_GLOO;USE_TENSORPIPE' of torch_cpu in {torch.targets})",
        "Install one that has it",
    )


def test_torch_without_any_definition(tmp_path: Path) -> None:
    """It has no torch.distributed at all; the definitions of other targets are no answer."""
    torch = Torch(tmp_path, "2.14.1-cuda")
    definitions = '  INTERFACE_COMPILE_DEFINITIONS "USE_DISTRIBUTED;USE_C10D_GLOO;USE_RPC;USE_TENSORPIPE"\n'
    text = torch.targets.read_text()
    assert definitions in text
    torch.targets.write_text(text.replace(definitions, "").replace('"USE_NVSHMEM"', '"USE_RPC"'))
    refused(torch, "built without torch.distributed.rpc (USE_RPC is not among the definitions '' of torch_cpu")


def test_definition_that_is_none(tmp_path: Path) -> None:
    torch = Torch(tmp_path, "2.13.0-cpu")
    torch.targets.write_text(torch.targets.read_text().replace("USE_RPC;", "USE_RPC;\\$<CONFIG:Debug>;"))
    refused(torch, "'\\$<CONFIG:Debug>' among the definitions of torch_cpu", "--force-reinstall")


def test_file_without_torch_cpu(tmp_path: Path) -> None:
    torch = Torch(tmp_path, "2.13.0-cpu")
    torch.targets.write_text(torch.targets.read_text().replace("(torch_cpu ", "(torch_everything "))
    refused(torch, f"there is no target torch_cpu in {torch.targets}", "--force-reinstall")


def test_missing_file(tmp_path: Path) -> None:
    torch = Torch(tmp_path, "2.13.0-cpu")
    torch.targets.unlink()
    refused(torch, f"it has no {torch.targets}", "--force-reinstall")


@pytest.mark.parametrize(("library", "pattern"), [("c10", "_ZN3c105Error"), ("torch_python", "__pybind11_internals_v")])
def test_library_that_says_nothing(tmp_path: Path, library: str, pattern: str) -> None:
    torch = Torch(tmp_path, "2.13.0-cpu")
    torch.library(library).write_text("nothing of this kind\n")
    refused(torch, f"in {torch.library(library)} matches", pattern, "--force-reinstall")


def test_missing_library(tmp_path: Path) -> None:
    torch = Torch(tmp_path, "2.13.0-cpu")
    torch.library("torch_python").unlink()
    refused(torch, f"it has no {torch.library('torch_python')}", "--force-reinstall")
