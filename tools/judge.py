"""Have evaluated responses judged by a model: ``tools/judge.py SET.json ... --judge JUDGE``."""

from ovr_megatron.evaluation.verdict_command import main

if __name__ == "__main__":
    main()
