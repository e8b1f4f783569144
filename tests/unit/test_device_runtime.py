"""The table of a device's runtime functions against the real header, which PyPI has in nvidia-cuda-runtime.

HIP's functions have the same signatures and constants; there is no such package of their headers.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nvidia-cuda-runtime", "nvidia-cuda-crt")  # of the extra [test]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

# What the constants of csrc/device are in CUDA's header.
CONSTANTS = {
    "kNotReady": "cudaErrorNotReady",
    "kCopyDefault": "cudaMemcpyDefault",
    "kDisableTiming": "cudaEventDisableTiming",
    "kPortable": "cudaHostAllocPortable",
    "kPeerAccess": "cudaIpcMemLazyEnablePeerAccess",
    "mode_": "cudaStreamCaptureModeRelaxed",
}


def include_directories() -> list[Path]:
    files = [file for package in PACKAGES for file in importlib.metadata.files(package) or ()]
    headers = [file for file in files if file.name in ("cuda_runtime_api.h", "host_defines.h")]
    found = {Path(str(file.locate())).parent for file in headers}
    return sorted(path.parent if path.name == "crt" else path for path in found)


def constants() -> dict[str, str]:
    """Those of int and unsigned, which are how the runtime's enumerations are passed."""
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "csrc" / "device").iterdir()))
    statements = re.findall(r"^constexpr (?:int|unsigned) ([^;]+);|^  int (mode_ = \d+);", sources, re.MULTILINE)
    return dict(part.strip().split(" = ", 1) for statement in statements for part in "".join(statement).split(","))


def compile_check(assertions: str) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None, "no C++ compiler, with which the extension was built"
    includes = [f"-I{directory}" for directory in (ROOT / "csrc", Path(__file__).parent, *include_directories())]
    command = [COMPILER, "-std=c++20", "-Wall", "-Werror", "-fsyntax-only", *includes, "-x", "c++", "-"]
    source = f'#include "runtime_check.cpp"\n{assertions}\n'
    return subprocess.run(command, input=source, capture_output=True, text=True, timeout=120)


def test_functions_and_constants_are_those_of_the_header() -> None:
    ours = constants()
    assert set(ours) == set(CONSTANTS)
    result = compile_check("\n".join(f"static_assert({ours[name]} == {CONSTANTS[name]});" for name in ours))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        "RUNTIME_FUNCTION(Malloc, (void** memory, int bytes))",
        "RUNTIME_FUNCTION(EventQuery, (void* event, unsigned flags))",
        "RUNTIME_FUNCTION(IpcOpenEventHandle, (void** event, IpcHandle* handle))",
        "RUNTIME_FUNCTION(NoSuchFunction, ())",
    ],
)
def test_a_wrong_function_is_found(wrong: str) -> None:
    macro = 'static_assert(calledAlike(static_cast<int(*) parameters>(nullptr), &cuda##name), "cuda" #name);'
    result = compile_check(f"#define RUNTIME_FUNCTION(name, parameters) {macro}\n{wrong}")
    assert result.returncode != 0
    assert "cuda" in result.stderr
