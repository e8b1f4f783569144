#!/usr/bin/env bash
# Builds the package for the torch releases of the table below, each with another Python, and runs the smoke suite:
# alone, under mpirun and with torch.multiprocessing.spawn. Ends with a table of the results.
#
#     ci/torch_versions.sh                    all of them
#     ci/torch_versions.sh 2.6.0 3.13         those lines that have one of the words
#     ci/torch_versions.sh --all-tests 2.6.0  `make test` with these
#     ci/torch_versions.sh --wheels DIR       leaves a wheel for each there, whose version has its torch as a label; it is
#                                             no failure if a torch or a Python cannot be had
#
# An environment with a CUDA build takes 6 GB while it is under test, with --all-tests twice that. Those that failed, and
# all with KEEP=1, stay in build/torch-versions for the next time. PYTHON3_10 and so on name Pythons that are not on PATH
# as python3.10.
set -euo pipefail
cd "$(dirname "$0")/.."

# Three "=": exactly this version, where a registry has another build of it (2.13.0+cpu) beside it. What PyPI itself
# gives for Linux on x86-64 are CUDA builds; they need no GPU.
TABLE="
3.10 torch===2.6.0
3.12 torch===2.11.0
3.11 torch==2.13.0
3.13 torch===2.13.0
3.11 torch===2.14.1
"

all_tests=
if [ "${1-}" = --all-tests ]; then
  all_tests=1
  shift
fi
wheels=
if [ "${1-}" = --wheels ]; then
  mkdir -p "$2"
  wheels=$(realpath "$2")
  export TORCH_RPC_MPI_VERSION_LABEL=1
  shift 2
fi
lines=$(sed '/^$/d' <<<"$TABLE")
for word in "$@"; do
  grep --quiet --word-regexp --fixed-strings -e "$word" <<<"$lines" || { echo "no line of the table has $word" >&2; exit 2; }
done
[ $# -eq 0 ] || lines=$(grep --word-regexp --fixed-strings "${@/#/-e}" <<<"$lines")

export PIP_DISABLE_PIP_VERSION_CHECK=1
results=()
failures=0

step() { # what for the table, seconds, command...
  local what=$1 limit=$2
  shift 2
  printf '\n=== %s, %s: %s\n' "$name" "$what" "$*"
  if timeout "$limit" "$@" </dev/null; then
    result+=" $what,"
  else
    result+=" $what FAILED"
    return 1
  fi
}

# As from a fresh clone, but with what is not committed: a build of another torch is in nobody's way.
copy_sources() {
  rm -rf "$here/source"
  mkdir -p "$here/source"
  tar --create --exclude-vcs --exclude='./.venv*' --exclude=./build --exclude=./dist . | tar --extract -C "$here/source"
}

try() { # with $python and $TORCH_RPC_MPI_BUILD_TORCH in directory $here; stops at the first step that fails
  local bin=$here/environment/bin
  copy_sources || return
  if [ -n "$all_tests" ]; then
    step "make test" 10800 make -C "$here/source" test PYTHON="$python"
    return
  fi
  [ -x "$bin/python" ] || step environment 300 "$python" -m venv "$here/environment" || return
  step pip 300 "$bin/pip" install --upgrade pip || return
  # Before the package, as `make` does it: the build takes the torch that it finds.
  step "can be had" 3600 "$bin/pip" install "$TORCH_RPC_MPI_BUILD_TORCH" || { not_here; return 1; }
  "$bin/pip" uninstall --yes torch_rpc_mpi # of the last time
  local what=$here/source
  if [ -n "$wheels" ]; then
    rm -rf "$here/built" "$here/tagged"
    step wheel 3600 "$bin/pip" wheel --verbose --no-deps --wheel-dir "$here/built" "$what" || return
    step tag 300 ci/tag_wheel.sh "$here/environment" "$here"/built/*.whl "$here/tagged" || return
    what=$(echo "$here"/tagged/*.whl)
  fi
  step build 3600 "$bin/pip" install --verbose "${what}[mpich]" || return
  found=$("$bin/python" -c "import torch; print(torch.__version__, torch.version.cuda or torch.version.hip or 'CPU')")
  step check 300 "$bin/pip" check || return
  # Here, not in the sources, which are a package of the same name without an extension.
  local smoke=$here/source/tests/smoke/smoke.py
  step alone 300 "$bin/python" "$smoke" || return
  step "mpirun -n 2" 300 "$bin/mpirun" -n 2 "$bin/python" "$smoke" --launched || return
  step "spawn of 2" 300 "$bin/python" "$smoke" --spawn 2 || return
  [ -z "$wheels" ] || cp "$here"/tagged/*.whl "$wheels"
}

not_here() { # of the machine that makes wheels, this line asks for something that it has not
  [ -z "$wheels" ] || result=" not to be had here, no wheel"
}

while read -r version TORCH_RPC_MPI_BUILD_TORCH; do
  export TORCH_RPC_MPI_BUILD_TORCH
  variable=PYTHON${version/./_}
  python=${!variable:-python$version}
  name="Python $version, $TORCH_RPC_MPI_BUILD_TORCH"
  here=$PWD/build/torch-versions/$version-${TORCH_RPC_MPI_BUILD_TORCH//[^a-z0-9.]/}
  result= found=
  if ! "$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')"; then
    result=" no $python: install it or set $variable; FAILED"
    not_here
  else
    try && [ -z "${KEEP-}" ] && rm -rf "$here"
  fi
  results+=("$name${found:+ ($found)}:${result%,}")
  case $result in *FAILED*) failures=$((failures + 1)) ;; esac
done <<<"$lines"

printf '\n'
printf '%s\n' "${results[@]}"
[ "$failures" -eq 0 ]
