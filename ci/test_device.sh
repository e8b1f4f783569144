#!/usr/bin/env bash
# Builds the device of tests/device for the torch of the Python that is first on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/device-$(python -I -c 'import torch; print(torch.__version__)')
cmake -S . -B "$build" -G Ninja -DTORCH_RPC_MPI_BUILD_TESTS=ON -DTORCH_RPC_MPI_WERROR=ON \
  -DPython_EXECUTABLE="$(command -v python)" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --target rpctest
