"""vLLM serves the adapter of a checkpoint through its own LoRA path as it serves the merged export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from benchmarks.adapters import LORA_PATH, MERGED, measure_ways
from ovr_megatron.checkpoint.conversion import export_hf
from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.config import LoraConfig, ParallelConfig, RolloutConfig
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.families import ModelShape
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.rollout.engine import _settings, undisturbed
from ovr_megatron.runtime import distributed
from ovr_megatron.weights.adapters import adapter_config, adapter_rows, write_adapter_config
from ovr_megatron.weights.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, copy_hf_assets

CLOSE = 3e-5  # as in test_engine.py
LORA = LoraConfig(rank=8, alpha=16, vision=True)


def write_checkpoint(root: Path, base: Path) -> Path:
    """A checkpoint of a run with adapters, none of them zero."""
    shape = ModelShape.from_hf(base)
    policy = root / "policy"
    copy_hf_assets(base, policy)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for row in adapter_rows(shape, LORA):
        for name, size in zip(row.hf, row.sizes, strict=True):
            tensors[name] = torch.randn(size, generator=generator) * 0.05
    save_file(tensors, policy / ADAPTER_WEIGHTS)
    write_adapter_config(policy / ADAPTER_CONFIG, adapter_config(shape, LORA, base))
    write_manifest(root, step=1)
    return root


def test_vllm_serves_the_adapter_as_the_merged_model(
    make_reference: Callable[..., Any], processor: Processor, samples: list[Sample], tmp_path: Path
) -> None:
    """The adapters of the language model and of the tower: greedy tokens of a text and of prompts with images."""
    base = make_reference(True, 1)
    checkpoint = write_checkpoint(tmp_path / "step_000001", base.folder)
    export_hf(checkpoint, tmp_path / "merged", critic=False, dtype=None, workers=1, force=False, merge=True)
    merged = type(base)(tmp_path / "merged")
    prompts = []
    for sample in samples[:3]:
        media = {"multi_modal_data": {"image": list(sample.images)}} if sample.images else {}
        prompts.append({"prompt_token_ids": list(sample.prompt_tokens), **media})
    lora = {"enable_lora": True, "max_lora_rank": LORA.rank, "enable_tower_connector_lora": True}
    distributed.start(ParallelConfig(), seed=5)
    settings = _settings(RolloutConfig(max_num_seqs=8), processor, "float32", 320) | lora
    with undisturbed():
        engine = LLM(model=str(base.folder), **settings)
        request = LoRARequest("adapter", 1, str(checkpoint / "policy"))
        sampling = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
        results = engine.generate(prompts, sampling, lora_request=request, use_tqdm=False)
    for sample, result in zip(samples, results, strict=False):
        output = result.outputs[0]
        tokens = list(output.token_ids)
        scores = torch.tensor([entry[token].logprob for entry, token in zip(output.logprobs, tokens, strict=True)])
        expected = merged.logprobs(sample, tokens, [], 1.0)
        assert expected.argmax(-1).tolist() == tokens
        assert (expected.max(-1).values - scores).abs().max() < CLOSE
        assert base.logprobs(sample, tokens, [], 1.0).argmax(-1).tolist() != tokens, "the adapter must matter here"


def test_merged_weights_answer_as_the_adapter_beside_them(tmp_path: Path) -> None:
    """`ovr bench adapters` at the miniature's size: two engines, after the same updates, beside the trainer."""
    make_tiny_model(tmp_path / "model", tied=False, seed=1)
    merged, beside = measure_ways("tiny", tmp_path, rounds=1)
    assert (merged["name"], beside["name"]) == (f"tiny, {MERGED}", f"tiny, {LORA_PATH}")
    assert merged["same_tokens"] == 1 and merged["tokens"] == beside["tokens"] == 16 * 64
    assert max(merged["max"], beside["max"]) < CLOSE
    # The bytes that travel are those of the adapters, or those of the weights that have one.
    assert beside["update_bytes"] == sum(t.nbytes for t in load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS).values())
    assert merged["update_bytes"] > 4 * beside["update_bytes"]
