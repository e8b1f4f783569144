#!/usr/bin/env bash
# The model of the engine; the C++ tests of what uses no torch, with ThreadSanitizer; the simulation and all C++ tests,
# with AddressSanitizer and UndefinedBehaviorSanitizer. Arguments go to the unit tests.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
source .venv/bin/activate

cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE="$VIRTUAL_ENV/bin/python" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DTORCH_RPC_MPI_BUILD_TESTS=ON -DTORCH_RPC_MPI_SANITIZE=ON -DTORCH_RPC_MPI_WERROR=ON
cmake --build build/sanitize --target torch_rpc_mpi_model torch_rpc_mpi_thread_tests \
  torch_rpc_mpi_simulation torch_rpc_mpi_unit_tests

timeout 300 build/sanitize/torch_rpc_mpi_model

# Its shadow memory lies where a kernel may place libraries at random, unless it is told not to.
fixed=()
if setarch --addr-no-randomize true 2> /dev/null; then
  fixed=(setarch --addr-no-randomize)
fi
TSAN_OPTIONS="halt_on_error=1:${TSAN_OPTIONS:-}" timeout 300 "${fixed[@]}" build/sanitize/torch_rpc_mpi_thread_tests

# detect_container_overflow: torch is not instrumented, so a vector that one side grows and the other reads would be
# reported although both are right.
export ASAN_OPTIONS="detect_container_overflow=0:strict_string_checks=1:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
# 10 000 seeds, half of them on each of two cores.
timeout 300 build/sanitize/torch_rpc_mpi_simulation --seeds 0 5000 &
first=$!
timeout 300 build/sanitize/torch_rpc_mpi_simulation --seeds 5000 10000
wait "$first"
timeout 600 build/sanitize/torch_rpc_mpi_unit_tests "$@"
