"""The plan beside real engines: bytes of parameters, gradients and optimizer exactly, of activations within 10 %."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.config import ColdStartConfig, DataConfig, ModelConfig, ParallelConfig, RunConfig
from ovr_megatron.config.layout_text import parse_layout
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.launch import compose
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.plan import memory
from ovr_megatron.plan.activations import PackShape, activations
from ovr_megatron.plan.hardware import find_gpu
from ovr_megatron.plan.layer import Kernels
from ovr_megatron.plan.parameters import buckets, model_state, rank_parameters
from ovr_megatron.plan.scenario import build_scenario
from ovr_megatron.runtime import distributed
from ovr_megatron.weights.folder import WeightFolder
from tests.model.matrix import WHOLE
from tests.plan.engines import PACKS, loss, text_and_images
from tests.ranks import launch

ROOT = Path(__file__).resolve().parents[2]
WIDE = TinySizes(hidden=256, heads=8, kv_heads=4, ffn=1024, layers=3, vision_hidden=128, vision_depth=3, vision_ffn=320)
# Documents of 250 and 180 tokens are attended as one batch of two rows, the third alone.
SHAPES = {
    "one document": PackShape(512, 512, batched=0),
    "documents": PackShape(512, 512, batched=(2 * 250 + 82) / 512),
    "images": PackShape(512, 512, patches=sum(side * side for side in PACKS["images"][1]), batched=0),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    for name, tied, sizes in (("tied", True, None), ("untied", False, None), ("wide", False, WIDE)):
        make_tiny_model(folder / name, tied=tied, seed=5, sizes=sizes)
    make_tiny_model(folder / "further", tied=False, seed=5, sizes=replace(WIDE, layers=4), family="qwen3_vl")
    return folder


@pytest.fixture(scope="module")
def measured(models: Path) -> dict[str, Any]:
    launch(ROOT / "tests/plan/engines.py", models, models / "results.json", ranks=4)
    return json.loads((models / "results.json").read_text())


def test_every_rank_of_every_layout_holds_what_the_plan_says(models: Path, measured: dict[str, Any]) -> None:
    wrong, checked = [], 0
    for case in measured["states"]:
        shape, parallel = ModelShape.from_hf(models / case["name"]), ParallelConfig(**case["parallel"])
        model = ModelConfig(path="x", **case["model"])
        for rank in case["ranks"]:
            place = (rank["stage"], rank["optimizer_rank"], case["critic"])
            planned = asdict(model_state(shape, model, parallel, 4 // parallel.ranks, *place))
            wrong += [
                (case, key) for key in ("parameters", "weights", "gradients", "optimizer") if planned[key] != rank[key]
            ]
            checked += 1
    assert not wrong
    assert checked == 4 * len(measured["states"]) == 4 * (48 if WHOLE else 37)


def test_a_policy_and_a_critic_have_the_frozen_weights_once(models: Path, measured: dict[str, Any]) -> None:
    for case in measured["pairs"]:
        options = [f"model.path={models / case['name']}", f"model.dtype={case['dtype']}", "data.sources=[]"]
        options += ["model.lora.rank=4", "model.lora.vision=true"]
        options += [f"parallel.{key}={value}" for key, value in asdict(parse_layout(case["layout"])[0]).items()]
        scenarios = []
        for critic in ([], ["critic.path=elsewhere"]):
            config = compose("tiny_rl", [*options, *critic])
            shape = ModelShape.from_hf(models / case["name"])
            scenarios.append(build_scenario(config, shape, find_gpu("h100"), 4, None))
        for phase, apart in zip(*map(memory.phases, scenarios), strict=True):
            (real,) = {
                rank["bytes"] for rank in case["ranks"] if (rank["stage"], rank["optimizer_rank"]) == (phase.stage, 0)
            }
            assert phase.items["policy"] + phase.items["critic"] == real, (case["name"], case["layout"], phase.name)
            assert phase.items["critic"] < 0.8 * apart.items["critic"], "most of the miniature is frozen"


def test_activations_are_within_a_tenth_of_what_is_alive(models: Path, measured: dict[str, Any]) -> None:
    far = []
    for case in measured["peaks"]:
        model = ModelConfig(path="x", recompute=case["recompute"], dtype=case["dtype"], lora=case["lora"])
        parallel, pack = parse_layout(case["layout"])[0], SHAPES[case["pack"]]
        shape = ModelShape.from_hf(models / case["name"])
        planned = activations(shape, model, parallel, pack, critic=case["critic"], kernels=Kernels("local", "cpu"))
        errors = {key: getattr(planned, key) / case[key] - 1 for key in ("peak", "forward")}
        words = " ".join(case[key] or "one rank" for key in ("name", "dtype", "recompute", "layout", "pack"))
        words += " critic" if case["critic"] else ""
        words += " adapters" if case["lora"] else ""
        print(f"{words:50}{case['peak']:12,}{errors['peak']:+7.1%}   forward {errors['forward']:+7.1%}")
        far += [words] if abs(errors["peak"]) > 0.1 or abs(errors["forward"]) > 0.25 else []
    assert not far


def test_buckets_of_a_large_model(models: Path) -> None:
    """With overlap Megatron cuts a buffer of more than 40 million elements."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    shape = replace(
        ModelShape.from_hf(models / "untied"),
        **{"hidden": 1024, "heads": 8, "kv_heads": 4, "head_dim": 128, "ffn": 4096, "mrope_section": (16, 24, 24)},
    )
    model = ModelConfig(path="x", dtype="bfloat16")
    parallel = ParallelConfig(distributed_optimizer=True, overlap=True)
    buffer = Engine(shape, model, parallel, world).models[0].buffers[0]
    (part,) = rank_parameters(shape, model, parallel, False, 0)
    planned = list(buckets(part, parallel, 1, True))
    real = [end - start for start, end in buffer.bucket_indices]
    assert len(real) > 1
    assert [bucket.numel for bucket in planned] == real
    assert sum(bucket.owned(0, 1) for bucket in planned) == sum(p.numel for p in part)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_takes_the_planned_bytes(tmp_path: Path, models: Path, dtype: str) -> None:
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    folder = models / "tied"
    model = ModelConfig(path=str(folder), dtype=dtype, freeze_vision=True)
    config = ColdStartConfig(run=RunConfig(dir=str(tmp_path)), model=model)
    shape = ModelShape.from_hf(folder)
    engine = (
        Engine(shape, model, ParallelConfig(), world).with_optimizer(config.optimizer, 1).load(WeightFolder(folder))
    )
    engine.train([text_and_images(shape, (16,), ())], loss)
    write_hf_assets(tmp_path / "companions", Processor(folder, DataConfig()))
    saved = store.save(tmp_path / "checkpoints", 1, {"policy": engine}, tmp_path / "companions", {}, world)
    written = 0
    for part in saved.glob("policy*"):
        tensors = WeightFolder(part)
        written += sum(tensors.tensor(name).nbytes for name in tensors.names())
    assert written == memory.checkpoint_bytes(config, shape)
