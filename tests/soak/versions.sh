#!/usr/bin/env bash
# Other versions than the lock's, which is the newest end of setup.cfg's ranges: the oldest end, and a newer
# Megatron-Core, which is not allowed yet. Their packages lie in a folder in front of those of .venv; the tests are those
# that compare with Transformers and those of the configuration. All run in any case; exits 1 if one of them fails.
#
#   bash tests/soak/versions.sh        needs a network; another Python: PYTHON=python3.13 bash tests/run.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
python="$root/.venv/bin/python"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$root"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

failed=""
# Runs the tests with the packages of an end: with_packages NAME TESTS... -- PACKAGES...
with_packages() {
    local name="$1" tests=()
    shift
    while [ "$1" != -- ]; do tests+=("$1") && shift; done
    shift
    echo "== $name: $*"
    "$python" -m pip install --quiet --no-deps --ignore-requires-python --target "$folder/$name" "$@"
    PYTHONPATH="$folder/$name:$root" "$python" -m pytest -q "${tests[@]}" || failed+=" $name"
}
common=(tests/model/test_parity.py tests/test_engine.py)
with_packages oldest "${common[@]}" tests/test_config.py tests/test_cli.py -- pydantic==2.12.0 pydantic-core==2.41.1
with_packages megatron "${common[@]}" tests/model/test_layouts.py -- megatron-core==0.19.2
[ -z "$failed" ] || { echo "Failed:$failed" >&2; exit 1; }
