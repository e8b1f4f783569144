#!/usr/bin/env bash
# torch's own RPC suites over backend "MPI", on the MPICH wheel; those for GPUs on the test device. Arguments go to pytest
# instead.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
source .venv/bin/activate
ci/test_device.sh

if [ $# -eq 0 ]; then
  set -- tests/conformance
fi
pytest "$@"
