"""Have evaluated responses judged by a model: ``tools/judge.py SET.json ... --judge JUDGE``."""

from ovr_megatron.evaluation.verdict_command import main
from ovr_megatron.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
