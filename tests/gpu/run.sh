#!/usr/bin/env bash
# Everything that needs a Hopper GPU, with the python on the PATH; arguments go to pytest. Needs vLLM's GPU build and
# Transformer Engine (docs/performance.md). On a machine without a GPU, ANYWHERE=1 runs the two files that can run there.
#
#   bash tests/gpu/run.sh -k rollout
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec python -m pytest -s -p no:cacheprovider tests/model/kernel_arithmetic.py tests/gpu "$@"
