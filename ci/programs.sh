#!/usr/bin/env bash
# [WORD...]: programs of other packages, whose RPC runs over TensorPipe and, unmodified, over MPI, with a table at the
# end; see ci/programs/run.py. The packages come from PyPI into .venv-programs.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-programs
# From a directory that is not the sources, which have no compiled extension.
run=$PWD/ci/programs/run.py python=$PWD/.venv-programs/bin/python
cd ci/programs
exec "$python" "$run" "$@"
