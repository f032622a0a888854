#!/usr/bin/env bash
# PPO on real problems, small: PuzzleVQA, MathVision and MATH500 mixed by weight, a random tiny model, two processes.
#
#   bash examples/real_data.sh RUN_DIR PUZZLEVQA MATHVISION MATH500        ITERATIONS=3 is shorter than the default 30
#
# Each of the three is a folder, a JSONL, JSON or parquet file, or a data set's name on the hub (docs/data.md). A model
# of this size solves nothing of it: this shows real prompts and images going through rollouts, graders and both updates.
set -euo pipefail

[ $# = 4 ] || { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
run="$(realpath -m "$1")" iterations="${ITERATIONS:-30}"
as_source() { printf '{name: %s, weight: %s, path: %s}' "$1" "$2" "$([ -e "$3" ] && realpath "$3" || echo "$3")"; }
sources="data.sources=[$(as_source puzzlevqa 0.4 "$2"), $(as_source mathvision 0.2 "$3"), $(as_source math500 0.4 "$4")]"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/install.sh
python=.venv/bin/python
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore

mkdir -p "$run"
[ -e "$run/init/config.json" ] || "$python" tools/make_tiny_model.py --out "$run/init" --seed 2
"$python" -m torch.distributed.run --standalone --nproc-per-node=2 -m ovr_megatron.rl --config-name tiny_rl \
    run.dir="$run/rl" model.path="$run/init" iterations="$iterations" prompts=16 responses=4 \
    "$sources" \
    data.max_pixels=50176 data.max_images=6 data.max_prompt_tokens=700 data.pack_tokens=2048 \
    "curriculum=[{until: $(((iterations + 1) / 2)), max_tokens: 764}, {until: $iterations, max_tokens: 828}]" \
    algorithm.critic_warmup_iterations=0 rollout.schedule=shared
"$python" tools/report.py "$run"
