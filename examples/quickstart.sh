#!/usr/bin/env bash
# The whole recipe in miniature: base model, linguistic cold start, multimodal PPO, averaging, export, evaluation, report.
#
#   bash examples/quickstart.sh [RUN_DIR]        SEED=2 chooses another seed (default 1), FAMILY=qwen3_vl another model
#
# Every part is the real one (Megatron-Core, vLLM, Transformers, math-verify); only model and data are small. It can be
# interrupted with Ctrl-C; the same command goes on.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
run="$(realpath -m "${1:-runs/quickstart}")"
bash "$root/examples/install.sh"
python="$root/.venv/bin/python"

mkdir -p "$run"
"$python" "$root/tools/measure.py" --add --out "$run/measured/quickstart.json" bash "$root/examples/miniature.sh" "$run"
"$python" "$root/tools/report.py" "$run"
echo "TensorBoard: $root/.venv/bin/tensorboard --logdir $run"
echo "model:       $run/export/average"
