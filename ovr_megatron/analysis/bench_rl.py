"""One PPO iteration taken apart, with a plain counterpart beside each part that has one.

Phases in seconds and shares; generation beside vLLM on its own with the same prompts, parameters and seeds; the update
of the engine's weights beside a plain copy of the same bytes; verdicts a second.  Two models: the quickstart's, and one
of `WIDE` for the weights, since a few megabytes only show what an update costs at least.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ovr_megatron import rl
from ovr_megatron.config import RLConfig, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.batch import seeds_of
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.iteration import iterate
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime import distributed

PHASES = ("generate", "value", "update", "sync")
WIDE = TinySizes(hidden=1024, layers=17, heads=16, kv_heads=4, ffn=4096)
GRADED = [
    (r"... so \boxed{\frac{3}{4}}", "0.75"),
    (r"... so \boxed{x^2+2x+1}", "(x+1)^2"),
    (r"... so \boxed{\sqrt{20}}", r"2\sqrt{5}"),
    (r"... so \boxed{17}", "71"),
    ("no box at all", "3"),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
]


def rows(rounds: int, verdicts: int = 8192) -> list[dict[str, Any]]:
    """Every measurement: ``name``, ``seconds`` and what belongs to it; each model in a process of its own."""
    found: list[dict[str, Any]] = []
    for part in ("iteration", "plain", "sync"):
        command = [sys.executable, "-m", "ovr_megatron.analysis.bench_rl", part, str(rounds)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ours, plain = (next(row for row in found if row["name"] == name) for name in ("generate", "plain vLLM"))
    ours["ratio"] = ours["tokens_per_second"] / plain["tokens_per_second"]
    return [*found, grading(verdicts)]


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text."""
    lines = [f"{'':24}{'seconds':>10}{'share':>8}{'tokens/s':>10}{'MB':>8}{'GB/s':>7}{'a second':>10}{'ratio':>8}"]
    for row in found:
        line = f"{row['name']:24}{row['seconds']:10.3f}"
        line += f"{row['share']:8.1%}" if "share" in row else " " * 8
        line += f"{row['tokens_per_second']:10,.0f}" if "tokens_per_second" in row else " " * 10
        line += f"{row['bytes'] / 1e6:8,.0f}{row['bytes'] / row['seconds'] / 1e9:7.2f}" if "bytes" in row else " " * 15
        line += f"{row['verdicts'] / row['seconds']:10,.0f}" if "verdicts" in row else " " * 10
        lines.append(line + (f"{row['ratio']:8.2f}" if "ratio" in row else ""))
    return "\n".join([*lines, "ratio: generate over plain vLLM's rate; an update's seconds over a copy's"])


def grading(count: int) -> dict[str, Any]:
    """``count`` verdicts by two workers that remember none."""
    asked = [GradeRequest(text, answer) for text, answer in GRADED] * (count // len(GRADED) + 1)
    with GraderPool(2, cache=0) as pool:
        pool.grade(asked[:8])
        began = time.perf_counter()
        pool.grade(asked[:count])
        return {"name": "verdicts", "seconds": time.perf_counter() - began, "verdicts": count}


def _config(folder: Path, model: Path) -> RLConfig:
    """The quickstart's recipe without its warm-up."""
    values = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    assert isinstance(values, DictConfig)
    values.pop("defaults")
    own = {"run": {"dir": str(folder / "run")}, "model": {"path": str(model)}}
    own["algorithm"] = {"critic_warmup_iterations": 0}  # type: ignore[dict-item]
    return build(RLConfig, OmegaConf.merge(defaults(RLConfig), values, own))  # type: ignore[arg-type]


def _iteration(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """The phases of the best of ``rounds`` iterations, its rollouts written too."""
    make_tiny_model(folder / "model", tied=True, seed=1)
    config = _config(folder, folder / "model")
    world = distributed.start(config.parallel, config.run.seed, 0)
    processor = Processor(folder / "model", config.data)
    models, _ = rl.build_models(config, folder / "model", processor, world)
    rollouts = rl.build_rollouts(config, folder / "model", processor, models)
    stream = open_stream(config.data, config.run.seed)
    prompts = PromptStream(stream, processor, {})
    best: dict[str, float] = {}
    tokens = 0
    with rollouts.grader:
        for iteration in range(rounds + 1):  # the first one compiles and fills caches
            before, began = stream.state(), time.perf_counter()
            outcome = iterate(models, rollouts, prompts.draw, iteration)
            own = outcome.experience
            arrays = {name: getattr(own, name) for name in archive.ARRAYS}
            archive.write(folder / "run", iteration, outcome.rollout, before, own.responses, arrays, world)
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


def _plain(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """VLLM with the arguments that we give it and nothing of ours inside, on the prompts of those iterations."""
    from vllm import LLM, SamplingParams

    make_tiny_model(folder / "model", tied=True, seed=1)
    config = _config(folder, folder / "model")
    processor = Processor(folder / "model", config.data)
    prompts = PromptStream(open_stream(config.data, config.run.seed), processor, {})
    engine = LLM(
        model=str(folder / "model"),
        dtype="float32",
        max_model_len=max(stage.max_tokens for stage in config.curriculum),
        max_num_seqs=config.rollout.max_num_seqs,
        limit_mm_per_prompt={"image": config.data.max_images},
        mm_processor_kwargs=processor.mm_processor_kwargs,
        kv_cache_memory_bytes=256 << 20,
        generation_config="vllm",
        enforce_eager=True,
        enable_chunked_prefill=False,
        max_num_batched_tokens=8192,
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
                    stop_token_ids=ends,
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


def _sync(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """New weights into an engine of about a gigabyte, and the same bytes copied once."""
    make_tiny_model(folder / "model", tied=True, seed=1, sizes=WIDE)
    config = _config(folder, folder / "model")
    world = distributed.start(config.parallel, config.run.seed, 0)
    processor = Processor(folder / "model", config.data)
    models, _ = rl.build_models(config, folder / "model", processor, world)
    rollouts = rl.build_rollouts(config, folder / "model", processor, models)
    rollouts.grader.close()
    source = [tensor for _, tensor in models.policy.weights()]
    target = [torch.empty_like(tensor) for tensor in source]
    size = sum(tensor.numel() * tensor.element_size() for tensor in source)
    best = {"weights to vLLM": float("inf"), "plain copy": float("inf")}
    for _ in range(rounds + 1):
        began = time.perf_counter()
        rollouts.engine.update(models.policy.held())
        best["weights to vLLM"] = min(best["weights to vLLM"], time.perf_counter() - began)
        began = time.perf_counter()
        for to, tensor in zip(target, source, strict=True):
            to.copy_(tensor)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best["plain copy"] = min(best["plain copy"], time.perf_counter() - began)
    found: list[dict[str, Any]] = [{"name": name, "seconds": value, "bytes": size} for name, value in best.items()]
    found[0]["ratio"] = best["weights to vLLM"] / best["plain copy"]
    return found


def main() -> None:
    """Measure one part and print its rows as JSON lines."""
    part, rounds = sys.argv[1], int(sys.argv[2])
    folder = Path(tempfile.mkdtemp(prefix="bench_rl_"))
    try:
        for row in {"iteration": _iteration, "plain": _plain, "sync": _sync}[part](folder, rounds):
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
