#!/usr/bin/env bash
# ENVIRONMENT [ARGS...]: the release wheel in that environment of the Makefile: the tests that depend on the MPI or its
# launcher, or what the arguments say to pytest. What is about Python and torch alone is tested on one MPI, in
# python_tests.sh. The scripts named after an MPI set it up and call this one.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$1
shift
make --no-print-directory "env-$environment"
source ".venv-$environment/bin/activate"

if [ $# -eq 0 ]; then
  set -- -m mpi tests/unit/test_mpi_shims.py tests/multirank
fi
pytest "$@"
