"""Seconds that judges add to the generation of an iteration: ``tests/soak/judges.py [--prompts N] [--responses N]``.

Rounds whose responses are graded by a rule and rounds whose responses are judged by a server on this machine, which
answers after a latency, are measured in turns, each pair with the same prompts and in the reverse order of the pair
before: a machine that becomes slower or faster over the minutes so changes both alike. Every response counts as
finished, so that all are graded. Exits 1 if the judged rounds take more than 5 % longer, or a response has no verdict.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tail import make_config
from ovr_megatron.config import ParallelConfig, RewardJudgeConfig, RLConfig
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rl.setup import build_models, build_rollouts, open_model_and_prompts, start_graders
from ovr_megatron.rollout import pending
from ovr_megatron.runtime import distributed

SERVER = Path(__file__).resolve().parents[1] / "rewards" / "judge_server.py"
BOUND = 0.05
SOURCE = "text"


def finish_all() -> None:
    """Have every response count as finished by itself."""
    read = pending.generations
    vars(pending)["generations"] = lambda output: [replace(g, stopped=True) for g in read(output)]


def measure(rollouts: Rollouts, config: RLConfig, pair: int) -> tuple[float, dict[str, float]]:
    """Return the seconds of a round with its verdicts, and its metrics; ``pair`` chooses the prompts."""
    rollouts.config = config
    stream = open_model_and_prompts(config, SkippedRows())[1]
    stream.draw(pair * config.prompts)
    began = time.perf_counter()
    rollout = rollouts.collect(stream, pair, config.curriculum[0].max_tokens)
    seconds = time.perf_counter() - began
    assert all(response.rewarded for response in rollout.responses)
    rollouts.engine.sleep()  # drops the caches, as an update would
    return seconds, rollout.metrics


def main() -> int:
    """Measure, print the table, and return 1 where judges cost too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="of a round")
    parser.add_argument("--responses", type=int, default=16, help="to each prompt")
    parser.add_argument("--pairs", type=int, default=2, help="of a round with a rule and one with a judge; even")
    parser.add_argument("--latency-s", type=float, default=0.2, help="of the server")
    arguments = parser.parse_args()
    if arguments.pairs < 2 or arguments.pairs % 2:
        parser.error(f"--pairs {arguments.pairs} has not as many of either order; give an even number")
    server = subprocess.Popen(
        [sys.executable, str(SERVER), "--latency-s", str(arguments.latency_s)], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    url = f"http://127.0.0.1:{int(server.stdout.readline())}/v1"
    folder = Path(tempfile.mkdtemp())
    try:
        return compare(folder, url, arguments)
    finally:
        server.kill()
        shutil.rmtree(folder)


def compare(folder: Path, url: str, arguments: argparse.Namespace) -> int:
    """Measure pairs of rounds after one that warms up."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    make_tiny_model(folder / "model", tied=True, seed=1)
    ruled = replace(make_config(folder, arguments.prompts), responses=arguments.responses)
    judge = RewardJudgeConfig(base_url=url, model="m", template="answer")
    reward = replace(ruled.reward, rules={SOURCE: "judge:j"}, judges={"j": judge})
    judged = replace(ruled, reward=reward)
    model_folder, stream = open_model_and_prompts(ruled, SkippedRows())
    models, _ = build_models(ruled, model_folder, stream.processor, world, training=False)
    rollouts = build_rollouts(ruled, model_folder, stream.processor, models)
    finish_all()
    ruled_graders = rollouts.grader
    seconds: dict[str, list[float]] = {"rule": [], "judge": []}
    after = []
    with ruled_graders, start_graders(judged, world) as judged_graders:
        sides = {"rule": (ruled, ruled_graders), "judge": (judged, judged_graders)}
        for pair in range(arguments.pairs + 1):
            count = arguments.prompts if pair else 16  # the first one warms up
            for side in ("rule", "judge") if pair % 2 else ("judge", "rule"):
                config, rollouts.grader = sides[side]
                round_seconds, metrics = measure(rollouts, replace(config, prompts=count), pair)
                if not pair:
                    continue
                seconds[side].append(round_seconds)
                print(f"pair {pair}: {side} {round_seconds:.2f} s", flush=True)
                if side == "judge":
                    judge_metrics = metrics
                    after.append(metrics["timing/grade_after"])
    count = arguments.prompts * arguments.responses
    requests = judge_metrics["grading/judge_requests"]
    rule_s, judge_s = (sum(side_seconds) / arguments.pairs for side_seconds in seconds.values())
    added = judge_s / rule_s - 1
    print(
        f"{count} responses a round, latency {arguments.latency_s:g} s, {requests:.0f} requests in the last one: rule "
        f"{rule_s:.2f} s, judge {judge_s:.2f} s ({added:+.1%}), of these {sum(after) / len(after):.2f} s after the "
        "last response"
    )
    distributed.finish()
    return int(added > BOUND)


if __name__ == "__main__":
    sys.exit(main())
