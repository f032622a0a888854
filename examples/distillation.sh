#!/usr/bin/env bash
# A student of half the layers learns from its teacher on its own samples, into RUN_DIR; what is there already is not
# done again.  TEACHER is the base model of examples/miniature.sh, RUN/base/checkpoints/step_001000.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
run="$1" teacher="$2" seed="${SEED:-1}" evaluated="${PROBLEMS:-200}" processes="${PROCESSES:-$(($(nproc) > 1 ? 2 : 1))}"
python=.venv/bin/python
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTHONPATH="$PWD"

launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" "$@"; }
newest() { find "$run/$1/checkpoints" -maxdepth 1 -name 'step_*[0-9]' | sort | tail -n 1; }
title() { printf '\n== %s\n' "$*"; }

title "the student: the first and the last of the teacher's four layers, and its vision tower"
[ -e "$run/half/manifest.json" ] ||
    "$python" tools/convert_from_hf.py --hf "$teacher/policy" --layers 0,3 --out "$run/half"

title "supervised start: the base model's data, 40 of its 1,000 steps"
steps="${STEPS:-40}"
[ -e "$run/start/checkpoints/$(printf 'step_%06d' "$steps")/manifest.json" ] ||
    launch -m ovr_megatron.coldstart --config-name tiny_base run.dir="$run/start" run.seed="$seed" steps="$steps" \
        model.path="$run/half"

title "on-policy distillation"
iterations="${ITERATIONS:-40}"
[ -e "$run/distilled/checkpoints/$(printf 'step_%06d' "$iterations")/manifest.json" ] ||
    launch -m ovr_megatron.rl --config-name tiny_distill run.dir="$run/distilled" run.seed="$seed" \
        iterations="$iterations" model.path="$(newest start)" algorithm.teacher="$teacher"

title "greedy accuracy on $evaluated held-out problems of each kind"
problems='split=heldout&count=1000'
for name in teacher start distilled; do
    model="$teacher"
    [ $name = teacher ] || model="$(newest $name)"
    [ -e "$run/eval/$name/text.json" ] || launch tools/evaluate.py --model "$model/policy" --out "$run/eval/$name" \
        --limit "$evaluated" --max-tokens 72 --threads 1 --max-num-seqs 128 \
        --data "image=puzzle:digits?form=image&task=caption&$problems" \
        --data "pick=puzzle:digits?form=image&task=pick&$problems" \
        --data "text=puzzle:digits?form=text&task=caption&$problems"
done
