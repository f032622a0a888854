"""One PPO iteration taken apart, with a plain counterpart beside each part that has one.

Phases in seconds and shares; generation beside vLLM on its own with the same prompts, parameters and seeds; the update
of the engine's weights beside a plain copy of the same bytes, and its sleep; verdicts a second.  Elsewhere than on a
GPU the iteration is the quickstart's, and the weights are those of a model of about a gigabyte, since a few megabytes
only show what an update costs at least.  On a GPU: 64 prompts x 8 responses of 2,048 tokens at the 3B shape, policy and
critic in turn in host memory, and the weights of the 3B and the 7B model, all of them random.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ovr_megatron.analysis.apart import MeasurementError, rows_of
from ovr_megatron.analysis.published import fill, write_model
from ovr_megatron.config import RLConfig, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.engine import Engine
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.presets import PRESETS
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.iteration import iterate
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rl.training import build_rollouts
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt, banned_tokens
from ovr_megatron.runtime import distributed

PHASES = ("generate", "value", "update", "sync")
TOKENS = 2048  # of a prompt and its response, on a GPU
GRADED = [
    (r"... so \boxed{\frac{3}{4}}", "0.75"),
    (r"... so \boxed{x^2+2x+1}", "(x+1)^2"),
    (r"... so \boxed{\sqrt{20}}", r"2\sqrt{5}"),
    (r"... so \boxed{17}", "71"),
    ("no box at all", "3"),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]


def rows(rounds: int, only: str = "", verdicts: int = 8192) -> list[dict[str, Any]]:
    """Every measurement: ``name``, ``seconds`` and what belongs to it; each part in a process of its own.

    Args:
        rounds: of each part, after a first one that warms up; the best counts.
        only: leave out the parts that have not this in their names: iteration, plain, sync, verdicts.
        verdicts: how many are timed.
    """
    on_gpu = torch.cuda.is_available()
    parts = [("iteration", "3B" if on_gpu else "tiny"), ("plain", "3B" if on_gpu else "tiny")]
    parts += [("sync", model) for model in (("3B", "7B") if on_gpu else ("wide",))]
    found: list[dict[str, Any]] = []
    for part, model in parts:
        if only in part:
            try:
                found += rows_of("ovr_megatron.analysis.bench_rl", part, model, rounds)
            except MeasurementError as error:
                found.append({"name": f"{model}, {part}", "failed": str(error)})
    rates = {row["name"]: row["tokens_per_second"] for row in found if "tokens_per_second" in row}
    if len(rates) == 2:
        next(row for row in found if row["name"] == "generate")["ratio"] = rates["generate"] / rates["plain vLLM"]
    return [*found, grading(verdicts)] if only in "verdicts" else found


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text."""
    lines = [f"{'':32}{'seconds':>10}{'share':>8}{'tokens/s':>10}{'MB':>8}{'GB/s':>7}{'a second':>10}{'ratio':>8}"]
    for row in found:
        if "failed" in row:
            lines.append(f"{row['name']:32} failed: {row['failed']}")
            continue
        line = f"{row['name']:32}{row['seconds']:10.3f}"
        line += f"{row['share']:8.1%}" if "share" in row else " " * 8
        line += f"{row['tokens_per_second']:10,.0f}" if "tokens_per_second" in row else " " * 10
        line += f"{row['bytes'] / 1e6:8,.0f}{row['bytes'] / row['seconds'] / 1e9:7.2f}" if "bytes" in row else " " * 15
        line += f"{row['verdicts'] / row['seconds']:10,.0f}" if "verdicts" in row else " " * 10
        line += f"{row['ratio']:8.2f}" if "ratio" in row else " " * 8
        lines.append(line + (f"  {row['stays'] / 2**30:.2f} GiB stay" if "stays" in row else ""))
    return "\n".join([*lines, "ratio: generate over plain vLLM's rate; an update's seconds over a copy's"])


def grading(count: int) -> dict[str, Any]:
    """``count`` verdicts by two workers that remember none."""
    asked = [GradeRequest(text, answer) for text, answer in GRADED] * (count // len(GRADED) + 1)
    with GraderPool(2, cache=0) as pool:
        pool.grade(asked[:8])
        began = time.perf_counter()
        pool.grade(asked[:count])
        return {"name": "verdicts", "seconds": time.perf_counter() - began, "verdicts": count}


def _config(folder: Path, model: str) -> RLConfig:
    """The quickstart's recipe without its warm-up, or an iteration that fills a GPU; the model's folder is written."""
    values = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    assert isinstance(values, DictConfig)
    values.pop("defaults")
    path = str(write_model(model, folder / "model"))
    own: dict[str, Any] = {"run": {"dir": str(folder / "run")}, "model": {"path": path}}
    own["algorithm"] = {"critic_warmup_iterations": 0}
    if model in PRESETS:
        own["model"] |= {"dtype": "bfloat16", "recompute": "full"}
        own |= {"offload": True, "prompts": 64, "responses": 8, "data": {"pack_tokens": 4 * TOKENS}}
        own["run"]["threads"] = 0
        own["rollout"] = {"max_num_seqs": 512, "gpu_memory_utilization": 0.5}
        own["curriculum"] = [{"until": 1, "max_tokens": TOKENS // 8}, {"until": 1000, "max_tokens": TOKENS}]
    return build(RLConfig, OmegaConf.merge(defaults(RLConfig), values, own))  # type: ignore[arg-type]


def _start(config: RLConfig) -> tuple[Models, Rollouts]:
    """Policy, critic and engine with random weights; nothing is read but the tokenizer."""
    folder = Path(config.model.path)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    processor = Processor(folder, config.data)
    engines = []
    for critic, optimizer in ((False, config.optimizer), (True, config.critic.optimizer)):
        engine = Engine(processor.shape, config.model, config.parallel, world, critic)
        engines.append(fill(engine.with_optimizer(optimizer, config.iterations)))
        if config.offload:
            engine.offload()
    engines[0].sample_from(banned_tokens(processor.shape, processor.tokenizer), config.rollout.temperature)
    models = Models(config, world, processor, engines[0], engines[1], None)
    return models, build_rollouts(config, folder, processor, models)


def _iteration(folder: Path, model: str, rounds: int) -> list[dict[str, Any]]:
    """The phases of the best of ``rounds`` iterations, its rollouts written too."""
    config = _config(folder, model)
    models, rollouts = _start(config)
    rollouts.endless = model in PRESETS
    stream = open_stream(config.data, config.run.seed)
    prompts = PromptStream(stream, models.processor, {})
    best: dict[str, float] = {}
    tokens = 0
    with rollouts.grader:
        for iteration in range(rounds + 1):  # the first one compiles and fills caches
            before, began = stream.state(), time.perf_counter()
            outcome = iterate(models, rollouts, prompts.draw, iteration)
            own = outcome.experience
            arrays = {name: getattr(own, name) for name in archive.ARRAYS}
            archive.write(folder / "run", iteration, outcome.rollout, before, own.responses, arrays, models.world)
            seconds = {name: outcome.metrics[f"timing/{name}"] for name in PHASES}
            seconds["iteration"] = time.perf_counter() - began
            if iteration and seconds["iteration"] < best.get("iteration", float("inf")):
                best, tokens = seconds, sum(own.batch.lengths)
    whole = best.pop("iteration")
    best["the rest"] = whole - sum(best.values())
    found = [{"name": name, "seconds": value, "share": value / whole} for name, value in best.items()]
    found[0]["tokens_per_second"] = tokens / best["generate"]
    aside = best["sync"] + best["the rest"]
    return [*found, {"name": "sync and the rest", "seconds": aside, "share": aside / whole}]


def _plain(folder: Path, model: str, rounds: int) -> list[dict[str, Any]]:
    """VLLM with the arguments that we give it and nothing of ours inside, on the prompts of those iterations."""
    from vllm import LLM, SamplingParams

    config, endless = _config(folder, model), model in PRESETS
    processor = Processor(folder / "model", config.data)
    prompts = PromptStream(open_stream(config.data, config.run.seed), processor, {})
    device: dict[str, Any] = {
        "kv_cache_memory_bytes": 256 << 20,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": 8192,
    }
    if torch.cuda.is_available():
        device = {"gpu_memory_utilization": config.rollout.memory_share(config.offload)}
    engine = LLM(
        model=str(folder / "model"),
        load_format="dummy",
        dtype=config.model.dtype,  # type: ignore[arg-type]
        max_model_len=max(stage.max_tokens for stage in config.curriculum),
        max_num_seqs=config.rollout.max_num_seqs,
        limit_mm_per_prompt={"image": config.data.max_images},
        mm_processor_kwargs=processor.mm_processor_kwargs,
        generation_config="vllm",
        **device,
    )
    ends = [processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    best = 0.0
    seconds = 0.0
    for iteration in range(rounds + 1):
        samples = processor.encode(prompts.draw(config.prompts), generation=True)
        limit = max_tokens(config.curriculum, iteration)
        inputs, params = [], []
        for number, sample in enumerate(samples):
            prompt = Prompt(sample.prompt_tokens, sample.images)
            media = {"multi_modal_data": {"image": list(prompt.images)}} if prompt.images else {}
            inputs.append({"prompt_token_ids": list(prompt.tokens), **media})
            params.append(
                SamplingParams(
                    n=config.responses,
                    seed=seeds_of(config.run.seed, iteration, number, config.responses)[0],
                    temperature=1.0,
                    max_tokens=limit - len(sample),
                    ignore_eos=True,
                    stop_token_ids=None if endless else ends,
                    detokenize=False,
                    logprobs=0,
                )
            )
        began = time.perf_counter()
        answers = engine.generate(inputs, params, use_tqdm=False)  # type: ignore[arg-type]
        spent = time.perf_counter() - began
        rate = sum(len(one.token_ids) for answer in answers for one in answer.outputs) / spent
        if iteration and rate > best:
            best, seconds = rate, spent
        engine.reset_prefix_cache()
    return [{"name": "plain vLLM", "seconds": seconds, "tokens_per_second": best}]


def _sync(folder: Path, model: str, rounds: int) -> list[dict[str, Any]]:
    """New weights into an engine, the same bytes copied once, and on a GPU sleep and waking up."""
    config = _config(folder, model)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    processor = Processor(folder / "model", config.data)
    policy = fill(Engine(processor.shape, config.model, config.parallel, world))
    policy.offload("gradients")
    free = _free_bytes()
    rollout = replace(config.rollout, gpu_memory_utilization=0.3)
    engine = RolloutEngine(folder / "model", rollout, processor, config.model.dtype, TOKENS, empty=True)
    held = policy.held()
    source = [one.parameter.detach() for one in held]
    size = sum(tensor.nbytes for tensor in source)
    ours = {"name": f"{model}, weights to vLLM", "seconds": _least(rounds, lambda: engine.update(held)), "bytes": size}
    plain = {"name": f"{model}, plain copy", "seconds": _copy_seconds(rounds, source), "bytes": size}
    found = [ours | {"ratio": ours["seconds"] / plain["seconds"]}, plain]
    wakes: dict[str, Callable[[], object]] = {
        "sleep, level 1": lambda: engine.score([]),
        "sleep, level 2": lambda: engine.update(held),
    }
    for name, wake in wakes.items() if torch.cuda.is_available() else ():
        asleep = _timed(partial(engine.sleep, deep=name.endswith("2")))
        found.append({"name": f"{model}, {name}", "seconds": asleep, "stays": free - _free_bytes()})
        what = "and update after it" if name.endswith("2") else "after it"
        found.append({"name": f"{model}, wake {what}", "seconds": _timed(wake)})
    return found


def _copy_seconds(rounds: int, source: Sequence[torch.Tensor]) -> float:
    """Seconds of a copy of ``source`` tensor by tensor; its memory is given back."""
    target = [torch.empty_like(tensor) for tensor in source]

    def copy() -> None:
        for to, tensor in zip(target, source, strict=True):
            to.copy_(tensor)

    seconds = _least(rounds, copy)
    target.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return seconds


def _free_bytes() -> int:
    """Free memory of the GPU; 0 without one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def _timed(act: Callable[[], object]) -> float:
    """Seconds until the device has done what ``act`` asks for."""
    began = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _least(rounds: int, act: Callable[[], object]) -> float:
    """`_timed`, the best of ``rounds`` after a first time."""
    act()
    return min(_timed(act) for _ in range(rounds))


def main() -> None:
    """Measure one part of one model and print its rows as JSON lines."""
    part, model, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    folder = Path(tempfile.mkdtemp(prefix="bench_rl_"))
    try:
        for row in {"iteration": _iteration, "plain": _plain, "sync": _sync}[part](folder, model, rounds):
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
