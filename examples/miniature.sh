#!/usr/bin/env bash
# The stages of examples/quickstart.sh, one after the other, into RUN_DIR; what is there already is not done again.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
run="$1" seed="${SEED:-1}" family="${FAMILY:-qwen2_5_vl}" evaluated="${PROBLEMS:-500}"
python=.venv/bin/python
processes=$(($(nproc) > 1 ? 2 : 1))
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

launch() { "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" "$@"; }
newest() { find "$run/$1/checkpoints" -maxdepth 1 -name 'step_*[0-9]' | sort | tail -n 1; }
title() { printf '\n== %s\n' "$*"; }

# Trains one stage unless its last checkpoint is there: stage NAME, RECIPE, last step, module, overrides...
stage() {
    local name="$1" recipe="$2" last="$3" module="$4"
    shift 4
    [ -e "$run/$name/checkpoints/$(printf 'step_%06d' "$last")/manifest.json" ] ||
        launch -m "ovr_megatron.$module" --config-name "$recipe" run.dir="$run/$name" run.seed="$seed" "$@"
}

puzzle='split=heldout&count=1000'
visual="puzzle:digits?form=image&task=sum&answered=0&$puzzle" text="puzzle:digits?form=text&task=sum&answered=0&$puzzle"
on_the_way=("evaluation.sources=[{path: '$visual', name: visual}, {path: '$text', name: text}]"
    evaluation.limit=$((evaluated < 100 ? evaluated : 100)) evaluation.max_tokens=72)

title "base model ($family): the stand-in for the pre-training, on generated captions and single steps"
[ -e "$run/init/config.json" ] || "$python" tools/make_tiny_model.py --out "$run/init" --seed "$seed" --family "$family"
of_folder='import sys; from ovr_megatron.families import family_of_folder; print(family_of_folder(sys.argv[1]).name)'
[ "$("$python" -c "$of_folder" "$run/init")" = "$family" ] ||
    { echo "$run has a model of another family than FAMILY=$family; give another folder" >&2; exit 2; }
stage base tiny_base 1000 coldstart model.path="$run/init"

title "stage 1, linguistic cold start: text puzzles with reasoning, vision frozen"
stage cold_start tiny_cold_start 130 coldstart model.path="$(newest base)" evaluation.every=26 "${on_the_way[@]}"

title "stage 2, multimodal PPO: images and text, critic, vLLM rollouts"
iterations=100
stage rl tiny_rl $iterations rl model.path="$(newest cold_start)" iterations=$iterations evaluation.every=20 "${on_the_way[@]}"

title "average of the last checkpoints, export to Hugging Face, check against Transformers"
mapfile -t last < <(find "$run/rl/checkpoints" -maxdepth 1 -name 'step_*[0-9]' | sort | tail -n 3)
for name in base cold_start rl; do
    [ -e "$run/export/$name/config.json" ] ||
        "$python" tools/convert_to_hf.py --checkpoint "$(newest $name)" --out "$run/export/$name"
done
if [ ! -e "$run/export/average/config.json" ]; then
    "$python" tools/average_checkpoints.py "${last[@]}" --out "$run/average" --force
    "$python" tools/convert_to_hf.py --checkpoint "$run/average" --out "$run/export/average"
fi
"$python" tools/verify.py --hf "$run/export/rl" --checkpoint "$(newest rl)"

title "evaluation on $evaluated held-out puzzles with vLLM"
for name in base cold_start rl average; do
    [ -e "$run/eval/$name/caption.json" ] || launch tools/evaluate.py --model "$run/export/$name" \
        --out "$run/eval/$name" --limit "$evaluated" --max-tokens 72 --threads 1 --max-num-seqs 128 \
        --data "visual=$visual" --data "text=$text" \
        --data "caption=puzzle:digits?form=image&task=caption&$puzzle"
done

title "cognitive behaviours in the greedy responses to visual puzzles, by wording"
counted=()
for name in base cold_start rl average; do counted+=("$name=$run/eval/$name/visual.responses.jsonl"); done
"$python" tools/behaviours.py "${counted[@]}" --out "$run/behaviours"
