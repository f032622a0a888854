"""Count cognitive behaviours: ``tools/behaviours.py NAME=RESPONSES.jsonl ... --out DIR [--judge JUDGE]``."""

from ovr_megatron.evaluation.behaviour_command import main

if __name__ == "__main__":
    main()
