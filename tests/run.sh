#!/usr/bin/env bash
# Installs what is missing, then runs the linters, the type checker and the tests, all of them in any case; exits 1 if one
# of them fails. Arguments go to pytest:
#
#   bash tests/run.sh tests/data -k packing
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/examples/install.sh"
cd "$root"
export PATH="$root/.venv/bin:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

failed="" none=0
check() {
    echo "== $*"
    local code=0
    "$@" </dev/null || code=$?
    case "$1 $code" in
        *" 0") ;;
        "pytest 5") none=$((none + 1)) ;; # nothing of this kind was chosen
        *) failed+=" $1" ;;
    esac
}
check ruff check .
check lint-imports --no-logo --no-cache
check mypy
check pytest -m "not both_cores" -n 2 --dist loadfile --no-loadscope-reorder "$@"
check pytest -m both_cores "$@"
[ "$none" -lt 2 ] || failed+=" pytest (no test was chosen)"
[ -z "$failed" ] || { echo "Failed:$failed" >&2; exit 1; }
