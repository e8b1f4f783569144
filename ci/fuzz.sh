#!/usr/bin/env bash
# [SECONDS [FUZZER...]]: fuzzes the decoders, with AddressSanitizer and UndefinedBehaviorSanitizer; 60 seconds in all
# unless another number is given. What is found new goes to build/fuzz/corpus, what fails to build/fuzz/failures.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-60}
shift || true
fuzzers=("${@:-}")
[ -n "${fuzzers[0]}" ] || fuzzers=(frames message plain_pickle)

ci/debian_packages.sh clang libclang-rt-14-dev llvm
make --no-print-directory env-mpich
source .venv/bin/activate

cmake -S . -B build/fuzz -G Ninja -DPython_EXECUTABLE="$VIRTUAL_ENV/bin/python" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DTORCH_RPC_MPI_BUILD_FUZZERS=ON -DTORCH_RPC_MPI_SANITIZE=ON
cmake --build build/fuzz --target "${fuzzers[@]/#/torch_rpc_mpi_fuzz_}"

# detect_container_overflow: see cpp_tests.sh. What a message announces and there is no memory for is an error, also of
# the sanitizer's allocator.
export ASAN_OPTIONS="detect_container_overflow=0:allocator_may_return_null=1:max_allocation_size_mb=256:alloc_dealloc_mismatch=0:${ASAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
export TORCH_CPP_LOG_LEVEL=FATAL

for fuzzer in "${fuzzers[@]}"; do
  new=build/fuzz/corpus/$fuzzer
  mkdir -p "$new" build/fuzz/failures
  # Leaks are looked for at the end; after each input it would take a hundred times as long. The interpreter keeps what it
  # has.
  leaks=1
  [ "$fuzzer" != plain_pickle ] || leaks=0
  ASAN_OPTIONS="detect_leaks=$leaks:$ASAN_OPTIONS" build/fuzz/torch_rpc_mpi_fuzz_"$fuzzer" -detect_leaks=0 \
    -max_total_time=$((seconds / ${#fuzzers[@]})) -timeout=20 \
    -rss_limit_mb=4096 -malloc_limit_mb=1048576 -print_final_stats=1 -artifact_prefix="build/fuzz/failures/$fuzzer-" \
    "$new" "tests/fuzz/corpus/$fuzzer"
done
