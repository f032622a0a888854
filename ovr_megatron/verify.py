"""Our model against Transformers' on the same weights and inputs: logits, and the gradient of a loss, tensor by tensor.

Run it on your own checkpoint before a week of training: ``tools/verify.py --hf DIR --layout tp=2``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.hf_assets import check_assets, one_sentence
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.data.positions import Visual, mrope_positions
from ovr_megatron.engine import VALUE_HEAD, Engine, LossSum
from ovr_megatron.model.heads import init_value_head
from ovr_megatron.model.qwen25vl import DTYPES, Scores
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.runtime import distributed
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.table import canonical

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
SECONDS_PER_SLICE = 1.0
# Of the largest logit, and of a gradient's norm.  In bfloat16, whose step is 8e-3, an error of a few steps is rounding.
LOGIT_BOUND = {"float32": 1e-4, "bfloat16": 3e-2}
GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Document:
    """Random text with images or a video of random pixels in it."""

    name: str
    tokens: list[int]
    segments: Sequence[int | Visual]
    patches: Tensor


@dataclass
class Report:
    """Largest differences; the run passes if ``logits`` and ``gradients`` are within their bounds."""

    dtype: str = "float32"
    logits: dict[str, float] = field(default_factory=dict)
    largest_logit: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0
    reference_loss: float = 0.0

    @property
    def logit_bound(self) -> float:
        """1e-4 in float32, or 1e-4 of the largest logit where that is above 1."""
        return LOGIT_BOUND[self.dtype] * max(1.0, self.largest_logit)

    @property
    def gradient_bound(self) -> float:
        """1e-4 of the gradient's norm in float32."""
        return GRADIENT_BOUND[self.dtype]

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The tensor whose gradient differs most, and by how much of its norm."""
        return max(self.gradients.items(), key=lambda item: item[1])

    @property
    def passed(self) -> bool:
        """Whether every difference is within its bound (a NaN is not)."""
        logits = all(value <= self.logit_bound for value in self.logits.values())
        return logits and all(value <= self.gradient_bound for value in self.gradients.values())


def documents(shape: ModelShape, seed: int = 0, texts: Sequence[int] = ()) -> list[Document]:
    """Text, one image, three images of different sizes, and a video, with windows whole and cut.

    Args:
        shape: the model's sizes and special ids.
        seed: of the random tokens and pixels.
        texts: lengths of more documents of text.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = shape.vision
    unit, window = vision.merge, max(1, vision.window // vision.patch // vision.merge)
    small, cut, large = 2 * unit, (window + 1) * unit, (2 * window + 1) * unit
    visuals: dict[str, list[Visual]] = {
        "text": [],
        "image": [Visual((1, small, small))],
        "images": [Visual((1, small, cut)), Visual((1, cut, large)), Visual((1, large, small))],
        "video": [Visual((3, small, cut), SECONDS_PER_SLICE)],
    }
    plain = min(shape.image_token, shape.video_token, shape.vision_start_token, shape.vision_end_token, shape.vocab)

    def text(length: int) -> list[int]:
        return torch.randint(0, plain, (length,), generator=generator).tolist()

    found = []
    for name, shown in visuals.items():
        tokens, patches = text(11), [torch.zeros(0, vision.patch_dim)]
        segments: list[int | Visual] = []
        before = 11
        for visual in shown:
            placeholder = shape.image_token if visual.seconds is None else shape.video_token
            tokens += [shape.vision_start_token, *[placeholder] * visual.features(unit), shape.vision_end_token]
            tokens += text(5)
            segments += [before + 1, visual]
            before = 6
            patches.append(torch.randn(int(np.prod(visual.grid)), vision.patch_dim, generator=generator))
        found.append(Document(name, tokens, [*segments, before], torch.cat(patches)))
    nothing = torch.zeros(0, vision.patch_dim)
    return found + [Document(f"text {length}", text(length), [length], nothing) for length in texts]


def _labels(document: Document) -> Tensor:
    return torch.tensor([*document.tokens[1:], IGNORED])


def as_pack(found: list[Document], shape: ModelShape) -> Pack:
    """All documents in one pack, every next token a target."""
    merge, rate = shape.vision.merge, shape.vision.tokens_per_second
    starts = np.cumsum([0, *(len(document.tokens) for document in found)])
    grids = [segment.grid for document in found for segment in document.segments if isinstance(segment, Visual)]
    places = [
        start + np.flatnonzero(np.isin(document.tokens, (shape.image_token, shape.video_token)))
        for start, document in zip(starts, found, strict=False)
    ]
    positions = [mrope_positions(document.segments, merge, rate) for document in found]
    return Pack(
        tokens=torch.tensor([token for document in found for token in document.tokens]),
        labels=torch.cat([_labels(document) for document in found]),
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        patches=torch.cat([document.patches for document in found]),
        grid_thw=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        placement=torch.from_numpy(np.concatenate(places)),
        extras={},
    )


@dataclass(frozen=True)
class Reference:
    """What Transformers computes: logits [length, vocabulary], or a critic's values [length, 1], of each document.

    ``gradients`` are those of `objective`, under the hub's names.
    """

    outputs: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]


def reference(directory: Path, found: list[Document], dtype: torch.dtype, critic: bool = False) -> Reference:
    """Run Transformers' model, for a critic with the value head of `Engine.load`, document by document."""
    with one_sentence(f"{directory}: Transformers cannot load its model", "see that the whole folder is there"):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    shape = ModelShape.from_hf(directory)
    head = torch.nn.Linear(shape.hidden, 1, bias=False, dtype=dtype)
    init_value_head(head.weight, "orz", torch.Generator().manual_seed(0))
    count = sum(len(document.tokens) - 1 for document in found)
    outputs, total = [], 0.0
    for document in found:
        ids = torch.tensor([document.tokens])
        kinds = (ids == shape.image_token).long() + 2 * (ids == shape.video_token).long()
        grids = [segment for segment in document.segments if isinstance(segment, Visual)]
        inputs: dict[str, Tensor] = {}
        if grids:
            video = grids[0].seconds is not None
            grid = torch.tensor([visual.grid for visual in grids])
            inputs["pixel_values_videos" if video else "pixel_values"] = document.patches.to(dtype)
            inputs["video_grid_thw" if video else "image_grid_thw"] = grid
            if video:
                inputs["second_per_grid_ts"] = torch.full((len(grids),), SECONDS_PER_SLICE)
        body = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **inputs)
        hidden = body.last_hidden_state[0]
        # Values are computed in float32 in every dtype.
        out = F.linear(hidden.float(), head.weight.float()) if critic else model.lm_head(hidden).float()
        outputs.append(out.detach())
        if critic:
            loss = (out[:-1, 0] - _targets(len(out) - 1)).square().sum() / count
        else:
            loss = F.cross_entropy(out, _labels(document), reduction="sum", ignore_index=IGNORED) / count
        loss.backward()
        total += loss.item()
    gradients = {canonical(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    if critic:
        assert head.weight.grad is not None
        gradients[VALUE_HEAD] = head.weight.grad
    return Reference(outputs, total, gradients)


def _targets(count: int) -> Tensor:
    """What a critic is drawn to in the n-th scored row of a document."""
    return torch.sin(torch.arange(count, dtype=torch.float32))


def objective(scores: Scores, pack: Pack) -> LossSum:
    """Cross entropy, or a critic's squared error, summed over the scored rows."""
    if scores.values is None:
        assert scores.logprobs is not None
        return LossSum(-scores.logprobs.sum(), len(scores.rows), {})
    error = scores.values - scores.beside(pack, "target")
    return LossSum(error.square().sum(), len(scores.rows), {})


def make_packs(found: list[Document], shape: ModelShape, packed: bool, critic: bool, at_least: int) -> list[Pack]:
    """Every document as a pack of its own or, if ``packed``, several of them in each of ``at_least`` packs."""
    shares = [found[i::at_least] for i in range(at_least)] if packed else [[document] for document in found]
    packs = []
    for share in shares:
        pack = as_pack(share, shape)
        if critic:
            targets = [F.pad(_targets(len(document.tokens) - 1), (0, 1)) for document in share]
            pack.extras["target"] = torch.cat(targets)
        packs.append(pack)
    return packs


def compare(engine: Engine, found: list[Document], theirs: Reference | None, packed: bool = False) -> Report:
    """Run the engine on the documents and compare; a collective.

    A gradient's difference is ||ours - theirs|| / max(||theirs||, 1e-6 ||all of theirs||).

    Args:
        engine: with weights and an optimizer.
        found: documents, at least one for each data-parallel rank.
        theirs: the reference, on the first rank only.
        packed: put several documents into a pack.

    Returns:
        On the first rank the full report.
    """
    replicas, rank = engine.groups.dp.size(), engine.groups.dp.rank()
    packs = make_packs(found, engine.shape, packed, engine.critic, max(2, replicas))
    report = Report(dtype=str(engine.config.params_dtype).removeprefix("torch."))
    whole = as_pack(found, engine.shape) if packed else None
    if engine.critic:
        ours = [part.values.cpu() for part in engine.scores([whole] if whole else packs) if part.values is not None]
        lengths = [len(document.tokens) - 1 for document in found]
    else:
        ours = [engine.logits(pack).cpu() for pack in ([whole] if whole else packs)]
        lengths = [len(document.tokens) for document in found]
    report.loss = engine.backward(packs[rank::replicas], objective)["loss"]
    gradients = {name: gradient.cpu() for name, gradient in engine.gradients()}
    if theirs is None:
        return report
    report.reference_loss = theirs.loss
    report.largest_logit = max(float(part.abs().max()) for part in theirs.outputs)
    for document, part, mine in zip(found, theirs.outputs, torch.cat(ours).split(lengths), strict=True):
        expected = part[:-1, 0] if engine.critic else part
        report.logits[document.name] = float((mine - expected).abs().max())
    report.gradients = gradient_differences(gradients, theirs.gradients)
    return report


def gradient_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """||ours - theirs|| / max(||theirs||, 1e-6 ||all of theirs||) by name; infinite where only one side has it."""
    everything = float(torch.stack([gradient.float().norm() for gradient in theirs.values()]).norm())
    differences = dict.fromkeys(ours.keys() ^ theirs.keys(), float("inf"))
    for name in ours.keys() & theirs.keys():
        difference = float((ours[name].float() - theirs[name].float()).norm())
        differences[name] = difference / max(float(theirs[name].float().norm()), 1e-6 * everything)
    return differences


ODD_LENGTHS = (2, 7, 23, 31)


def verify(
    directory: Path,
    weights: Path,
    parallel: ParallelConfig,
    dtype: str = "float32",
    packed: bool = False,
    critic: bool = False,
) -> Report:
    """Compare in the layout of this process group; the first rank holds the full report."""
    check_assets(directory)
    shape = check_assets(weights)
    world = distributed.start(parallel, seed=0)
    found = documents(shape, texts=ODD_LENGTHS if packed else ())
    engine = Engine(shape, ModelConfig(path=str(weights), dtype=dtype), parallel, world, critic)
    engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(weights))
    theirs = reference(directory, found, DTYPES[dtype], critic) if world.is_main else None
    return compare(engine, found, theirs, packed)


def show(report: Report) -> str:
    """The report as a few lines of text."""
    lines = [f"{'input':8} largest logit difference (bound {report.logit_bound:.1e})"]
    lines += [f"{name:8} {value:.3e}" for name, value in report.logits.items()]
    name, worst = report.worst_gradient
    lines.append(f"{len(report.gradients)} gradients, bound {report.gradient_bound:.0e}: worst {worst:.3e} ({name})")
    lines.append(f"loss {report.loss:.7f}, Transformers {report.reference_loss:.7f}")
    lines.append("passed" if report.passed else "FAILED")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    """Verify in this process group; 0 if everything is within its bounds."""
    weights = weights_of(arguments.checkpoint) if arguments.checkpoint else arguments.hf
    report = verify(arguments.hf, weights, arguments.layout, arguments.dtype, arguments.packed, arguments.critic)
    code = 0
    if distributed.is_main():
        text = asdict(report) | {"passed": report.passed, "logit_bound": report.logit_bound}
        print(json.dumps(text) if arguments.json else show(report), flush=True)
        code = 0 if report.passed else 1
    distributed.finish()
    return code
