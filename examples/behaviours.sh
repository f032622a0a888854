#!/usr/bin/env bash
# The finding of the paper in miniature: behaviours of a linguistic cold start appear on images, and PPO changes them.
#
#   bash examples/behaviours.sh [RUN_DIR]
#
# For each seed: a base model, a cold start in text whose traces check a reading and read again, PPO on images alone
# with a reward of 0 or 1, and the ablation: cold start and PPO without such traces. What is in RUN_DIR already is not
# done again. Variables, with defaults: SEEDS="1 2 3", STEPS=1000 of the base model, COLD_STEPS=100 of the cold start,
# ITERATIONS=40 of PPO, PROBLEMS=90 evaluated, and PROCESSES, 2 where there are two CPU cores.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
out="$(realpath -m "${1:-runs/behaviours}")"
bash "$root/examples/install.sh"
cd "$root"
seeds="${SEEDS:-1 2 3}" steps="${STEPS:-1000}" cold_steps="${COLD_STEPS:-100}" iterations="${ITERATIONS:-40}"
problems="${PROBLEMS:-90}"
processes="${PROCESSES:-$(($(nproc) > 1 ? 2 : 1))}"
python=.venv/bin/python
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTHONPATH="$PWD"
asked="split=heldout&count=$problems&answered=0"

launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" "$@"; }
newest() { find "$run/$1/checkpoints" -maxdepth 1 -name 'step_*[0-9]' | sort | tail -n 1; }
title() { printf '\n== seed %s: %s\n' "$seed" "$*"; }

# Trains one stage unless its last checkpoint is there: stage NAME, RECIPE, last step, module, overrides...
stage() {
    local name="$1" recipe="$2" last="$3" module="$4"
    shift 4
    [ -e "$run/$name/checkpoints/$(printf 'step_%06d' "$last")/manifest.json" ] ||
        launch -m "ovr_megatron.$module" --config-name "$recipe" run.dir="$run/$name" run.seed="$seed" "$@"
}

# The words of the traces, for the tokenizer of the base model.
words() {
    printf '%s\n' system 'You are a helpful assistant.' user assistant '<think>' '</think>' \
        'Describe. Name the sum. Read twice. Not 3+2+5. Add 3+2+5. Compare 10 and 11. Which digits?' \
        'describe. name the sum. read twice. not 4+2+5. add 4+2+5. compare 11 and 10. which digits?' \
        'I look: 3+2+5=10. Let me check. I look: sum 11. 11-10=1. No match. Wait, I look again: 4+2+5=11. 11-11=0. Match.' \
        'I read: 6+7+8=21. Let me check. I read: sum 20. 20-21=-1. No match. Wait, I read again: 9+7+4=20. So \boxed{974}'
}

# One arm: arm PREFIX, the kind of its traces.
arm() {
    local traces="$2"
    title "linguistic cold start, trace=$traces: text alone, vision frozen"
    stage "$1cold_start" tiny_checksum_cold_start "$cold_steps" coldstart model.path="$(newest base)" steps="$cold_steps" \
        "data.sources=[{path: 'puzzle:checksum?high=5&form=text&trace=$traces&misread=0.5', weight: 1}]"
    title "PPO on images alone, from the cold start with trace=$traces"
    stage "$1rl" tiny_checksum_rl "$iterations" rl model.path="$(newest "$1cold_start")" iterations="$iterations"
}

for seed in $seeds; do
    run="$out/seed$seed"
    mkdir -p "$run"
    title "base model: what is seen and what is read, at first sight and on request"
    words >"$run/words.txt"
    [ -e "$run/init/config.json" ] ||
        "$python" tools/make_tiny_model.py --out "$run/init" --seed "$seed" --corpus "$run/words.txt"
    stage base tiny_checksum_base "$steps" coldstart model.path="$run/init" steps="$steps"
    arm '' check
    arm direct_ direct

    title "evaluation on $problems held-out rows, and the behaviours by wording"
    on_images=() on_texts=()
    for name in base cold_start rl direct_cold_start direct_rl; do
        [ -e "$run/eval/$name/text.json" ] || launch tools/evaluate.py --model "$(newest $name)/policy" \
            --out "$run/eval/$name" --limit "$problems" --max-tokens 110 --threads 1 --max-num-seqs 128 \
            --data "visual=puzzle:checksum?high=5&form=image&$asked" --data "text=puzzle:checksum?high=5&form=text&$asked"
        on_images+=("$name=$run/eval/$name/visual.responses.jsonl")
        on_texts+=("$name=$run/eval/$name/text.responses.jsonl")
    done
    title "behaviours on texts"
    "$python" tools/behaviours.py "${on_texts[@]}" --out "$run/behaviours_text"
    title "behaviours on images"
    "$python" tools/behaviours.py "${on_images[@]}" --out "$run/behaviours"
    title "behaviours in the samples of the first and the last iteration of PPO"
    last="$(printf '%06d' $((iterations - 1)))"
    "$python" tools/behaviours.py first="$run/rl/rollouts/000000.jsonl" last="$run/rl/rollouts/$last.jsonl" \
        direct_first="$run/direct_rl/rollouts/000000.jsonl" direct_last="$run/direct_rl/rollouts/$last.jsonl" \
        --out "$run/behaviours_rollouts"
    "$python" tools/report.py "$run"
done
printf '\n== all seeds: greedy responses to images, in %%, with 95 %% intervals\n'
"$python" examples/behaviours_table.py "$out"
