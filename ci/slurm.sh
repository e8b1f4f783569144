#!/usr/bin/env bash
# Every way to start ranks under Slurm, on MPICH and Open MPI from PyPI and those of Debian 12, in a Slurm of two nodes
# that lives only for this. Must be root. Arguments: words of which the names of the cases are to have one, such as "MPICH:".
set -euo pipefail
cd "$(dirname "$0")/.."
ci/debian_packages.sh slurm-wlm munge libpmix-dev mpich libmpich-dev openmpi-bin libopenmpi-dev
make --no-print-directory env-mpich env-openmpi env-debian-mpich env-debian-openmpi
exec .venv/bin/python tests/slurm/slurm.py "$@"
