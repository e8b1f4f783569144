#!/usr/bin/env bash
# Open MPI 4.1 of Debian 12. Arguments go to pytest.
set -euo pipefail
here=$(dirname "$0")
"$here/debian_packages.sh" openmpi-bin libopenmpi-dev

# The names that both of Debian's MPIs can have at once. As root and with few cores: see openmpi.sh.
export MPIRUN=mpirun.openmpi MPICC=mpicc.openmpi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1
exec "$here/on_mpi.sh" debian-openmpi "$@"
