"""The MPI shims: what they declare against real MPI headers, and what they do against real MPI libraries."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = Path(sys.prefix, "include")
LIB = Path(sys.prefix, "lib")
MPICC = os.environ.get("MPICC")  # of an MPI that is not in this environment: knows where its mpi.h is
COMPILER = MPICC or shutil.which(os.environ.get("CC", "cc"))

pytestmark = pytest.mark.mpi


def _package_directory() -> Path:
    # Found, not imported: the shims are independent of torch and of the extension.
    spec = importlib.util.find_spec("torch_rpc_mpi")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize(("header", "options"), [("mpi.h", []), ("mpi_abi.h", ["-DTRM_CHECK_STANDARD"])])
def test_declarations_agree_with_the_real_header(header: str, options: list[str]) -> None:
    if not (INCLUDE / header).is_file() and not (MPICC and header == "mpi.h"):
        pytest.skip(f"this environment's MPI brings no {header}")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{INCLUDE}"]
    source = ROOT / "tests" / "unit" / "abi_check.c"
    command = [COMPILER, "-std=gnu11", "-Wall", "-Werror", "-fsyntax-only", *options, *includes, source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def _run_driver(*arguments: object) -> str:
    """Run shim_driver.py as a world of one, in its own process: an MPI is initialised once per process."""
    driver = Path(__file__).with_name("shim_driver.py")
    command = [sys.executable, str(driver), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_serves_the_mpi_that_mpi4py_loaded() -> None:
    output = _run_driver("mpi4py", _package_directory())
    assert output.splitlines()[-1] == "ok"


def test_serves_the_standard_abi() -> None:
    library = LIB / "libmpi_abi.so.1"
    if not library.exists():
        pytest.skip("this environment's MPI has no standard-ABI library")
    output = _run_driver("standard", _package_directory(), library)
    assert output.splitlines()[-1] == "ok"


def test_names_what_a_foreign_library_lacks() -> None:
    output = _run_driver("foreign", _package_directory())
    assert output.splitlines() == [
        f"{abi}: the MPI library lacks MPI_Initialized, which the {abi} ABI has"
        for abi in ("mpich", "openmpi", "standard")
    ]


@pytest.mark.parametrize("abi", ["mpich", "openmpi", "standard"])
def test_exports_one_symbol_and_needs_no_mpi(abi: str) -> None:
    shim = _package_directory() / f"_mpi_shim_{abi}.so"
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-dW", shim], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["readelf", "--dyn-syms", "-W", shim], capture_output=True, text=True, check=True).stdout
    defined = [line.split()[-1] for line in symbols.splitlines() if " GLOBAL " in line and " UND " not in line]
    assert defined == ["torch_rpc_mpi_open_table"]
    assert "libmpi" not in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
