"""What engines really hold, for tests/plan/test_memory.py: 4 processes of ``tests/plan/engines.py MODELS OUT``.

Every layout of the parity matrix is built, some also for tied models, and makes one optimizer step; then the live bytes
of forward and backward passes are counted for several shapes, layouts and kinds of recomputation.  How many there are
tests/model/matrix.py says.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from ovr_megatron.coldstart.step_trainer import cross_entropy
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.config.layout_text import parse_layout
from ovr_megatron.data.packing import Pack
from ovr_megatron.engine import Engine, LossSum
from ovr_megatron.families import ModelShape
from ovr_megatron.model.scores import Scores
from ovr_megatron.runtime import distributed
from tests.model.layouts import LAYOUTS, VARIANTS
from tests.model.matrix import WHOLE
from tests.plan.live_bytes import LiveBytes

# Tokens, lengths of the documents, images of how many patches on a side.
PACKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "one document": ((512,), ()),
    "documents": ((250, 180, 82), ()),
    "images": ((512,), (16, 24)),
}


def text_and_images(shape: ModelShape, lengths: tuple[int, ...], sides: tuple[int, ...]) -> Pack:
    """Random tokens, every one scored, and images at the beginning."""
    tokens = torch.randint(0, 256, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    features = sum(side * side for side in sides) // shape.vision.merge**2
    return Pack(
        tokens=tokens,
        labels=tokens.clone(),
        position_ids=torch.cat([torch.arange(n) for n in lengths]).repeat(3, 1),
        cu_seqlens=torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        patches=torch.randn(sum(side * side for side in sides), shape.vision.patch_dim),
        grid_thw=torch.tensor([[1, side, side] for side in sides], dtype=torch.int64).reshape(-1, 3),
        placement=torch.arange(features),
    )


def build(
    folder: Path, parallel: ParallelConfig, critic: bool = False, base: Engine | None = None, **model: Any
) -> Engine:
    settings = ModelConfig(path=str(folder), **model)
    engine = Engine(ModelShape.from_hf(folder), settings, parallel, world, critic, base)
    for part in engine.parts:
        for parameter in part.parameters():  # not loaded, so not all are initialised
            parameter.data.normal_(0, 0.02)
    return engine.with_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=0), 1)


def loss(scores: Scores, pack: Pack) -> LossSum:
    """Of a policy or of a critic."""
    if scores.values is not None:
        return LossSum(scores.values.square().sum(), len(scores.rows), {})
    return cross_entropy(scores, pack)


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_tensors(engine: Engine) -> Iterator[Tensor]:
    """Moments, and the float32 masters of bfloat16 weights; step counters (single numbers) are left out."""
    held = {p.untyped_storage()._cdata for part in engine.parts for p in part.parameters()}
    for optimizer in engine.live.optimizers:
        adam = optimizer.optimizer
        for group in adam.param_groups:
            for parameter in group["params"]:
                if parameter.untyped_storage()._cdata not in held:
                    yield parameter.data
                yield from (value for name, value in adam.state[parameter].items() if name != "step")


def held(engine: Engine) -> dict[str, int]:
    """This rank's bytes after one optimizer step."""
    engine.train([text_and_images(engine.shape, (16,), (4,))] * engine.parallel.pp, loss)
    parameters = [p for part in engine.parts for p in part.parameters()]
    return {
        "stage": engine.groups.pp.rank(),
        "optimizer_rank": engine.groups.dp_cp.rank(),
        "parameters": sum(p.numel() for p in parameters),
        "weights": storage_bytes(iter(parameters)),
        "gradients": storage_bytes(b.grad_data for model in engine.models for b in model.buffers),
        "optimizer": storage_bytes(optimizer_tensors(engine)),
    }


def everyone(mine: dict[str, int]) -> list[dict[str, int]]:
    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, mine)
    return found


def states(models: Path) -> list[dict[str, Any]]:
    """The bytes of every rank in every layout."""
    cases = [("untied", False, parse_layout(x)[0], {}) for x in ("", *LAYOUTS)]
    cases += [("tied", True, parse_layout(x)[0], {}) for x in ("", *LAYOUTS[::3])]
    cases += [("tied", False, parse_layout(x)[0], {}) for x in ("", "tp=2", "pp=2", "pp=2,vpp=2", "zero=1")]
    cases += [("untied", False, parallel, model) for parallel, model in VARIANTS.values()]
    cases += [("untied", False, parse_layout(x)[0], {"lora": LORA}) for x in ("", "tp=2,sp=1", "pp=2", "zero=1,pp=2")]
    cases += [("untied", True, ParallelConfig(), {"lora": LORA})]
    cases += [("untied", False, parse_layout("zero=1")[0], {"lora": LORA, "dtype": "bfloat16"})]
    cases += [("further", False, parse_layout(x)[0], {}) for x in ("tp=2,sp=1", "zero=1,pp=2")]
    table = []
    for name, critic, parallel, model in cases:
        ranks = everyone(held(build(models / name, parallel, critic, **model)))
        table.append({"name": name, "critic": critic, "parallel": asdict(parallel), "model": model, "ranks": ranks})
    return table


def pairs(models: Path) -> list[dict[str, Any]]:
    """The bytes that every rank has of a policy and a critic whose frozen weights are the same memory."""
    table = []
    for name, layout, dtype in PAIRS:
        parallel = parse_layout(layout)[0]
        policy = build(models / name, parallel, lora=LORA, dtype=dtype)
        critic = build(models / name, parallel, critic=True, base=policy, lora=LORA, dtype=dtype)
        sizes = [held(policy), held(critic)]
        weights = storage_bytes(p for engine in (policy, critic) for part in engine.parts for p in part.parameters())
        states = sum(size["gradients"] + size["optimizer"] for size in sizes)
        places = {key: sizes[0][key] for key in ("stage", "optimizer_rank")}
        ranks = everyone(places | {"bytes": weights + states})
        table.append({"name": name, "layout": layout, "dtype": dtype, "ranks": ranks})
    return table


MEASURED = [
    *product(("tied",), ("none", "full"), ("", "tp=2,sp=1"), ("images",), ("float32",)),
    *product(("wide",), ("none", "selective", "full"), ("", "tp=2,sp=1"), ("documents", "images"), ("float32",)),
    *product(("wide",), ("none",), ("", "tp=2"), ("one document",), ("float32",)),
    *product(("wide",), ("none", "full"), ("", "tp=2,sp=1"), ("documents", "images"), ("bfloat16",)),
    *product(("wide",), ("none", "full"), ("cp=2",), ("documents",), ("float32",)),
]
LORA = {"rank": 4, "vision": True}
PAIRS = (
    ("untied", "", "float32"),
    ("untied", "tp=2,sp=1", "bfloat16"),
    ("tied", "pp=2", "float32"),
    ("tied", "zero=1,cp=2", "float32"),
)
ADAPTED = list(product(("wide",), ("none", "full"), ("", "tp=2,sp=1"), ("documents", "images"), ("float32",)))
# A family whose decoder and vision tower differ from the default's.
FURTHER = [
    ("further", "none", "", "images", "float32"),
    ("further", "none", "tp=2,sp=1", "documents", "float32"),
    ("further", "full", "", "images", "bfloat16"),
]
CRITICS = list(product(("wide",), ("none",), ("",), ("documents",), ("float32", "bfloat16")))


def peaks(models: Path) -> list[dict[str, Any]]:
    """Peak of live bytes in forward and backward on the fullest rank, and what the backward pass keeps."""
    table = []
    cases = [(case, False, {}) for case in MEASURED] + [(case, True, {}) for case in CRITICS]
    cases += [(case, False, LORA) for case in ADAPTED]
    if not WHOLE:  # every third meets each value once, but for a single document and a critic
        cases = [*cases[::3], (MEASURED[17], False, {}), (CRITICS[1], True, {})]
    cases += [(case, False, {}) for case in FURTHER]
    for (name, recompute, layout, kind, dtype), critic, lora in cases:
        engine = build(models / name, parse_layout(layout)[0], critic, recompute=recompute, dtype=dtype, lora=lora)
        pack = text_and_images(engine.shape, *PACKS[kind])
        with engine.layout.active():
            parallel_state.get_global_memory_buffer().buffer.clear()
        with LiveBytes() as live:
            engine.backward([pack], loss)
        with LiveBytes() as forward:
            engine.scores([pack])
        ranks = everyone({"peak": live.peak, "forward": forward.peak})
        row = {"name": name, "recompute": recompute, "layout": layout, "pack": kind, "dtype": dtype}
        row |= {"critic": critic, "lora": lora}
        table.append(row | {key: max(rank[key] for rank in ranks) for key in ("peak", "forward")})
    return table


if __name__ == "__main__":
    models, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = distributed.start(ParallelConfig(), seed=0, threads=1)
    results = {"states": states(models), "peaks": peaks(models), "pairs": pairs(models)}
    if world.is_main:
        out.write_text(json.dumps(results))
    distributed.finish()
