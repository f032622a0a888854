#!/usr/bin/env bash
# Stage 2, multimodal PPO with the length curriculum of its recipe, on 8 nodes of 8 GPUs:
#
#   OVR_DATA=problems.jsonl OVR_MODEL=runs/cold/checkpoints/step_000900 sbatch slurm/rl.sh run.dir=/shared/runs/rl [key=value ...]
#
# What stands below is a default: options of sbatch (--nodes=2 --partition=...) and SBATCH_* variables come before it.
# Without Slurm the same command with bash in sbatch's place runs on this machine. docs/slurm.md has everything.
#SBATCH --job-name=ovr-rl
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

script="${BASH_SOURCE[0]}"
if [ ! -e "$(dirname "$script")/launch.sh" ]; then # sbatch runs a copy; Slurm knows the original
    script="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\/slurm\/[a-z0-9_]*\.sh\).*/\1/p')"
fi
root="${OVR_ROOT:-$(cd "$(dirname "$script")/.." && pwd -P)}"
# shellcheck source=slurm/launch.sh
source "$root/slurm/launch.sh"
launch_stage rl rl_7b_64gpu "$@"
