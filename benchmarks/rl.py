"""Measure the parts of a PPO iteration, each beside a plain counterpart where there is one.

- The phases of an iteration, in seconds and shares.
- Generation beside vLLM on its own with the same prompts, parameters and seeds.
- The update of the engine's weights beside a plain copy of the same bytes, and on a GPU sleep and waking up.
- Verdicts a second.

On a GPU: 64 prompts x 8 responses of 2,048 tokens at the 3B shape, policy and critic offloaded in turn, and the weights
of the 3B and the 7B model, all of them random.  Without a GPU the iteration is the quickstart's, and the weights are
those of a model of about a gigabyte: with a few megabytes an update takes no more than its fixed cost.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks.random_models import randomise_engine, write_model
from benchmarks.subprocess_bench import BenchRow, MeasurementError, run_in_subprocess
from ovr_megatron.config import RLConfig, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.engine import Engine
from ovr_megatron.families import family_of
from ovr_megatron.families.presets import presets
from ovr_megatron.launch import RECIPES
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.iteration import iterate
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rl.setup import build_rollouts
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.model import register_model
from ovr_megatron.rollout.sampling import Prompt, banned_tokens
from ovr_megatron.runtime import distributed

PHASES = ("generate", "value", "update", "sync")
TOKENS = 2048  # of a prompt and its response, on a GPU
GRADED_ANSWERS = [
    (r"... so \boxed{\frac{3}{4}}", "0.75"),
    (r"... so \boxed{x^2+2x+1}", "(x+1)^2"),
    (r"... so \boxed{\sqrt{20}}", r"2\sqrt{5}"),
    (r"... so \boxed{17}", "71"),
    ("no box at all", "3"),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]


def run(rounds: int, only: str = "", verdicts: int = 8192) -> list[BenchRow]:
    """Run every measurement, each part in a new process, and return a row with ``name`` and ``seconds`` for each.

    Args:
        rounds: of each part, after a first one that warms up; the best counts.
        only: leave out the parts that do not have this in their names: iteration, plain, sync, verdicts.
        verdicts: how many are timed.
    """
    on_gpu = torch.cuda.is_available()
    model = "3B" if on_gpu else "tiny"
    parts = [("iteration", model), ("plain", model)]
    parts += [("sync", name) for name in (("3B", "7B") if on_gpu else ("wide",))]
    rows: list[BenchRow] = []
    for part, name in parts:
        if only in part:
            try:
                rows += run_in_subprocess(__name__, part, name, rounds)
            except MeasurementError as error:
                rows.append({"name": f"{name}, {part}", "failed": str(error)})
    generation = {row["name"]: row for row in rows if "tokens_per_second" in row}
    if len(generation) == 2:  # neither was left out or failed
        plain_rate = generation["plain vLLM"]["tokens_per_second"]
        generation["generate"]["ratio"] = generation["generate"]["tokens_per_second"] / plain_rate
    if only in "verdicts":
        rows.append(measure_grading(verdicts))
    return rows


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text."""
    lines = [f"{'':32}{'seconds':>10}{'share':>8}{'tokens/s':>10}{'MB':>8}{'GB/s':>7}{'a second':>10}{'ratio':>8}"]
    for row in rows:
        if "failed" in row:
            lines.append(f"{row['name']:32} failed: {row['failed']}")
            continue
        line = f"{row['name']:32}{row['seconds']:10.3f}"
        line += f"{row['share']:8.1%}" if "share" in row else " " * 8
        line += f"{row['tokens_per_second']:10,.0f}" if "tokens_per_second" in row else " " * 10
        line += f"{row['bytes'] / 1e6:8,.0f}{row['bytes'] / row['seconds'] / 1e9:7.2f}" if "bytes" in row else " " * 15
        line += f"{row['verdicts'] / row['seconds']:10,.0f}" if "verdicts" in row else " " * 10
        line += f"{row['ratio']:8.2f}" if "ratio" in row else " " * 8
        line += f"  {row['stays'] / 2**30:.2f} GiB stay" if "stays" in row else ""
        lines.append(line)
    lines.append("ratio: generate over plain vLLM's rate; an update's seconds over a copy's")
    return "\n".join(lines)


def measure_grading(count: int) -> BenchRow:
    """Measure ``count`` verdicts by two workers without a cache of verdicts."""
    answers = GRADED_ANSWERS * (count // len(GRADED_ANSWERS) + 1)
    requests = [GradeRequest(text, answer) for text, answer in answers]
    with GraderPool(2, cache=0) as pool:
        pool.grade(requests[:8])  # starts the workers
        start = time.perf_counter()
        pool.grade(requests[:count])
        return {"name": "verdicts", "seconds": time.perf_counter() - start, "verdicts": count}


def _make_config(folder: Path, model: str) -> RLConfig:
    """Write the model into ``folder`` and return the settings of an iteration.

    A published model gets an iteration that fills a GPU, another one the quickstart's recipe without its warm-up.
    """
    recipe = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    assert isinstance(recipe, DictConfig)
    recipe.pop("defaults")
    path = str(write_model(model, folder / "model"))
    overrides: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": path},
        "algorithm": {"critic_warmup_iterations": 0},
    }
    if model in presets():
        overrides["model"] |= {"dtype": "bfloat16", "recompute": "full"}
        overrides |= {"offload": True, "prompts": 64, "responses": 8, "data": {"pack_tokens": 4 * TOKENS}}
        overrides["run"]["threads"] = 0
        overrides["rollout"] = {"max_num_seqs": 512, "gpu_memory_utilization": 0.5}
        # The first iteration, which warms up, is a short one.
        overrides["curriculum"] = [{"until": 1, "max_tokens": TOKENS // 8}, {"until": 1000, "max_tokens": TOKENS}]
    return build(RLConfig, OmegaConf.merge(defaults(RLConfig), recipe, overrides))  # type: ignore[arg-type]


def _start(config: RLConfig) -> tuple[Models, Rollouts]:
    """Return policy, critic and rollout engine with random weights; only configuration and tokenizer are read."""
    folder = Path(config.model.path)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    processor = Processor(folder, config.data)
    engines = []
    for critic, optimizer in ((False, config.optimizer), (True, config.critic.optimizer)):
        engine = Engine(processor.shape, config.model, config.parallel, world, critic)
        engines.append(randomise_engine(engine.with_optimizer(optimizer, config.iterations)))
        if config.offload:
            engine.offload()  # before the next one is made, which could not fit beside it
    engines[0].sample_from(banned_tokens(processor.shape, processor.tokenizer), config.rollout.temperature)
    models = Models(config, world, processor, engines[0], engines[1], None)
    return models, build_rollouts(config, folder, processor, models)


def _measure_iteration(folder: Path, model: str, rounds: int) -> list[BenchRow]:
    """Return the phases of the best of ``rounds`` iterations, including the writing of its rollouts."""
    config = _make_config(folder, model)
    models, rollouts = _start(config)
    rollouts.endless = model in presets()
    stream = open_stream(config.data, config.run.seed)
    prompts = PromptStream(stream, models.processor, {})
    best: dict[str, float] = {}
    tokens = 0
    with rollouts.grader:
        for iteration in range(rounds + 1):  # the first one compiles and fills caches
            stream_state = prompts.state()
            start = time.perf_counter()
            outcome = iterate(models, rollouts, prompts, iteration)
            experience = outcome.experience
            arrays = {name: getattr(experience, name) for name in archive.ARRAYS}
            archive.write(
                folder / "run",
                iteration,
                outcome.rollout,
                stream_state,
                experience.responses,
                arrays,
                models.world,
            )
            # The phases as the iteration itself measures them; what they leave is "the rest".
            seconds = {name: outcome.metrics[f"timing/{name}"] for name in PHASES}
            seconds["iteration"] = time.perf_counter() - start
            if iteration and seconds["iteration"] < best.get("iteration", float("inf")):
                best = seconds
                tokens = sum(experience.batch.lengths)
    total = best.pop("iteration")
    best["the rest"] = total - sum(best.values())
    rows = [{"name": name, "seconds": value, "share": value / total} for name, value in best.items()]
    generate = rows[0]  # the first of `PHASES`
    generate["tokens_per_second"] = tokens / best["generate"]
    overhead = best["sync"] + best["the rest"]
    return [*rows, {"name": "sync and the rest", "seconds": overhead, "share": overhead / total}]


def _measure_plain_vllm(folder: Path, model: str, rounds: int) -> list[BenchRow]:
    """Measure vLLM with our arguments and none of our code inside, on the prompts of the same iterations."""
    from vllm import SamplingParams  # noqa: PLC0415 (seconds, and not every rival needs it)

    config = _make_config(folder, model)
    endless = model in presets()
    processor = Processor(folder / "model", config.data)
    prompts = PromptStream(open_stream(config.data, config.run.seed), processor, {})
    engine = _start_plain_vllm(folder, config, processor)
    stop_tokens = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    best_rate = 0.0
    best_seconds = 0.0
    for iteration in range(rounds + 1):  # the first one warms up
        samples = processor.encode(prompts.draw(config.prompts), generation=True)
        limit = max_tokens(config.curriculum, iteration)
        inputs = []
        params = []
        for index, sample in enumerate(samples):
            prompt = Prompt(sample.prompt_tokens, sample.images)
            media = {"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {}
            inputs.append({"prompt_token_ids": list(prompt.tokens), **media})
            params.append(
                SamplingParams(
                    n=config.responses,
                    seed=seeds_of(config.run.seed, iteration, index, config.responses)[0],
                    temperature=1.0,
                    max_tokens=limit - len(sample),
                    ignore_eos=True,
                    stop_token_ids=None if endless else stop_tokens,
                    detokenize=False,
                    logprobs=0,
                )
            )
        start = time.perf_counter()
        answers = engine.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = 0
        for answer in answers:
            tokens += sum(len(response.token_ids) for response in answer.outputs)
        if iteration and tokens / seconds > best_rate:
            best_rate = tokens / seconds
            best_seconds = seconds
        # The next iteration may repeat a prompt, whose computation must not be reused.
        engine.reset_prefix_cache()
    return [{"name": "plain vLLM", "seconds": best_seconds, "tokens_per_second": best_rate}]


def _start_plain_vllm(folder: Path, config: RLConfig, processor: Processor) -> Any:
    """Return an ``LLM`` of vLLM with random weights, set up as our rollout engine sets it up."""
    from vllm import LLM  # noqa: PLC0415 (seconds, and not every rival needs it)

    device: dict[str, Any] = {
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 8192,
    }
    if torch.cuda.is_available():
        device = {"gpu_memory_utilization": config.rollout.memory_share(config.offload)}
    register_model(family_of(processor.shape))
    return LLM(
        model=str(folder / "model"),
        load_format="dummy",
        dtype=config.model.dtype,
        max_model_len=max(stage.max_tokens for stage in config.curriculum),
        max_num_seqs=config.rollout.max_num_seqs,
        limit_mm_per_prompt={"image": config.data.max_images},
        mm_processor_kwargs=processor.mm_processor_kwargs,
        generation_config="vllm",
        **device,
    )


def _measure_sync(folder: Path, model: str, rounds: int) -> list[BenchRow]:
    """Measure new weights into an engine beside one copy of the same bytes, and on a GPU sleep and waking up."""
    config = _make_config(folder, model)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    processor = Processor(folder / "model", config.data)
    policy = randomise_engine(Engine(processor.shape, config.model, config.parallel, world))
    policy.offload("gradients")  # an update does not need them
    free_before = _free_bytes()
    rollout = replace(config.rollout, gpu_memory_utilization=0.3)
    engine = RolloutEngine(folder / "model", rollout, processor, config.model.dtype, TOKENS, empty=True)
    shards = policy.held()
    source = [shard.parameter.detach() for shard in shards]
    size = sum(tensor.nbytes for tensor in source)
    update_seconds = _least_seconds(rounds, lambda: engine.update(shards))
    copy_seconds = _copy_seconds(rounds, source)
    rows: list[BenchRow] = [
        {
            "name": f"{model}, weights to vLLM",
            "seconds": update_seconds,
            "bytes": size,
            "ratio": update_seconds / copy_seconds,
        },
        {"name": f"{model}, plain copy", "seconds": copy_seconds, "bytes": size},
    ]
    if torch.cuda.is_available():
        # Level 1 keeps the weights, and the next request wakes the engine; after level 2 it needs new weights.
        sleep_seconds = _seconds(lambda: engine.sleep(deep=False))
        stays = free_before - _free_bytes()
        wake_seconds = _seconds(lambda: engine.score([]))
        rows.append({"name": f"{model}, sleep, level 1", "seconds": sleep_seconds, "stays": stays})
        rows.append({"name": f"{model}, wake after it", "seconds": wake_seconds})
        sleep_seconds = _seconds(lambda: engine.sleep(deep=True))
        stays = free_before - _free_bytes()
        wake_seconds = _seconds(lambda: engine.update(shards))
        rows.append({"name": f"{model}, sleep, level 2", "seconds": sleep_seconds, "stays": stays})
        rows.append({"name": f"{model}, wake and update after it", "seconds": wake_seconds})
    return rows


def _copy_seconds(rounds: int, source: Sequence[torch.Tensor]) -> float:
    """Return the seconds of a copy of ``source`` tensor by tensor; its memory is freed afterwards."""
    target = [torch.empty_like(tensor) for tensor in source]

    def copy() -> None:
        for destination, tensor in zip(target, source, strict=True):
            destination.copy_(tensor)

    seconds = _least_seconds(rounds, copy)
    # `copy` still refers to the list, which therefore has to be emptied; and what torch caches, vLLM cannot use.
    target.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return seconds


def _free_bytes() -> int:
    """Return the free memory of the GPU; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _seconds(act: Callable[[], object]) -> float:
    """Return the seconds until the device has done what ``act`` asks for."""
    start = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _least_seconds(rounds: int, act: Callable[[], object]) -> float:
    """Return the least `_seconds` of ``rounds`` after a first time, which warms up."""
    act()
    return min(_seconds(act) for _ in range(rounds))


_PARTS = {"iteration": _measure_iteration, "plain": _measure_plain_vllm, "sync": _measure_sync}


def main() -> None:
    """Measure one part of one model and print its rows as JSON lines."""
    part, model, rounds = sys.argv[1:4]
    folder = Path(tempfile.mkdtemp(prefix="bench_rl_"))
    try:
        for row in _PARTS[part](folder, model, int(rounds)):
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
