#!/usr/bin/env bash
# Builds the device of tests/device for the torch of the Python that is first on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
# Without importing torch, which takes seconds.
version=$(python -I -c 'import runpy, importlib.util as util
print(runpy.run_path(util.find_spec("torch").submodule_search_locations[0] + "/version.py")["__version__"])')
build=build/device-$version
if [[ ! -f $build/build.ninja ]]; then
  mkdir -p build
  cmake -S . -B "$build" -G Ninja -DTORCH_RPC_MPI_BUILD_TESTS=ON -DTORCH_RPC_MPI_WERROR=ON \
    -DPython_EXECUTABLE="$(command -v python)" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
fi
cmake --build "$build" --target rpctest
