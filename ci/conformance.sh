#!/usr/bin/env bash
# torch's own RPC suites over backend "MPI", on the MPICH wheel. Arguments go to pytest instead.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
source .venv/bin/activate

if [ $# -eq 0 ]; then
  set -- tests/conformance
fi
pytest "$@"
