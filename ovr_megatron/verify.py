"""Compare our model with Transformers' on the same weights and inputs: logits, and the gradient of every tensor.

Run it on your own checkpoint before a week of training: ``ovr verify --hf DIR --layout tp=2``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.config.fields import Dtype
from ovr_megatron.data.expansion import expand, merge_text_lengths
from ovr_megatron.data.hf_assets import check_assets, one_sentence
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.engine import Engine, LossSum
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.positions import Visual
from ovr_megatron.model.heads import init_value_head
from ovr_megatron.model.scores import Scores
from ovr_megatron.model.transformer_config import DTYPES
from ovr_megatron.runtime import distributed
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.table import canonical
from ovr_megatron.weights.transfer import VALUE_HEAD

SECONDS_PER_SLICE = 1.0
SLICE_TIMES = (0.25, 1.25, 2.25)
# Relative to the largest logit, and to a gradient's norm.  In bfloat16, whose step is 8e-3, a few steps are rounding.
LOGIT_BOUND = {"float32": 1e-4, "bfloat16": 3e-2}
GRADIENT_BOUND = {"float32": 1e-4, "bfloat16": 1e-1}
# Lengths of the documents of text that `--packed` adds, so that documents begin at odd rows of a pack.
ODD_LENGTHS = (2, 7, 23, 31)
# A gradient's norm counts as at least this share of the norm of all gradients: below it, differences are rounding.
_SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class Document:
    """Random text with images or a video of random pixels in it.

    Attributes:
        name: names the document in the report.
        tokens: ids, placeholders of the visuals' features included.
        segments: lengths of stretches of text, and the visuals between them.
        patches: float32[P, patch_dim] of all visuals.
        visuals: the images or videos, in their order, as the processor sees them.
    """

    name: str
    tokens: list[int]
    segments: Sequence[int | Visual]
    patches: Tensor
    visuals: Sequence[Visual] = ()

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Return the patches in time, height and width of each visual among the segments."""
        return [segment.grid for segment in self.segments if isinstance(segment, Visual)]


@dataclass
class ParityReport:
    """Differences between our model and Transformers'.

    Attributes:
        dtype: of both models.
        logits: largest difference of a logit, or of a critic's value, by document.
        largest_logit: largest absolute logit of Transformers.
        gradients: relative difference of each gradient, see `gradient_differences`.
        loss: ours.
        reference_loss: Transformers'.
    """

    dtype: str = "float32"
    logits: dict[str, float] = field(default_factory=dict)
    largest_logit: float = 0.0
    gradients: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0
    reference_loss: float = 0.0

    @property
    def logit_bound(self) -> float:
        """Return the bound of ``logits``: in float32 1e-4, times the largest logit where that is above 1."""
        return LOGIT_BOUND[self.dtype] * max(1.0, self.largest_logit)

    @property
    def gradient_bound(self) -> float:
        """Return the bound of ``gradients``: in float32 1e-4 of the gradient's norm."""
        return GRADIENT_BOUND[self.dtype]

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """Return the tensor whose gradient differs most, and the relative difference."""
        return max(self.gradients.items(), key=lambda entry: entry[1])

    @property
    def passed(self) -> bool:
        """Return whether every difference is within its bound (a NaN is not)."""
        logits_pass = all(value <= self.logit_bound for value in self.logits.values())
        gradients_pass = all(value <= self.gradient_bound for value in self.gradients.values())
        return logits_pass and gradients_pass


def make_documents(shape: ModelShape, seed: int = 0, texts: Sequence[int] = ()) -> list[Document]:
    """Draw documents of text, one image, three images of different sizes, and a video.

    Their grids have complete attention windows of the vision tower, and windows cut at the border.

    Args:
        shape: the model's sizes and special ids.
        seed: of the random tokens and pixels.
        texts: lengths of more documents of text.
    """
    generator = torch.Generator().manual_seed(seed)
    vision = shape.vision
    unit = vision.merge  # patches along the side of a feature
    window = max(2, vision.attention_side)
    small = 2 * unit
    medium = (window + 1) * unit
    large = (2 * window + 1) * unit
    visuals: dict[str, list[Visual]] = {
        "text": [],
        "image": [Visual((1, small, small))],
        "images": [Visual((1, small, medium)), Visual((1, medium, large)), Visual((1, large, small))],
        "video": [Visual((3, small, medium), SECONDS_PER_SLICE, SLICE_TIMES)],
    }
    text_vocab = min(
        shape.image_token, shape.video_token, shape.vision_start_token, shape.vision_end_token, shape.vocab
    )

    def text(length: int) -> list[int]:
        return torch.randint(0, text_vocab, (length,), generator=generator).tolist()

    documents = []
    for name, document_visuals in visuals.items():
        tokens = text(11)
        patches = [torch.zeros(0, vision.patch_dim)]
        segments: list[int | Visual] = [11]
        for visual in document_visuals:
            # Random ids stand for the texts that a family writes between the slices of a video.
            expansion = expand(visual, shape, lambda _: text(3))
            tokens += [shape.vision_start_token, *expansion.tokens, shape.vision_end_token, *text(5)]
            segments += [1, *expansion.segments, 6]
            patches.append(torch.randn(int(np.prod(visual.grid)), vision.patch_dim, generator=generator))
        documents.append(Document(name, tokens, merge_text_lengths(segments), torch.cat(patches), document_visuals))
    no_patches = torch.zeros(0, vision.patch_dim)
    for length in texts:
        documents.append(Document(f"text {length}", text(length), [length], no_patches))
    return documents


def _labels(document: Document) -> Tensor:
    """Return the next token of each token; the last one has none."""
    return torch.tensor([*document.tokens[1:], IGNORED])


def as_pack(documents: list[Document], shape: ModelShape) -> Pack:
    """Put all documents into one pack, every next token a target."""
    starts = np.cumsum([0, *(len(document.tokens) for document in documents)])
    tokens: list[int] = []
    grids = []
    placement = []
    for start, document in zip(starts, documents, strict=False):
        is_feature = np.isin(document.tokens, (shape.image_token, shape.video_token))
        placement.append(start + np.flatnonzero(is_feature))
        tokens += document.tokens
        grids += document.grids
    # Transformers goes on after a video by this rule.
    positions = [family_of(shape).positions(document.segments, shape, "grid") for document in documents]
    return Pack(
        tokens=torch.tensor(tokens),
        labels=torch.cat([_labels(document) for document in documents]),
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        patches=torch.cat([document.patches for document in documents]),
        grid_thw=torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        placement=torch.from_numpy(np.concatenate(placement)),
        extras={},
    )


@dataclass(frozen=True)
class Reference:
    """Results of Transformers' model.

    Attributes:
        outputs: logits [length, vocabulary], or a critic's values [length, 1], of each document.
        loss: `objective` over all documents, divided by the number of targets.
        gradients: of the loss, under Hugging Face names.
    """

    outputs: list[Tensor]
    loss: float
    gradients: dict[str, Tensor]


def reference(directory: Path, documents: list[Document], dtype: torch.dtype, critic: bool = False) -> Reference:
    """Run Transformers' model document by document; a critic has the value head of `Engine.load`."""
    shape = ModelShape.from_hf(directory)
    model_class = family_of(shape).load_hf_class()
    with one_sentence(f"{directory}: Transformers cannot load its model", "see that the whole folder is there"):
        model = model_class.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    return run_reference(model, shape, documents, critic)


def run_reference(model: Any, shape: ModelShape, documents: list[Document], critic: bool = False) -> Reference:
    """Run a model of Transformers, as `reference` does."""
    dtype = model.dtype
    head = torch.nn.Linear(shape.hidden, 1, bias=False, dtype=dtype)
    # `Engine.load` draws a critic's head from the same seed.
    init_value_head(head.weight, "orz", torch.Generator().manual_seed(0))
    target_count = sum(len(document.tokens) - 1 for document in documents)
    outputs = []
    total_loss = 0.0
    for document in documents:
        hidden = model.model(**_transformers_inputs(document, shape, dtype)).last_hidden_state[0]
        # Values are computed in float32 in every dtype.
        out = F.linear(hidden.float(), head.weight.float()) if critic else model.lm_head(hidden).float()
        outputs.append(out.detach())
        if critic:
            loss = (out[:-1, 0] - _targets(len(out) - 1)).square().sum() / target_count
        else:
            loss = F.cross_entropy(out, _labels(document), reduction="sum", ignore_index=IGNORED) / target_count
        loss.backward()
        total_loss += loss.item()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[canonical(name)] = parameter.grad
    if critic:
        assert head.weight.grad is not None
        gradients[VALUE_HEAD] = head.weight.grad
    return Reference(outputs, total_loss, gradients)


def _transformers_inputs(document: Document, shape: ModelShape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of Transformers' model for a batch of one document."""
    ids = torch.tensor([document.tokens])
    # 0 for text, 1 for an image, 2 for a video.
    token_types = (ids == shape.image_token).long() + 2 * (ids == shape.video_token).long()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": token_types}
    visuals = document.visuals
    if not visuals:
        return inputs
    grid = torch.tensor([visual.grid for visual in visuals])
    if visuals[0].seconds is None:
        return inputs | {"pixel_values": document.patches.to(dtype), "image_grid_thw": grid}
    return inputs | {
        "pixel_values_videos": document.patches.to(dtype),
        "video_grid_thw": grid,
        "second_per_grid_ts": torch.full((len(visuals),), SECONDS_PER_SLICE),
    }


def _targets(count: int) -> Tensor:
    """Return the values that a critic is trained towards in the first ``count`` scored rows of a document."""
    return torch.sin(torch.arange(count, dtype=torch.float32))


def objective(scores: Scores, pack: Pack) -> LossSum:
    """Sum the cross entropy, or a critic's squared error, over the scored rows."""
    if scores.values is None:
        assert scores.logprobs is not None
        return LossSum(-scores.logprobs.sum(), len(scores.rows), {})
    error = scores.values - scores.beside(pack, "target")
    return LossSum(error.square().sum(), len(scores.rows), {})


def make_packs(documents: list[Document], shape: ModelShape, packed: bool, critic: bool, at_least: int) -> list[Pack]:
    """Put every document into its own pack or, if ``packed``, several documents into each of ``at_least`` packs."""
    if packed:
        shares = [documents[index::at_least] for index in range(at_least)]
    else:
        shares = [[document] for document in documents]
    packs = []
    for share in shares:
        pack = as_pack(share, shape)
        if critic:
            targets = [F.pad(_targets(len(document.tokens) - 1), (0, 1)) for document in share]
            pack.extras["target"] = torch.cat(targets)
        packs.append(pack)
    return packs


def compare(engine: Engine, documents: list[Document], theirs: Reference | None, packed: bool = False) -> ParityReport:
    """Run the engine on the documents and compare with the reference.  A collective.

    Args:
        engine: with weights and an optimizer.
        documents: at least one for each data-parallel rank.
        theirs: the reference, on the first rank only.
        packed: put several documents into a pack.

    Returns:
        On the first rank the full report.
    """
    dp_size = engine.groups.dp.size()
    dp_rank = engine.groups.dp.rank()
    packs = make_packs(documents, engine.shape, packed, engine.critic, max(2, dp_size))
    report = ParityReport(dtype=str(engine.config.params_dtype).removeprefix("torch."))
    # Every replica scores all documents, in their order; of the backward pass each takes its own packs.
    scored_packs = [as_pack(documents, engine.shape)] if packed else packs
    if engine.critic:
        outputs = [scores.values.cpu() for scores in engine.scores(scored_packs) if scores.values is not None]
        lengths = [len(document.tokens) - 1 for document in documents]
    else:
        outputs = [engine.logits(pack).cpu() for pack in scored_packs]
        lengths = [len(document.tokens) for document in documents]
    report.loss = engine.backward(packs[dp_rank::dp_size], objective)["loss"]
    # Gathering the gradients is a collective: ranks without the reference leave after it.
    gradients = {name: gradient.cpu() for name, gradient in engine.gradients()}
    if theirs is None:
        return report
    report.reference_loss = theirs.loss
    report.largest_logit = max(float(output.abs().max()) for output in theirs.outputs)
    our_outputs = torch.cat(outputs).split(lengths)
    for document, reference_output, our_output in zip(documents, theirs.outputs, our_outputs, strict=True):
        expected = reference_output[:-1, 0] if engine.critic else reference_output
        report.logits[document.name] = float((our_output - expected).abs().max())
    report.gradients = gradient_differences(gradients, theirs.gradients)
    return report


def gradient_differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Return ||ours - theirs|| / max(||theirs||, 1e-6 ||all of theirs||) of each gradient, by name.

    It is infinite where only one side has the gradient.
    """
    total_norm = float(torch.stack([gradient.float().norm() for gradient in theirs.values()]).norm())
    differences = dict.fromkeys(ours.keys() ^ theirs.keys(), float("inf"))
    for name in ours.keys() & theirs.keys():
        difference = float((ours[name].float() - theirs[name].float()).norm())
        norm = float(theirs[name].float().norm())
        differences[name] = difference / max(norm, _SMALLEST_SHARE * total_norm)
    return differences


def verify(
    directory: Path,
    weights: Path,
    parallel: ParallelConfig,
    dtype: Dtype = "float32",
    packed: bool = False,
    critic: bool = False,
) -> ParityReport:
    """Compare in the layout of this process group; the first rank holds the full report."""
    check_assets(directory)
    shape = check_assets(weights)
    world = distributed.start(parallel, seed=0)
    documents = make_documents(shape, texts=ODD_LENGTHS if packed else ())
    engine = Engine(shape, ModelConfig(path=str(weights), dtype=dtype), parallel, world, critic)
    engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(weights))
    theirs = reference(directory, documents, DTYPES[dtype], critic) if world.is_main else None
    return compare(engine, documents, theirs, packed)


def show(report: ParityReport) -> str:
    """Format the report as a few lines of text."""
    lines = [f"{'input':8} largest logit difference (bound {report.logit_bound:.1e})"]
    lines += [f"{name:8} {value:.3e}" for name, value in report.logits.items()]
    name, worst = report.worst_gradient
    lines.append(f"{len(report.gradients)} gradients, bound {report.gradient_bound:.0e}: worst {worst:.3e} ({name})")
    lines.append(f"loss {report.loss:.7f}, Transformers {report.reference_loss:.7f}")
    lines.append("passed" if report.passed else "FAILED")
    return "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    """Verify in this process group; return the exit code, 0 if every difference is within its bound."""
    weights = weights_of(arguments.checkpoint) if arguments.checkpoint else arguments.hf
    report = verify(arguments.hf, weights, arguments.layout, arguments.dtype, arguments.packed, arguments.critic)
    code = 0
    if distributed.is_main():
        if arguments.json:
            text = json.dumps(asdict(report) | {"passed": report.passed, "logit_bound": report.logit_bound})
        else:
            text = show(report)
        print(text, flush=True)
        code = 0 if report.passed else 1
    distributed.finish()
    return code
