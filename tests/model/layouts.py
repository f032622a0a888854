"""The parity matrix, for tests/model/test_layouts.py: ``torchrun ... 4 processes ... layouts.py MODELS OUT FAMILY``.

Every layout starts from the same weights and sees the same documents.  "One process" is data parallelism whose
ranks all see everything: sums and counts are four times as large, which is exact.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.config.layout_text import parse_layout
from ovr_megatron.data.packing import Pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape, default_family
from ovr_megatron.model.transformer_config import DTYPES
from ovr_megatron.runtime import distributed
from ovr_megatron.verify import (
    ODD_LENGTHS,
    Document,
    Reference,
    compare,
    gradient_differences,
    make_documents,
    make_packs,
    objective,
    reference,
)
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.table import cut_dim
from tests.model import shared_prompts
from tests.model.matrix import WHOLE

# Of the 4 ranks, what a layout leaves over is data parallel.
LAYOUTS: tuple[str, ...] = (
    "tp=2,sp=1",
    "pp=4",
    "cp=4",
    "cp=2,tp=2",
    "pp=2,tp=2",
    "pp=2,vpp=2,cp=2",
    "zero=1",
    "zero=1,tp=2",
    "zero=1,pp=2",
    "zero=1,cp=2",
)
CRITIC_LAYOUTS: tuple[str, ...] = ("tp=2,sp=1", "cp=2,tp=2", "pp=2,vpp=2,cp=2", "zero=1,pp=2")
if WHOLE:
    LAYOUTS += ("tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "cp=2,tp=2,sp=1", "pp=2,tp=2,sp=1", "pp=2,cp=2")
    CRITIC_LAYOUTS = LAYOUTS
# Folder of the model: layout, and whether it is a critic.
OTHER_SHAPES = {
    "8 heads of 32": ("tp=2,sp=1", False),
    "one vision layer": ("tp=2,sp=1", True),
    "odd sizes": ("cp=2", False),
}
SHARED_PROMPT_LAYOUTS: tuple[str, ...] = ("tp=2,sp=1", "cp=2,tp=2", "pp=2,vpp=2,cp=2")
STEPS = 4
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=0, clip_grad=1.0, weight_decay=0.1)
# Left out of the one-process column: bfloat16 is compared with float32.
VARIANTS = {
    "pp=2, uneven layers": (ParallelConfig(pp=2, first_stage_layers=3, last_stage_layers=1), {}),
    "recompute selective": (ParallelConfig(), {"recompute": "selective"}),
    "recompute full, pp=2, vpp=2": (ParallelConfig(pp=2, vpp=2), {"recompute": "full"}),
    "frozen vision": (ParallelConfig(), {"freeze_vision": True, "freeze_merger": True}),
    "frozen vision, zero=1, pp=2": (
        ParallelConfig(pp=2, distributed_optimizer=True, overlap=True),
        {"freeze_vision": True, "freeze_merger": True},
    ),
    "frozen language, cp=2": (ParallelConfig(cp=2), {"freeze_language": True}),
    "bf16, cp=2, tp=2, sp=1": (ParallelConfig(cp=2, tp=2, sequence_parallel=True), {"dtype": "bfloat16"}),
    "bf16, zero=1, pp=2": (
        ParallelConfig(pp=2, distributed_optimizer=True, overlap=True),
        {"dtype": "bfloat16"},
    ),
}
if WHOLE:
    VARIANTS["recompute full, cp=2"] = (ParallelConfig(cp=2), {"recompute": "full"})
    VARIANTS["bf16"] = (ParallelConfig(), {"dtype": "bfloat16"})


def build(folder: Path, parallel: ParallelConfig, critic: bool, **model: object) -> Engine:
    settings = ModelConfig(path=str(folder), **model)
    engine = Engine(ModelShape.from_hf(folder), settings, parallel, world, critic)
    return engine.with_optimizer(OPTIMIZER, STEPS).load(WeightFolder(folder))


def cpu(tensors) -> dict[str, Tensor]:
    return {name: tensor.float().cpu().clone() for name, tensor in tensors}


def packs_of(engine: Engine, everything: bool) -> list[Pack]:
    """This rank's packs; the same documents are in a pack in every layout."""
    packs = make_packs(found, engine.shape, packed=True, critic=engine.critic, at_least=4)
    return packs if everything else packs[engine.groups.dp.rank() :: engine.groups.dp.size()]


def trained(engine: Engine, everything: bool = False) -> dict[str, Tensor]:
    """Weights after `STEPS` optimizer steps."""
    for _ in range(STEPS):
        engine.train(packs_of(engine, everything), objective)
    return cpu(engine.weights())


def drift(start: dict[str, Tensor], one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest ||w - w(one process)|| / ||w(one process) - w(start)|| over the tensors."""
    return max(float((other[n] - one[n]).norm() / (one[n] - start[n]).norm().clamp(min=1e-12)) for n in one)


def replicas_agree(engine: Engine) -> bool:
    """Whether every rank that holds the same parameter holds the same bits."""
    list(engine.weights())  # waits for what the optimizer has not gathered yet
    agree = torch.tensor(1)
    for holding in engine.live.holdings:
        groups = [engine.groups.dp_cp] + ([engine.groups.tp] if cut_dim(holding.row) is None else [])
        for group in groups:
            theirs = holding.parameter.detach().clone()
            dist.broadcast(theirs, group=group, group_src=0)
            agree &= torch.equal(theirs, holding.parameter)
    dist.all_reduce(agree, dist.ReduceOp.MIN)
    return bool(agree)


def row(
    engine: Engine,
    theirs: Reference | None,
    one: dict[str, Tensor] | None,
    samples: list[Document] | None = None,
) -> dict[str, float]:
    """The layout's errors against Transformers and against one process."""
    report = compare(engine, samples or found, theirs, packed=True)
    ours = cpu(engine.gradients())
    if theirs is None:
        return {}
    expected = {name: theirs.gradients[name] for name in ours}
    errors = {
        "outputs": max(report.logits.values()) / max(1.0, report.largest_logit),
        "gradients": max(gradient_differences(ours, expected).values()),
        "loss": abs(report.loss - theirs.loss) / abs(theirs.loss),
        "trained": len(ours),
    }
    if one is not None:
        errors["one process"] = max(gradient_differences(ours, {name: one[name] for name in ours}).values())
    return errors


def matrix(folder: Path, critic: bool) -> dict[str, dict[str, float]]:
    theirs = reference(folder, found, DTYPES["float32"], critic) if world.is_main else None
    single = build(folder, ParallelConfig(), critic)
    single.backward(packs_of(single, everything=True), objective)
    one = cpu(single.gradients())
    start = cpu(single.weights())
    table = {"dp=4": row(single, theirs, one)}
    with_drift = not critic and folder.name == "untied"
    after = trained(single, everything=True) if with_drift else {}
    # A tied policy differs in pipelines only, where the last stage has a copy of the embedding.
    pipelines_only = folder.name == "tied" and not critic
    layouts = CRITIC_LAYOUTS if critic else LAYOUTS
    for layout in (name for name in layouts if "pp" in name or not pipelines_only):
        engine = build(folder, parse_layout(layout)[0], critic)
        table[layout] = row(engine, theirs, one)
        if with_drift:
            found_after = trained(engine)
            agree = replicas_agree(engine)
            table[layout] |= {"steps": drift(start, after, found_after), "replicas agree": agree}
    if with_drift:
        for name, (parallel, model) in VARIANTS.items():
            engine = build(folder, parallel, critic, **model)
            table[name] = row(engine, theirs, None if "dtype" in model else one)
    return table


def two_layouts(folder: Path) -> dict[str, dict[str, float]]:
    """A policy in TP 2 and a critic in CP 2, taking turns."""
    engines = {
        "policy tp=2 beside a critic": build(folder, ParallelConfig(tp=2), critic=False),
        "critic cp=2 beside a policy": build(folder, ParallelConfig(cp=2), critic=True),
    }
    theirs = {
        name: reference(folder, found, torch.float32, engine.critic) if world.is_main else None
        for name, engine in engines.items()
    }
    for engine in engines.values():
        engine.scores(packs_of(engine, everything=True))
    return {name: row(engine, theirs[name], None) for name, engine in engines.items()}


def other_shapes(models: Path) -> dict[str, dict[str, float]]:
    """Models of other sizes, each in one layout."""
    table = {}
    for name, (layout, critic) in OTHER_SHAPES.items():
        folder = models / name
        samples = make_documents(ModelShape.from_hf(folder))
        theirs = reference(folder, samples, torch.float32, critic) if world.is_main else None
        table[f"{name}, {layout}"] = row(build(folder, parse_layout(layout)[0], critic), theirs, None, samples)
    return table


def packed_equals_separate(folder: Path) -> dict[str, float]:
    """Log-probabilities of every document alone against those in a pack, in several layouts."""
    errors = {}
    for layout in ("", "cp=2", "tp=2,sp=1", "pp=2"):
        engine = build(folder, parse_layout(layout)[0], critic=False)
        alone = engine.scores(make_packs(found, engine.shape, False, False, 1))
        together = engine.scores(make_packs(found, engine.shape, True, False, 1))
        separate = torch.cat([scores.logprobs for scores in alone if scores.logprobs is not None])
        assert together[0].logprobs is not None
        errors[layout or "dp=4"] = float((separate - together[0].logprobs).abs().max())
    return errors


def with_shared_prompts(folder: Path) -> dict[str, dict[str, float]]:
    """Packs whose responses share their prompts against packs of whole samples, in several layouts."""
    table = {}
    for layout in SHARED_PROMPT_LAYOUTS:
        for critic in (False, True):
            engine = build(folder, parse_layout(layout)[0], critic)
            table[f"{layout}, {'critic' if critic else 'policy'}"] = shared_prompts.compare(engine)
    return table


def resumed(folder: Path, out: Path) -> dict[str, list[list[float]]]:
    """Losses of four steps after a checkpoint, where it was written and in other layouts."""
    if world.is_main:
        write_hf_assets(out / "companions", Processor(folder, DataConfig()))
    losses: dict[str, list[list[float]]] = {}
    writers = {"tp=2,pp=2,zero=1": ParallelConfig(tp=2, pp=2, distributed_optimizer=True, overlap=True)}
    if WHOLE:
        writers["pp=2,zero=1"] = ParallelConfig(pp=2, distributed_optimizer=True, overlap=True)
    for name, parallel in writers.items():
        writer = build(folder, parallel, critic=False)
        for _ in range(3):
            writer.train(packs_of(writer, everything=False), objective)
        store.save(out / name, 3, {"policy": writer}, out / "companions", {}, world)
        losses[name] = [[writer.train(packs_of(writer, False), objective)["loss"] for _ in range(4)]]
        for other in (
            replace(parallel),
            ParallelConfig(),
            ParallelConfig(cp=2),
            ParallelConfig(distributed_optimizer=True, overlap=True),
        ):
            engine = build(folder, other, critic=False)
            checkpoint = store.find(out / name, world)
            assert checkpoint is not None
            store.restore(checkpoint, {"policy": engine})
            losses[name].append([engine.train(packs_of(engine, False), objective)["loss"] for _ in range(4)])
    return losses


if __name__ == "__main__":
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    is_default = sys.argv[3] == default_family().name
    if not is_default:  # what all families share is computed for the default one
        OTHER_SHAPES = {"odd sizes": OTHER_SHAPES["odd sizes"]}
        # Its first layers take features: 8 layers, of which each part of a pipeline has at least 2.
        VARIANTS["pp=2, uneven layers"] = (ParallelConfig(pp=2, first_stage_layers=7, last_stage_layers=1), {})
    if not (is_default or WHOLE):
        LAYOUTS = ("tp=2,sp=1", "pp=4", "cp=2,tp=2,sp=1", "pp=2,vpp=2,cp=2", "zero=1,tp=2")
        CRITIC_LAYOUTS = ("pp=2,vpp=2,cp=2",)
        SHARED_PROMPT_LAYOUTS = ("cp=2,tp=2",)
        variants = ("pp=2, uneven layers", "recompute full, pp=2, vpp=2", "frozen language, cp=2")
        VARIANTS = {name: VARIANTS[name] for name in (*variants, "bf16, cp=2, tp=2, sp=1")}
    world = distributed.start(ParallelConfig(), seed=0, threads=1)
    found = make_documents(ModelShape.from_hf(models / "tied"), texts=ODD_LENGTHS)
    results = {
        "matrix": {
            f"{name} {'critic' if critic else 'policy'}": matrix(models / name, critic)
            for name, critic in (("untied", False), ("tied", False), ("tied", True))
        },
        "side by side": two_layouts(models / "untied") if is_default else {},
        "other shapes": other_shapes(models),
        "packed": packed_equals_separate(models / "untied"),
        "shared prompts": with_shared_prompts(models / "untied"),
        "resumed": resumed(models / "tied", out / "checkpoints") if is_default else {},
    }
    if world.is_main:
        (out / "results.json").write_text(json.dumps(results, indent=1))
    distributed.finish()
