"""Checks the extension that was just built, in a process of its own. Needs neither MPI nor mpi4py.

A build can succeed and the result crash: torch brings the C++ library that everything in its process has to use, and
an extension with another one, or with a copy of its own, passes it objects that it does not know. That shows at the
first error text, if not at the import. Better here, where the compiler is known, than in the middle of a run.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

_LIMIT = 600  # seconds; the first import of a CUDA build of torch reads gigabytes
_CXX_LIBRARY = b"libstdc++.so."

# Loads the extension as the package would, and has it put an error into words.
_PROGRAM = """
import sys
from importlib.util import module_from_spec, spec_from_file_location

path, *sys.path[:] = sys.argv[1:]
import torch

print("torch is imported", flush=True)
spec = spec_from_file_location("torch_rpc_mpi._C", path)
extension = module_from_spec(spec)
spec.loader.exec_module(extension)
print("the extension is imported", flush=True)
try:
    extension.match_builtin("torch_rpc_mpi::no_such_operator", (), {}, False)
except RuntimeError as error:
    if "no_such_operator" not in str(error):
        raise SystemExit(f"an error has the wrong text: {error}")
else:
    raise SystemExit("an error was not raised")
print("the extension works", flush=True)
"""


def check_extension(extension: Path, torch: Path, directories: Iterable[str], compiler: str) -> None:
    """Ends the build, with the remedy, if the extension does not work in the torch that it was built for.

    Args:
        extension: the built file.
        torch: the directory of torch's package, for the text.
        directories: where Python modules are looked for, torch and the standard library among them.
        compiler: the C++ compiler that built it, for the text.
    """
    environment = {name: os.environ[name] for name in ("CXX", "CXXFLAGS", "LDFLAGS") if name in os.environ}
    settings = " ".join(f"{name}={value!r}" for name, value in environment.items()) or "no CXX, CXXFLAGS or LDFLAGS"
    remedy = (
        f"It was compiled by {compiler} (with {settings} in the environment). Build again with the compiler of the "
        "system, `CXX=g++ pip install ...`"
    )
    # The name of a needed library stands in the file as text, so no tool is needed to find it.
    if _CXX_LIBRARY not in extension.read_bytes():
        raise SystemExit(
            f"The extension {extension} would crash in torch: libstdc++ is linked statically (or it is another C++ "
            f"library), and torch brings the shared libstdc++.so.6. {remedy}, or another one that has libstdc++.so, "
            "and without -static-libstdc++ and -stdlib=libc++."
        )
    try:
        child = subprocess.run(
            [sys.executable, "-c", _PROGRAM, extension, *directories],
            cwd=extension.parent,  # not the sources, which are a package of the same name
            # Without what pip puts there to hide the environment's packages, and without an installed version of ours.
            env={**os.environ, "PYTHONPATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_LIMIT,
        )
        status, printed = child.returncode, child.stdout
    except subprocess.TimeoutExpired as expired:
        status, printed = None, expired.stdout or b""
    output = printed.decode(errors="replace").strip()
    if status == 0:
        return
    how = _ended(status)
    if "torch is imported" not in output:
        raise SystemExit(
            f"The torch in {torch}, for which the extension was built, cannot be imported ({how}):\n{output}\n"
            f"`{sys.executable} -c 'import torch'` has to work first; reinstall torch if it does not."
        )
    raise SystemExit(
        f"The extension {extension} does not work in the torch in {torch} ({how}):\n{output}\n{remedy}, or install a "
        "torch of that compiler's C++ library."
    )


def _ended(status: int | None) -> str:
    if status is None:
        return f"ended after {_LIMIT} s"
    if status > 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-status}"


def compiler_of(build_directory: Path) -> str:
    """The path of the C++ compiler that CMake chose there."""
    cache = (build_directory / "CMakeCache.txt").read_text()
    found = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.+)$", cache, re.MULTILINE)
    return found[1] if found else "an unknown compiler"
