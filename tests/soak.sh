#!/usr/bin/env bash
# What takes longer than the tests may: conversion at the 7B shape (needs 50 GB in SOAK_DIR), 40,960 tokens against
# Transformers, an export served by vLLM, twenty kills of each stage, every layout and every method of PPO's tests,
# every training recipe at a small size, 200,000 rows from sources to a checkpoint, all inputs that cannot work, all
# faults put into PPO's loop, the simulator of the plan beside two engines, what judges add to a round, PPO, GRPO and
# RLOO, and the kinds of rounds, on three seeds of the miniature, and other versions of packages, for which it needs a
# network. The results of the last run stand in docs/layouts.md, running.md, data.md, faults.md, recipes.md,
# algorithms.md and versions.md.
#
#   bash tests/soak.sh
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/examples/install.sh"
cd "$root"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore
for workers in 1 2; do
    .venv/bin/python tests/soak/convert.py --preset "${SOAK_PRESET:-7B}" --workers $workers --folder "${SOAK_DIR:-runs/soak}"
done
.venv/bin/python tests/soak/long_context.py
.venv/bin/python tests/soak/long_context.py --yarn 2 --rollout
.venv/bin/python tests/soak/serve.py
.venv/bin/python tests/soak/kills.py
OVR_TEST_WHOLE=1 .venv/bin/python -m pytest -q tests/model/test_layouts.py tests/model/test_lora.py tests/plan/test_memory.py \
    tests/rollout/test_reshard.py tests/ppo/test_loops.py tests/ppo/test_split.py \
    tests/recipes
.venv/bin/python tests/soak/prepared.py
.venv/bin/python tests/soak/mutants.py
.venv/bin/python tests/soak/tail.py
.venv/bin/python tests/soak/judges.py
for comparison in methods rounds "critic --iterations 20" "critic_1024 --iterations 20"; do
    # Words of their own: the last one names its iterations, too.
    # shellcheck disable=SC2086
    .venv/bin/python tests/soak/algorithms.py --run "${SOAK_DIR:-runs/soak}/algorithms" --out docs/images --compare $comparison
done
.venv/bin/python tests/soak/bad_inputs.py
bash tests/soak/versions.sh
