#!/usr/bin/env bash
# Makes the release wheel, dist/release/*.whl, the one file that the scripts named after an MPI install and test, and
# checks what it brings along and what it needs.
#
# Its platform tag is the oldest manylinux that has the symbols it refers to, so it follows the compiler and the C library
# of this machine. A wheel for older systems is made by running this in their manylinux image.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory wheel-release
source .venv/bin/activate

auditwheel show dist/release/*.whl
python - dist/release/*.whl <<'CODE'
import io
import re
import sys
import zipfile

from elftools.elf.elffile import ELFFile

(path,) = sys.argv[1:]
assert re.search(r"-manylinux_\d+_\d+_\w+\.whl$", path), f"{path} has no manylinux tag"
FROM_TORCH = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so"}
FROM_SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
with zipfile.ZipFile(path) as wheel:
    libraries = {name: wheel.read(name) for name in wheel.namelist() if ".so" in name}
names = sorted(re.sub(r"\.cpython-.*", "", name) for name in libraries)
assert names == ["torch_rpc_mpi/_C", *(f"torch_rpc_mpi/_mpi_shim_{abi}.so" for abi in ("mpich", "openmpi", "standard"))], names
for name, content in libraries.items():
    tags = list(ELFFile(io.BytesIO(content)).get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    allowed = FROM_SYSTEM | (FROM_TORCH if "/_C." in name else set())
    assert needed <= allowed, f"{name} needs {needed - allowed}"
    assert not any(tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH") for tag in tags), f"{name} has a run path"
CODE
sha256sum dist/release/*.whl
