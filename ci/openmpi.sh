#!/usr/bin/env bash
# Open MPI 5 from PyPI. Arguments go to pytest.
set -euo pipefail

# Containers run as root, and test machines have fewer cores than the tests have ranks; Open MPI refuses both unasked.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
exec "$(dirname "$0")/on_mpi.sh" openmpi "$@"
