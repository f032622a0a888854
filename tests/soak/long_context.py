"""A long document through our model, Transformers' and, if asked, vLLM's: ``long_context.py --yarn 2 --rollout``.

The model is a tiny one, the length a real one: 40,960 tokens by default, with an image in the middle.  With ``--gap P``
the positions from the image on are moved by P, so that a short document has the angles of a long one.  Prints the
largest differences as JSON and exits 1 if one is over its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovr_megatron.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig, Sampling
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.families.positions import Visual
from ovr_megatron.families.stretch import stretch_positions
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.verify import Document, as_pack, gradient_differences, objective
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.table import canonical

POSITIONS = 65536
GRID = (1, 8, 12)
RESPONSE = 16
LOGIT_BOUND, GRADIENT_BOUND, ROLLOUT_BOUND = 1e-4, 1e-4, 1e-4


def main() -> int:
    """Compare and say what was found; 0 if everything is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40960, help="length of the document")
    parser.add_argument("--gap", type=int, default=0, help="positions left out before the image")
    parser.add_argument("--yarn", type=float, help="reach the positions with YaRN of this factor")
    parser.add_argument("--rollout", action="store_true", help="compare with vLLM, too")
    arguments = parser.parse_args()
    began = time.perf_counter()
    world = distributed.start(ParallelConfig(), seed=0)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        shape = make_model(folder / "model", arguments.yarn)
        pack = long_document(shape, arguments.tokens, arguments.gap)
        shape.check_length(int(pack.position_ids.max()) + 1, "the document")
        engine = Engine(shape, ModelConfig(path=str(folder)), ParallelConfig(), world)
        engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(folder / "model"))
        report = compare(engine, pack, folder / "model")
        if arguments.yarn:
            make_model(folder / "short", None)
            report["without_yarn"] = float((engine.logits(pack) - reference(folder / "short", pack)[0]).abs().max())
        if arguments.rollout:
            report["rollout"] = compare_rollout(engine, folder / "model", arguments.tokens)
    report |= {"positions": int(pack.position_ids.max()) + 1, "seconds": time.perf_counter() - began}
    passed = report["logits"] <= LOGIT_BOUND * max(1.0, report["largest_logit"])
    passed = passed and report["gradients"] <= GRADIENT_BOUND and report.get("rollout", 0.0) <= ROLLOUT_BOUND
    print(json.dumps({**report, "passed": passed}), flush=True)
    distributed.finish()
    return 0 if passed else 1


def make_model(folder: Path, yarn: float | None) -> ModelShape:
    """A tiny model of `POSITIONS`, by YaRN if its factor is given, whose attention looks far."""
    original = int(POSITIONS / (yarn or 1))
    sizes = TinySizes(
        hidden=64, heads=2, kv_heads=1, layers=2, ffn=128, vision_hidden=32, vision_ffn=64, max_positions=original
    )
    make_tiny_model(folder, sizes=sizes, perturb=True, std=0.2)
    return stretch_positions(folder, yarn) if yarn else ModelShape.from_hf(folder)


def long_document(shape: ModelShape, tokens: int, gap: int) -> Pack:
    """Text, an image and text, ``tokens`` in all, every next token a target."""
    generator = torch.Generator().manual_seed(0)
    image = Visual(GRID)
    features = image.features(shape.vision.merge)
    before = (tokens - features) // 2
    words = torch.randint(0, shape.image_token - 8, (tokens,), generator=generator).tolist()
    words[before : before + features] = [shape.image_token] * features
    patches = torch.randn(GRID[1] * GRID[2], shape.vision.patch_dim, generator=generator)
    pack = as_pack([Document("long", words, [before, image, tokens - before - features], patches)], shape)
    pack.position_ids[:, before:] += gap
    return pack


def compare(engine: Engine, pack: Pack, folder: Path) -> dict[str, Any]:
    """Largest difference of a logit, and of a gradient in shares of its norm."""
    expected, gradients = reference(folder, pack, backward=True)
    ours = engine.logits(pack)
    engine.backward([pack], objective)
    found = gradient_differences(dict(engine.gradients()), gradients)
    worst = max(found, key=lambda name: found[name])
    return {
        "tokens": len(pack.tokens),
        "logits": float((ours - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "gradients": found[worst],
        "worst_gradient": worst,
    }


def reference(folder: Path, pack: Pack, backward: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Transformers' logits [T, V] and, after ``backward``, its gradients of the mean cross entropy."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    with torch.set_grad_enabled(backward):
        logits = model(
            input_ids=pack.tokens[None],
            position_ids=pack.position_ids[:, None],
            pixel_values=pack.patches,
            image_grid_thw=pack.grid_thw,
            mm_token_type_ids=(pack.tokens[None] == model.config.image_token_id).long(),
        ).logits[0]
    if backward:
        F.cross_entropy(logits, pack.labels, ignore_index=IGNORED).backward()
    gradients = {canonical(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def compare_rollout(policy: Engine, folder: Path, tokens: int) -> float:
    """Largest difference between vLLM's log-probabilities of its responses to a long text and the policy's."""
    from ovr_megatron.data.processing import Processor
    from ovr_megatron.rollout.engine import Prompt, RolloutEngine

    processor = Processor(folder, DataConfig(max_prompt_tokens=tokens))
    config = RolloutConfig(max_num_seqs=2)
    engine = RolloutEngine(folder, config, processor, "float32", tokens + RESPONSE)
    engine.update(policy.held())
    policy.sample_from(engine.banned, 1.0)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, policy.shape.image_token - 8, (tokens,), generator=generator).tolist()
    differences = []
    for answer in engine.generate([Prompt(prompt, [], [], [1, 2], Sampling(max_tokens=RESPONSE))])[0]:
        words = [*prompt, *answer.tokens]
        nothing = torch.zeros(0, policy.shape.vision.patch_dim)
        pack = as_pack([Document("answer", words, [len(words)], nothing)], policy.shape)
        pack.labels[: tokens - 1] = IGNORED
        scored = policy.scores([pack])[0].logprobs
        assert scored is not None
        differences.append(float((scored - torch.from_numpy(answer.logprobs)).abs().max()))
    return max(differences)


if __name__ == "__main__":
    sys.exit(main())
