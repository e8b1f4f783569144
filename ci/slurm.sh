#!/usr/bin/env bash
# Every way to start ranks under Slurm, on MPICH and Open MPI from PyPI, in a Slurm of one node that lives only for this.
# Must be root. Arguments: of which cases the names are to have one of these words; all without.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/debian_packages.sh slurm-wlm munge libpmix-dev
make --no-print-directory env-mpich env-openmpi
exec .venv/bin/python tests/slurm/slurm.py "$@"
