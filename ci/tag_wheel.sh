#!/usr/bin/env bash
# ENVIRONMENT WHEEL DIRECTORY: the same wheel for others, in the directory: a platform tag that says what it needs of a
# system, and a check that it needs no more. The libraries left out are those that come with torch; the shims find MPI at
# run time. "none": so nothing is patched in.
set -euo pipefail
"$1/bin/pip" install "auditwheel>=6.8"
"$1/bin/auditwheel" repair --patcher none --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libmpi*' \
  --wheel-dir "$3" "$2"
