"""Evaluate a model with vLLM: ``tools/evaluate.py --model DIR --data [NAME=]SRC --out DIR [--samples K]``."""

from ovr_megatron.evaluation.command import main

if __name__ == "__main__":
    main()
