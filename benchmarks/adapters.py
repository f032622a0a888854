"""Measure the two ways of an adapter to vLLM, and the memory of a critic beside it.

- Merged: the adapter is added to the weights that it changes while they are copied into vLLM (what a run does).
- LoRA path: the adapter is written as PEFT's files, which vLLM loads in place of those before, and computes beside
  every product of every token.

Both engines have the same model, settings, prompts with images and greedy sampling, and update and generate in turn in
one process; the log-probabilities of their tokens are compared with the trainer's.  Two more processes train a policy
and a critic by adapters, with one set of frozen weights and with one each.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import PEER_SHAPES
from benchmarks.subprocess_bench import BenchRow, MeasurementError, resident_bytes, run_in_subprocess
from ovr_megatron.config import RLConfig, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.stream import open_stream
from ovr_megatron.families.adapters import is_adapter
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.batch import Batch
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.rl.critic import build_critic
from ovr_megatron.rl.setup import build_policy
from ovr_megatron.runtime import distributed
from ovr_megatron.verify import make_documents, make_packs, objective
from ovr_megatron.weights.adapters import write_adapter_config
from ovr_megatron.weights.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, copy_hf_assets

RANK = 16
PROMPTS = 16
NEW_TOKENS = 64
UPDATES = 3  # in each round
MERGED = "merged"
LORA_PATH = "LoRA path"
ONE_BASE = "one base"
TWO_BASES = "a base each"


def run(shapes: Sequence[str], rounds: int) -> list[BenchRow]:
    """Measure each of `PEER_SHAPES` that ``shapes`` names; return two rows of the ways and two of the memory for it.

    A row of a way has the ``seconds`` of generating and ``tokens_per_second``, the best of the rounds; the least
    ``update_seconds``; the ``update_bytes`` that travel to vLLM; ``same_tokens``, the share of tokens that both ways
    have in common; and ``mean`` and ``max``, the absolute differences of log-probabilities to the trainer's.  A row of
    the memory has the ``peak_bytes`` of the process, on a GPU those of torch there, and the ``weight_bytes`` of both
    models.
    """
    rows: list[BenchRow] = []
    for shape in shapes:
        for part in ("ways", ONE_BASE, TWO_BASES):
            try:
                rows += run_in_subprocess(__name__, part, shape, rounds)
            except MeasurementError as error:
                rows.append({"name": f"{shape}, {part}", "failed": str(error)})
    return rows


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as tables of text, first the ways, then the memory."""
    titles = f"{'update s':>10}{'MB':>8}{'generate s':>12}{'tokens/s':>10}{'same':>8}{'mean difference':>17}{'max':>9}"
    lines = [" " * 26 + titles]
    memory_lines = [f"{'':26}{'weights MB':>12}{'peak MB':>10}"]
    for row in rows:
        name = f"{row['name']:26}"
        if "failed" in row:
            lines.append(f"{name} failed: {row['failed']}")
        elif "peak_bytes" in row:
            memory_lines.append(f"{name}{row['weight_bytes'] / 1e6:12.1f}{row['peak_bytes'] / 1e6:10.0f}")
        else:
            line = f"{name}{row['update_seconds']:10.4f}{row['update_bytes'] / 1e6:8.2f}{row['seconds']:12.3f}"
            line += f"{row['tokens_per_second']:10,.0f}{row['same_tokens']:8.1%}{row['mean']:17.1e}{row['max']:9.1e}"
            lines.append(line)
    return "\n".join([*lines, "", *memory_lines])


def make_config(folder: Path, *more: str) -> RLConfig:
    """Return the quickstart's settings with adapters, prompts that have an image, and the options ``more``."""
    recipe = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    assert isinstance(recipe, DictConfig)
    recipe.pop("defaults")
    image = {"data": {"sources": [{"path": "puzzle:digits?form=image&task=sum&answered=0", "name": "image"}]}}
    options = [f"model.path={folder / 'model'}", f"run.dir={folder / 'run'}", f"model.lora.rank={RANK}", *more]
    options.append("rollout.gpu_memory_utilization=0.3")  # two engines share a GPU
    merged = OmegaConf.merge(defaults(RLConfig), recipe, image, OmegaConf.from_dotlist(options))
    return build(RLConfig, merged)  # type: ignore[arg-type]


class Ways:
    """A policy with adapters and two engines, one for each way.

    Args:
        folder: of the model in ``model``; the adapters are written beside it.
    """

    def __init__(self, folder: Path):
        # Imported here: the processes that measure memory alone leave vLLM out.
        from vllm import LLM, SamplingParams  # noqa: PLC0415
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        from ovr_megatron.rollout.engine import RolloutEngine, _settings, undisturbed  # noqa: PLC0415

        config = make_config(folder)
        self.world = distributed.start(config.parallel, config.run.seed, config.run.threads)
        self.processor = Processor(folder / "model", config.data)
        shape = self.processor.shape
        self.policy = build_policy(config, shape, folder / "model", self.world)
        length = config.data.max_prompt_tokens + NEW_TOKENS
        settings = (config.rollout, self.processor, config.model.dtype, length)
        self.merged = RolloutEngine(folder / "model", *settings, empty=True)
        self.policy.sample_from(self.merged.banned, 1.0)
        self.undisturbed = undisturbed
        lora = {"enable_lora": True, "max_lora_rank": RANK}
        with undisturbed():
            self.llm = LLM(model=str(folder / "model"), **_settings(*settings), **lora)
            (model,) = self.llm.apply_model(lambda model: model)
            model.follow(self.merged.banned, self.processor.after_video, shape)
        self.adapter = folder / "adapter"
        copy_hf_assets(folder / "model", self.adapter)
        self.request = LoRARequest("policy", 1, str(self.adapter))
        self.reload = LoRARequest("policy", 1, str(self.adapter), load_inplace=True)
        self.sampling = SamplingParams(
            temperature=0, max_tokens=NEW_TOKENS, logprobs=0, ignore_eos=True, detokenize=False
        )
        prompts = PromptStream(open_stream(config.data, config.run.seed), self.processor, {})
        self.samples = self.processor.encode(prompts.draw(PROMPTS), generation=True)

    @torch.no_grad()
    def change(self) -> None:
        """Move the adapters, as an optimizer step does."""
        for holding in self.policy.live.holdings:
            if is_adapter(holding.row.megatron):
                holding.parameter.add_(torch.randn_like(holding.parameter), alpha=0.01)

    def update_merged(self) -> int:
        """Bring the merged weights to vLLM; return their bytes."""
        traffic = self.merged.update(self.policy.held())
        return traffic.copied + traffic.received

    def update_adapter(self) -> int:
        """Write the adapters, let vLLM load them and drop what it has computed by those before; return their bytes."""
        tensors = {name: tensor.clone() for name, tensor in self.policy.weights()}
        save_file(tensors, self.adapter / ADAPTER_WEIGHTS)
        config = self.policy.adapter_config()
        assert config is not None
        write_adapter_config(self.adapter / ADAPTER_CONFIG, config)
        with self.undisturbed():
            self.llm.llm_engine.add_lora(self.reload)
            self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()
            self.llm.reset_mm_cache()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies into vLLM's adapters may still run
        return sum(tensor.nbytes for tensor in tensors.values())

    def generate(self, way: str) -> list[Any]:
        """Answer the prompts by an engine; return vLLM's outputs."""
        llm = self.merged._llm if way == MERGED else self.llm
        request = None if way == MERGED else self.request
        inputs = []
        for sample in self.samples:
            media = {"image": list(sample.images)}
            inputs.append({"prompt_token_ids": list(sample.prompt_tokens), "multi_modal_data": media})
        with self.undisturbed():
            llm.reset_prefix_cache()
            llm.llm_engine.reset_encoder_cache()
            return llm.generate(inputs, self.sampling, lora_request=request, use_tqdm=False)

    def differences(self, outputs: Sequence[Any]) -> np.ndarray:
        """Return the absolute differences of log-probabilities to the trainer's, of all tokens."""
        samples: list[Sample] = []
        theirs = []
        for sample, output in zip(self.samples, outputs, strict=True):
            tokens, logprobs = _tokens_of(output)
            samples.append(self.processor.response_sample(sample, tokens))
            theirs.append(logprobs)
        batch = Batch(samples, list(map(len, theirs)), 2304, range(len(samples)), len(samples))
        members = batch.group_into_packs(range(len(samples)))
        scores: list[Tensor] = []
        for pack_scores in self.policy.scores(batch.packs(members)):
            assert pack_scores.logprobs is not None
            scores.append(pack_scores.logprobs)
        ours = batch.unpack(scores, members)
        return np.abs(np.concatenate(ours) - np.concatenate(theirs))


def _tokens_of(output: Any) -> tuple[list[int], np.ndarray]:
    """Return the tokens of a finished request and their log-probabilities."""
    tokens = list(output.outputs[0].token_ids)
    logprobs = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
    return tokens, np.array(logprobs)


def measure_ways(shape: str, folder: Path, rounds: int) -> list[BenchRow]:
    """Update and generate by both ways in turn, after a first round that warms up."""
    ways = Ways(folder)
    updates: dict[str, Callable[[], int]] = {MERGED: ways.update_merged, LORA_PATH: ways.update_adapter}
    rows: dict[str, BenchRow] = {way: {"name": f"{shape}, {way}"} for way in updates}
    outputs: dict[str, list[Any]] = {}
    for round_number in range(rounds + 1):
        for _ in range(UPDATES):
            ways.change()
            for way, update in updates.items():
                began = time.perf_counter()
                rows[way]["update_bytes"] = update()
                if round_number:
                    _keep_least(rows[way], "update_seconds", time.perf_counter() - began)
        for way in updates:
            began = time.perf_counter()
            outputs[way] = ways.generate(way)
            if round_number:
                _keep_least(rows[way], "seconds", time.perf_counter() - began)
    first, second = ([token for output in outputs[way] for token in _tokens_of(output)[0]] for way in updates)
    same = np.mean(np.array(first) == np.array(second))
    for way, row in rows.items():
        differences = ways.differences(outputs[way])
        row |= {"tokens": len(first), "tokens_per_second": len(first) / row["seconds"], "same_tokens": float(same)}
        row |= {"mean": float(differences.mean()), "max": float(differences.max())}
    return list(rows.values())


def _keep_least(row: BenchRow, key: str, seconds: float) -> None:
    row[key] = min(row.get(key, seconds), seconds)


def measure_memory(part: str, shape: str, folder: Path) -> BenchRow:
    """Train a policy and a critic for a step; return the peak memory of the process and the bytes of all weights."""
    model_folder = folder / "model"
    options = []
    if part == TWO_BASES:
        # Weights of another folder are not the policy's, also where they are equal.
        shutil.copytree(model_folder, folder / "critic")
        options = [f"critic.path={folder / 'critic'}"]
    config = make_config(folder, *options)
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    processor = Processor(model_folder, config.data)
    policy = build_policy(config, processor.shape, model_folder, world)
    critic = build_critic(config, model_folder, processor, world, policy)
    engines = (policy, critic)
    storages: dict[int, int] = {}
    for engine in engines:
        engine.train(make_packs(make_documents(processor.shape), processor.shape, True, engine.critic, 1), objective)
        for tensor in engine._weight_tensors():
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    on_gpu = torch.cuda.is_available()
    return {
        "name": f"{shape}, {part}",
        "weight_bytes": sum(storages.values()),
        "peak_bytes": torch.cuda.max_memory_reserved() if on_gpu else resident_bytes("VmHWM"),
    }


def main() -> None:
    """Measure one part at one shape, and print its rows as JSON."""
    part, shape, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with tempfile.TemporaryDirectory(prefix="bench_adapters_") as name:
        folder = Path(name)
        make_tiny_model(folder / "model", tied=False, seed=1, sizes=PEER_SHAPES[shape])
        rows = measure_ways(shape, folder, rounds) if part == "ways" else [measure_memory(part, shape, folder)]
    for row in rows:
        print(json.dumps(row), flush=True)
    distributed.finish()


if __name__ == "__main__":
    main()
