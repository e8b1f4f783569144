#!/usr/bin/env bash
# Format, lint and types.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
source .venv/bin/activate

ruff check .
ruff format --check .
find csrc tests -name '*.[ch]' -o -name '*.cpp' | xargs clang-format --dry-run --Werror
python ci/rooms.py
mypy torch_rpc_mpi
# The stubs are compared with the installed package, which has the extension: from a directory without the sources.
root=$PWD
cd "$(mktemp -d)"
stubtest --mypy-config-file "$root/pyproject.toml" --allowlist "$root/ci/stubtest_allowlist.txt" torch_rpc_mpi
