#!/usr/bin/env bash
# Stage 1, the linguistic cold start, on 8 nodes of 8 GPUs:
#
#   OVR_DATA=sets/cold OVR_MODEL=Qwen2.5-VL-7B-Instruct sbatch slurm/coldstart_64gpu.sh run.dir=/shared/runs/cold [key=value ...]
#
# What stands below is a default: options of sbatch (--nodes=2 --partition=...) and SBATCH_* variables come before it.
# Without Slurm the same command with bash in sbatch's place runs on this machine. docs/slurm.md has everything.
#SBATCH --job-name=ovr-coldstart
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
launch_stage coldstart cold_start_7b_64gpu "$@"
