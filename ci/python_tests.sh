#!/usr/bin/env bash
# The Python and multi-rank tests and a minute of the soak, on the MPICH wheel. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
source .venv/bin/activate
ci/test_device.sh

# Under MPI's launcher runs what has the mark "mpi"; the rest, in worlds without one, whose ranks start in a moment.
pytest tests/unit tests/multirank tests/stress/test_soak.py "$@"
