"""Measure how long engines wait for the longest responses: one shared queue, and rounds that postpone or continue them.

``torchrun --nproc-per-node 2 -m benchmarks.tail ITERATIONS PROMPTS OVERSAMPLE BETWEEN STALENESS STEP_MS`` prints a JSON
row for each way.

vLLM generates every token; only where a response ends is decided beforehand.  Lengths are log-normal with the paper's
shape at a hundredth of its size: 70 tokens on average, at most 240 (7k and 24k).  ``BETWEEN`` is the share of the
variance that all responses to a prompt have in common, since a hard prompt has long responses.  A prompt that is
generated again has the same lengths again, and a response that goes on becomes as long as it would have.

A step of an engine takes as long as its tokens need on a CPU, and about the same for one response as for sixty on a
GPU, which reads all weights for either.  ``STEP_MS`` is the least time of a step: what is left of it the engine waits.
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
from vllm.outputs import PoolingRequestOutput, RequestOutput

from benchmarks.subprocess_bench import BenchRow, run_in_subprocess
from ovr_megatron.config import ParallelConfig, RLConfig, build, defaults
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.grading import RoundGrading
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.ppo.round_responses import RoundResponses
from ovr_megatron.ppo.staleness import staleness_metrics, token_staleness
from ovr_megatron.ppo.unfinished import UnfinishedResponses
from ovr_megatron.rl.setup import build_models, build_rollouts, open_model_and_prompts
from ovr_megatron.rollout import pending
from ovr_megatron.rollout.engine import RolloutEngine, request_of
from ovr_megatron.rollout.sampling import Generation, Prompt, generations, sampling_params
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World

MEAN, LONGEST, SIGMA = 70, 240, 0.62  # of the paper's responses: a hundredth of 7k and of 24k
RESPONSES = 4  # to a prompt
OPTIONS = (f"responses={RESPONSES}", "curriculum=[{until: 1000, max_tokens: 320}]")


def run(
    iterations: int,
    prompts: int,
    oversample: float,
    between: float,
    staleness: int,
    step_ms: float,
) -> list[BenchRow]:
    """Start the two processes and return the rows that they print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    rows = run_in_subprocess(__name__, iterations, prompts, oversample, between, staleness, step_ms, launcher=launcher)
    for row in rows:
        row["ratio"] = rows[0]["seconds"] / row["seconds"]
    return rows


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text; ``ratio`` is the first row's seconds over the row's."""
    lines = [f"{'':46}{'prompts':>8}{'seconds':>9}{'idle':>7}{'stale':>7}{'dropped':>9}{'ratio':>7}"]
    for row in rows:
        lines.append(
            f"{row['name']:46}{row['prompts']:8}{row['seconds']:9.2f}{row['idle_share']:7.1%}"
            f"{row['staleness']:7.2f}{row['dropped']:9.0f}{row['ratio']:7.2f}"
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


def force_lengths(engine: RolloutEngine, responses: int, between: float) -> None:
    """Have ``engine`` end each response after its length of `response_lengths`, and nowhere else; none is graded."""
    lengths_of_seed: dict[int, int] = {}
    make_requests = RoundResponses.requests

    def requests(
        parts: RoundResponses, index: int, template: Prompt, limit: int, prompt_tokens: int
    ) -> list[tuple[int, Prompt]]:
        lengths = response_lengths(template.tokens, responses, between)
        lengths_of_seed.update(zip(template.seeds, lengths, strict=True))
        return make_requests(parts, index, template, limit, prompt_tokens)

    def enqueue(prompt: Prompt) -> list[tuple[str, int]]:
        params = []
        for seed in prompt.seeds:
            remaining = lengths_of_seed[seed] - len(prompt.response)
            sampling = replace(prompt.sampling, max_tokens=remaining, endless=True)
            params += sampling_params(replace(prompt, seeds=[seed], sampling=sampling), [], [])
        ids = engine._llm.enqueue([request_of(prompt)] * len(params), params, use_tqdm=False)
        return [(request_id, 1) for request_id in ids]

    def finished(output: RequestOutput) -> list[Generation]:
        # The length limit ended them: without this they would go on in the next round.
        return [replace(generation, stopped=True) for generation in generations(output)]

    RoundResponses.requests = requests  # type: ignore[assignment, method-assign]
    engine._enqueue = enqueue  # type: ignore[method-assign]
    RoundGrading._submit = leave_ungraded  # type: ignore[assignment, method-assign]
    RoundGrading.is_graded = is_answered  # type: ignore[assignment, method-assign]
    vars(pending)["generations"] = finished


def hold_steps(engine: RolloutEngine, step_ms: float) -> None:
    """Have each step of ``engine`` take at least ``step_ms``."""
    vllm_engine = engine._llm.llm_engine
    step = vllm_engine.step

    def held_step() -> list[RequestOutput | PoolingRequestOutput]:
        end = time.perf_counter() + step_ms / 1000
        outputs = step()
        time.sleep(max(0.0, end - time.perf_counter()))
        return outputs

    vllm_engine.step = held_step


def leave_ungraded(grading: RoundGrading, response: Response) -> None:
    """Give a response no verdict, as it has none that means anything."""


def is_answered(grading: RoundGrading, prompt: int) -> bool:
    """Return True, as nothing is missing of a prompt that was answered."""
    return True


def make_config(folder: Path, prompts: int) -> RLConfig:
    """Return the quickstart's settings with short text prompts."""
    recipe = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    assert isinstance(recipe, DictConfig)
    recipe.pop("defaults")
    # All responses of a round start at once.
    slots = max(64, RESPONSES * prompts)
    options = [*OPTIONS, f"rollout.max_num_seqs={slots}", f"prompts={prompts}"]
    options += [f"model.path={folder / 'model'}", f"run.dir={folder / 'run'}"]
    source = {"data": {"sources": [{"path": "puzzle:digits?form=text&task=sum&answered=0", "name": "text"}]}}
    merged = OmegaConf.merge(defaults(RLConfig), recipe, source, OmegaConf.from_dotlist(options))
    return build(RLConfig, merged)  # type: ignore[arg-type]


def measure(rollouts: Rollouts, config: RLConfig, world: World, name: str, iterations: int) -> BenchRow:
    """Generate ``iterations`` iterations, after one that warms up; ``config`` says how.  A collective."""
    rollouts.config = config
    rollouts.unfinished = UnfinishedResponses()
    _, prompts = open_model_and_prompts(config, SkippedRows())
    seconds = 0.0
    idle_s = 0.0
    trained = 0
    staleness = 0.0
    dropped = 0.0
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
            trained_responses = [r for r in rollout.responses if r.prompt in rollout.train_prompts]
            ages = token_staleness(trained_responses, iteration)
            staleness += staleness_metrics(ages, ages=1)["rollout/staleness_mean"] / iterations
            dropped += rollout.metrics.get("rollout/dropped_for_age", 0.0)
        rollouts.engine.sleep()  # drops the caches, as an update would
    return {
        "name": name,
        "prompts": trained,
        "seconds": seconds,
        "idle_s": idle_s,
        "idle_share": idle_s / seconds,
        "staleness": staleness,
        "dropped": dropped,
    }


def main() -> None:
    """Measure all ways one after the other, with the same engines."""
    iterations, prompt_count = int(sys.argv[1]), int(sys.argv[2])
    oversample, between, max_staleness = float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5])
    step_ms = float(sys.argv[6])
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
    force_lengths(rollouts.engine, config.responses, between)
    if step_ms:
        hold_steps(rollouts.engine, step_ms)
    static = replace(config.rollout, oversample=oversample)
    ways = {
        "shared queue": replace(config.rollout, schedule="shared"),
        f"shared queue, oversample={oversample:g}": replace(static, schedule="shared"),
        f"static, oversample={oversample:g}": static,
        f"static, oversample={oversample:g}, max_staleness={max_staleness}": replace(
            static, max_staleness=max_staleness
        ),
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
