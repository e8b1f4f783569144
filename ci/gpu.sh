#!/usr/bin/env bash
# [STAGE...]: what takes a GPU. Builds the package for the torch that is installed, and runs the stages that are named,
# or all:
#
#     cases    the device cases of tests/multirank, on the GPUs that are here
#     suites   torch's own CUDA suites over backend "MPI"
#     bench    the benchmark of device tensors, beside TensorPipe
#
# Ends with a table. It takes no more than LIMIT seconds (470), whatever hangs, and goes on after a stage that failed. The
# logs, and bench.json, are in build/gpu.
#
# PYTHON (python3) is that of an environment with torch, which is not touched: what is missing there goes into another on
# top of it, build/gpu/environment. It comes from the index that pip uses, or, where there is no network, from the
# directory WHEELS: mpich, and of what builds and tests the package that which PYTHON lacks. MPI_PACKAGE= (nothing) leaves
# MPICH out, and takes the MPI that mpi4py finds.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
limit=${LIMIT:-470}
here=$PWD/build/gpu
stages=("$@")
[ $# -gt 0 ] || stages=(cases suites bench)
for stage in "${stages[@]}"; do
  [[ $stage =~ ^(cases|suites|bench)$ ]] || { echo "no stage $stage: there are cases, suites and bench" >&2; exit 2; }
done

rm -rf "$here"
mkdir -p "$here"
# Background jobs in groups of their own, which do not ignore SIGINT: pytest and the benchmark then end their ranks.
set -m
export PIP_DISABLE_PIP_VERSION_CHECK=1
export PATH=$here/environment/bin:$(dirname "$python"):$PATH
# Of the many plugins that a machine may have, some warn, and warnings are errors here.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
# torch then asks the driver's management library whether there are GPUs. CUDA itself, once asked, is of no use in the
# processes that are forked from this one, and so are ranks.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
results=()
failures=0

step() { # name, seconds, command...: runs it, with its output in a log
  local name=$1 seconds=$2 left=$((limit - SECONDS)) status=0 begin=$SECONDS
  shift 2
  [ "$seconds" -lt "$left" ] || seconds=$left
  if [ "$seconds" -le 0 ]; then
    status=124
  else
    timeout --signal=INT --kill-after=15 "$seconds" "$@" </dev/null >"$here/$name.log" 2>&1 || status=$?
  fi
  echo "$status $((SECONDS - begin)) $seconds" >"$here/$name.status"
  return "$status"
}

result() { # name: a line for the table, and the end of the log if it failed
  local name=$1 status seconds allowed said
  read -r status seconds allowed <"$here/$name.status"
  case $status in
    0) said=ok ;;
    124 | 137) said="NOT DONE in $allowed s" ;;
    *) said="FAILED, status $status" ;;
  esac
  results+=("$(printf '%-12s %-22s %4d s  %s' "$name" "$said" "$seconds" "$(summary "$name")")")
  [ "$status" -ne 0 ] || return 0
  failures=$((failures + 1))
  printf '\n=== %s: %s. The end of build/gpu/%s.log:\n' "$name" "$said" "$name"
  tail -n 25 "$here/$name.log" 2>/dev/null | cut -c-200 || true
}

summary() { # name: pytest's last line
  grep -Eho '[0-9]+ (passed|failed|skipped|error|xfailed).* in [0-9.]+s' "$here/$1.log" 2>/dev/null | tail -n 1 || true
}

finish() {
  printf '\n%s\n' "$(grep -h '^torch ' "$here/torch.log" 2>/dev/null || true)"
  printf '%s\n' "${results[@]}"
  exit $((failures > 0))
}

environment() {
  # Without pip, which some systems' venv lacks: that of $python is seen, as everything that it has. It may itself be
  # of an environment, which --system-site-packages would leave out.
  "$python" -m venv --without-pip "$here/environment"
  "$python" -c '
import site, sysconfig
for path in {sysconfig.get_path("purelib"): 0, **dict.fromkeys(site.getsitepackages())}:
    print(f"import site; site.addsitedir({path!r})")
' >"$("$here/environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
  local install=("$here/environment/bin/python" -m pip install)
  if [ -n "${WHEELS-}" ]; then
    "${install[@]}" --no-index --no-deps --ignore-installed --no-compile "$WHEELS"/*.whl
  else
    "${install[@]}" "setuptools>=77" "cmake>=3.25" ninja pytest-xdist
    # mpi4py looks for MPI in this environment, not in the one below.
    [ -z "${MPI_PACKAGE-mpich}" ] || "${install[@]}" --no-deps --ignore-installed "${MPI_PACKAGE-mpich}"
  fi
}

build() {
  local from=()
  [ -z "${WHEELS-}" ] || from=(--no-index --no-deps)
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
  "$here/environment/bin/python" -m pip install --verbose --no-build-isolation "${from[@]}" ".[bench,test]"
}

# -I: the package that is installed, not the sources here.
has() { "$here/environment/bin/python" -I -c "import $1" 2>/dev/null; }

cases() {
  RPC_TEST_DEVICE=cuda "$here/environment/bin/python" -I -m pytest -v -p pytest_timeout -k device \
    tests/multirank/test_cases.py
}

suites() {
  local spread=()
  ! has xdist || spread=(-p xdist.plugin -n "${SUITE_WORKERS:-$(($(nproc) / 3 + 1))}")
  # What other packages of the machine use that is going out of use is not ours to mend.
  "$here/environment/bin/python" -I -m pytest -v -p pytest_timeout -W ignore::DeprecationWarning "${spread[@]}" \
    tests/conformance/test_cuda.py
}

bench() {
  "$here/environment/bin/python" -I -m torch_rpc_mpi.bench --device cuda --rounds 5 --output "$here/bench"
}

export -f environment build cases suites bench has
export python here
run() { step "$1" "$2" bash -euo pipefail -c "$1"; }
wanted() { [[ " ${stages[*]} " == *" $1 "* ]]; }

run environment 120 || { result environment; finish; }
step torch 60 "$here/environment/bin/python" -I -c '
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(f"torch {torch.__version__}, devices: {names}")
' || { result torch; finish; }
run build "${BUILD_LIMIT:-180}" || { result build; finish; }
result build

# Together: both wait for most of the time. The benchmark wants the machine for itself.
for stage in cases suites; do
  ! wanted "$stage" || run "$stage" 240 &
done
wait
for stage in cases suites bench; do
  wanted "$stage" || continue
  [ "$stage" != bench ] || run bench 180 || true
  result "$stage"
done
[ ! -s "$here/bench.log" ] || cat "$here/bench.log"
finish
