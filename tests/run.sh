#!/usr/bin/env bash
# Installs what is missing, then runs the linter, the type checker and the tests, all three in any case; exits 1 if one
# of them fails. Arguments go to pytest:
#
#   bash tests/run.sh tests/data -k packing
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/examples/install.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

failed=""
check() {
    echo "== $*"
    "$@" </dev/null || failed+=" $1"
}
check ruff check .
check mypy
check pytest "$@"
[ -z "$failed" ] || { echo "Failed:$failed" >&2; exit 1; }
