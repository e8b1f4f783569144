#!/usr/bin/env bash
# MPICH 4.0 of Debian 12. Arguments go to pytest.
set -euo pipefail
here=$(dirname "$0")
"$here/debian_packages.sh" mpich libmpich-dev

# The names that both of Debian's MPIs can have at once.
export MPIRUN=mpirun.mpich MPICC=mpicc.mpich
exec "$here/on_mpi.sh" debian-mpich "$@"
