#!/usr/bin/env bash
# All tests. The C++ ones use all cores; beside those of ranks, which wait more than they compute, another stage runs.
# Every line begins with the stage that wrote it. build/test/STAGE.log has the lines of one stage; the end of it is shown
# again if the stage failed.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=build/test

if [ $# -eq 1 ]; then # one stage
  {
    status=0
    "ci/$1.sh" || status=$?
    echo "ended with status $status after $SECONDS s"
    exit "$status" # and so does the pipe
  } 2>&1 | tee "$logs/$1.log" | sed -u "s/^/$1: /"
  exit
fi

# What stages share is made before the first of them.
make --no-print-directory env-mpich
PATH="$PWD/.venv/bin:$PATH" ci/test_device.sh
rm -rf "$logs"
mkdir -p "$logs"

# xargs and not the shell's "&", whose processes ignore Ctrl-C, which tests send.
status=0
for together in cpp_tests "python_tests lint conformance openmpi fuzz"; do
  tr ' ' '\n' <<<"$together" | xargs -P 2 -n 1 ci/test.sh || status=$?
done
for log in "$logs"/*.log; do
  tail -n 1 "$log" | grep -q "^ended with status 0 " || tail -n 200 "$log"
done
tail -n 1 "$logs"/*.log
exit "$status"
