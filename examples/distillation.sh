#!/usr/bin/env bash
# On-policy distillation in miniature: a student of half the layers learns from its teacher on its own samples.
#
#   bash examples/distillation.sh RUN_DIR TEACHER
#
# TEACHER is the checkpoint of the base model that examples/quickstart.sh trains, such as
# runs/quickstart/base/checkpoints/step_001000. What is in RUN_DIR already is not done again. Variables, with defaults:
# SEED=1, STEPS=200 of the supervised start, ITERATIONS=160 of distillation, PROBLEMS=200 evaluated of each kind, and
# PROCESSES, 2 where there are two CPU cores.
set -euo pipefail

[ $# = 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
run="$(realpath -m "$1")" teacher="$(realpath -m "$2")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seed="${SEED:-1}" evaluated="${PROBLEMS:-200}" processes="${PROCESSES:-$(($(nproc) > 1 ? 2 : 1))}"
python=.venv/bin/python
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTHONPATH="$PWD"

launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" "$@"; }
newest() { find "$run/$1/checkpoints" -maxdepth 1 -name 'step_*[0-9]' | sort | tail -n 1; }
title() { printf '\n== %s\n' "$*"; }

title "the student: the first and the last of the teacher's four layers, and its vision tower"
[ -e "$run/half/manifest.json" ] ||
    "$python" tools/convert_from_hf.py --hf "$teacher/policy" --layers 0,3 --out "$run/half"

title "supervised start: the base model's data, 200 of its 1,000 steps"
steps="${STEPS:-200}"
[ -e "$run/start/checkpoints/$(printf 'step_%06d' "$steps")/manifest.json" ] ||
    launch -m ovr_megatron.coldstart --config-name tiny_base run.dir="$run/start" run.seed="$seed" steps="$steps" \
        model.path="$run/half"

title "on-policy distillation"
iterations="${ITERATIONS:-160}"
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
