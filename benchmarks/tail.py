"""Measure how long engines wait for the longest responses: one shared queue, and rounds that postpone long prompts.

``torchrun --nproc-per-node 2 -m benchmarks.tail ITERATIONS PROMPTS OVERSAMPLE BETWEEN`` prints a JSON row for each way.

vLLM generates every token; only where a response ends is decided beforehand.  Lengths are log-normal with the paper's
shape at a hundredth of its size: 70 tokens on average, at most 240 (7k and 24k).  ``BETWEEN`` is the share of the
variance that all responses to a prompt have in common, since a hard prompt has long responses.  A prompt that is
generated again has the same lengths again.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from benchmarks.subprocess_bench import BenchRow, run_in_subprocess
from ovr_megatron.config import ParallelConfig, RLConfig, build, defaults
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rl.setup import build_models, build_rollouts, open_model_and_prompts
from ovr_megatron.rollout.engine import RolloutEngine, request_of
from ovr_megatron.rollout.sampling import Prompt, sampling_params
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World

MEAN, LONGEST, SIGMA = 70, 240, 0.62  # of the paper's responses: a hundredth of 7k and of 24k
OPTIONS = ("responses=4", "rollout.max_num_seqs=64", "curriculum=[{until: 1000, max_tokens: 320}]")


def run(iterations: int, prompts: int, oversample: float, between: float) -> list[BenchRow]:
    """Start the two processes and return the rows that they print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    rows = run_in_subprocess(__name__, iterations, prompts, oversample, between, launcher=launcher)
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
    return rows


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text; ``ratio`` is the first row's seconds over the row's."""
    lines = [f"{'':34}{'prompts':>8}{'seconds':>9}{'idle':>7}{'ratio':>7}"]
    for row in rows:
        lines.append(
            f"{row['name']:34}{row['prompts']:8}{row['seconds']:9.2f}{row['idle_share']:7.1%}{row['ratio']:7.2f}"
        )
    return "\n".join(lines)


def response_lengths(prompt: Sequence[int], count: int, between: float) -> list[int]:
    """Return the lengths of ``count`` responses to a prompt, a function of its tokens alone."""
    draw = random.Random(f"{list(prompt)}")
    mu = math.log(MEAN) - SIGMA**2 / 2
    common = draw.gauss(0, SIGMA * math.sqrt(between))
    lengths = []
    for _ in range(count):
        own = draw.gauss(0, SIGMA * math.sqrt(1 - between))
        length = round(math.exp(mu + common + own))
        lengths.append(min(max(length, 1), LONGEST))
    return lengths


def force_lengths(engine: RolloutEngine, between: float) -> None:
    """Have ``engine`` end each response after its length of `response_lengths`, and nowhere else."""

    def enqueue(prompt: Prompt) -> list[str]:
        params = []
        lengths = response_lengths(prompt.tokens, len(prompt.seeds), between)
        for seed, length in zip(prompt.seeds, lengths, strict=True):
            sampling = replace(prompt.sampling, max_tokens=length, endless=True)
            params += sampling_params(replace(prompt, seeds=[seed], sampling=sampling), [], [])
        return engine._llm.enqueue([request_of(prompt)] * len(params), params, use_tqdm=False)

    engine._enqueue = enqueue  # type: ignore[method-assign]


def make_config(folder: Path, prompts: int) -> RLConfig:
    """Return the quickstart's settings with short text prompts."""
    recipe = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    assert isinstance(recipe, DictConfig)
    recipe.pop("defaults")
    options = [*OPTIONS, f"prompts={prompts}", f"model.path={folder / 'model'}", f"run.dir={folder / 'run'}"]
    source = {"data": {"sources": [{"path": "puzzle:digits?form=text&task=sum&answered=0", "name": "text"}]}}
    merged = OmegaConf.merge(defaults(RLConfig), recipe, source, OmegaConf.from_dotlist(options))
    return build(RLConfig, merged)  # type: ignore[arg-type]


def measure(rollouts: Rollouts, config: RLConfig, world: World, name: str, iterations: int) -> BenchRow:
    """Generate ``iterations`` iterations, after one that warms up; ``config`` says how.  A collective."""
    rollouts.config = config
    _, prompts = open_model_and_prompts(config, SkippedRows())
    seconds = 0.0
    idle_s = 0.0
    trained = 0
    limit = config.curriculum[0].max_tokens
    for iteration in range(iterations + 1):
        dist.barrier()
        began = time.perf_counter()
        rollout = rollouts.collect(prompts, iteration, limit)
        dist.barrier()
        if iteration:
            seconds += time.perf_counter() - began
            idle_s += rollout.metrics["timing/rollout_idle"]
            trained += len(rollout.train_prompts)
        rollouts.engine.sleep()  # drops the caches, as an update would
    return {
        "name": name,
        "prompts": trained,
        "seconds": seconds,
        "idle_s": idle_s,
        "idle_share": idle_s / seconds,
    }


def main() -> None:
    """Measure both ways one after the other, with the same engines."""
    iterations, prompt_count = int(sys.argv[1]), int(sys.argv[2])
    oversample, between = float(sys.argv[3]), float(sys.argv[4])
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    names = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(names)
    folder = Path(names[0])
    if world.is_main:
        make_tiny_model(folder / "model", tied=True, seed=1)
    dist.barrier()
    config = make_config(folder, prompt_count)
    model_folder, prompts = open_model_and_prompts(config, SkippedRows())
    models, _ = build_models(config, model_folder, prompts.processor, world, training=False)
    rollouts = build_rollouts(config, model_folder, prompts.processor, models)
    force_lengths(rollouts.engine, between)
    ways = {
        "shared queue": replace(config.rollout, schedule="shared"),
        f"shared queue, oversample={oversample:g}": replace(config.rollout, schedule="shared", oversample=oversample),
        f"static, oversample={oversample:g}": replace(config.rollout, oversample=oversample),
    }
    with rollouts.grader:
        for name, rollout_config in ways.items():
            row = measure(rollouts, replace(config, rollout=rollout_config), world, name, iterations)
            if world.is_main:
                print(json.dumps(row), flush=True)
    if world.is_main:
        shutil.rmtree(folder)
    distributed.finish()


if __name__ == "__main__":
    main()
