#!/usr/bin/env bash
# The Python and multi-rank tests on the MPICH wheel. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
source .venv/bin/activate

pytest tests/unit tests/multirank "$@"
