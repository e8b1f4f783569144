#!/usr/bin/env bash
# [KILLS]: deaths and outages across hosts, imitated by namespaces, for which it must be root.
set -euo pipefail
cd "$(dirname "$0")/.."
make --no-print-directory env-mpich
.venv/bin/python tests/hosts/hosts.py "$@"
