"""Evaluate a model with vLLM: ``tools/evaluate.py --model DIR --data [NAME=]SRC --out DIR [--samples K]``."""

from ovr_megatron.evaluation.command import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
