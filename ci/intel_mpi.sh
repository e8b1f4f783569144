#!/usr/bin/env bash
# Intel MPI 2021.18 from PyPI. Arguments go to pytest.
set -euo pipefail
exec "$(dirname "$0")/on_mpi.sh" intel-mpi "$@"
