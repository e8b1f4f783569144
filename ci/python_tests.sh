#!/usr/bin/env bash
# The Python and multi-rank tests on the MPICH wheel. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
source .venv/bin/activate

pytest tests/unit tests/multirank "$@"
# Processes that find each other without a launcher form another kind of world: what is sent in it is the same, so some do.
if [ $# -eq 0 ]; then
  pytest tests/multirank/test_cases.py --backend mpi-by-store -k "calls or rref or tensors or timeouts"
fi
