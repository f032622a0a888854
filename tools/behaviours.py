"""Count cognitive behaviours: ``tools/behaviours.py NAME=RESPONSES.jsonl ... --out DIR [--judge JUDGE]``."""

from ovr_megatron.evaluation.behaviour_command import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
