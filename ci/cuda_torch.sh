#!/usr/bin/env bash
# One binary for all builds of a torch: the wheel that was built beside torch's CPU build, in an environment that has the
# CUDA build of the same version. Needs no GPU, and 5 GB, which stay in build/cuda-torch if something fails.
#
# TORCH is what to install there; by default the version that .venv has, with three "=": what PyPI gives for that on Linux
# is the CUDA build, even where another index has a CPU build of it beside. With BELOW, a directory of packages that has
# such a torch, nothing of it is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory wheel
export PIP_DISABLE_PIP_VERSION_CHECK=1
accelerator='import torch; print(torch.version.cuda or torch.version.hip or "none")'
[ "$(.venv/bin/python -I -c "$accelerator")" = none ] || { echo "the torch in .venv is no CPU build" >&2; exit 1; }
version=$(.venv/bin/python -I -c 'import torch; print(torch.__version__.partition("+")[0])')

here=$PWD/build/cuda-torch
rm -rf "$here"
.venv/bin/python -m venv "$here"
if [ -n "${BELOW-}" ]; then
  echo "$BELOW" >"$("$here/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
else
  "$here/bin/pip" install "${TORCH:-torch===$version}"
fi
wheel=$(echo dist/*.whl)
"$here/bin/pip" install --ignore-installed --no-deps "$wheel" "mpich>=4.0"
"$here/bin/pip" install "$wheel[mpich]"
"$here/bin/pip" check
found=$("$here/bin/python" -I -c "$accelerator")
[ "$found" != none ] || { echo "${TORCH:-torch===$version} is no build for an accelerator" >&2; exit 1; }

# From elsewhere: the sources are a package of the same name without an extension.
smoke=$PWD/tests/smoke/smoke.py
cd "$here"
timeout 300 bin/python "$smoke"
timeout 300 bin/mpirun -n 2 bin/python "$smoke" --launched
timeout 300 bin/python "$smoke" --spawn 2
printf '\n%s, built beside the CPU build of torch %s, works in the one for CUDA %s\n' "${wheel##*/}" "$version" "$found"
rm -rf "$here"
