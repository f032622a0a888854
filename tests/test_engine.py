"""What an engine allocates and communicates: nothing for frozen parts, nothing that grows for a pack without images."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ovr_megatron.config import ConfigError, ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.model.layers import choose_layer_classes, layers_in_use
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.batch import Batch
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.verify import make_documents, make_packs, objective
from ovr_megatron.weights.folder import WeightFolder


@pytest.fixture(scope="module")
def world() -> World:
    return distributed.start(ParallelConfig(), seed=1, threads=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), tied=False, seed=3, perturb=True)


def build(folder: Path, world: World, **model: Any) -> Engine:
    engine = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder), **model), ParallelConfig(), world)
    return engine.with_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=0), 10).load(WeightFolder(folder))


@pytest.mark.parametrize("part", ["freeze_vision", "freeze_merger", "freeze_language"])
def test_a_frozen_part_costs_no_gradient_and_no_state(folder: Path, world: World, part: str) -> None:
    engine = build(folder, world, **{part: True})
    frozen = [h.parameter for h in engine.live.holdings if h.row.megatron not in engine.trained]
    trained = [h.parameter for h in engine.live.holdings if h.row.megatron in engine.trained]
    assert frozen and trained
    engine.train(make_packs(make_documents(engine.shape), engine.shape, True, False, 1), objective)
    assert not any(hasattr(parameter, "main_grad") or parameter.grad is not None for parameter in frozen)
    buffered = sum(buffer.numel_unpadded for buffer in engine.models[0].buffers)
    assert buffered == sum(parameter.numel() for parameter in trained)
    adam = engine.live.optimizers[0].optimizer
    assert sum(key.numel() for group in adam.param_groups for key in group["params"]) == buffered


def test_what_is_frozen_stays_and_what_trains_moves(folder: Path, world: World) -> None:
    engine = build(folder, world, freeze_vision=True, freeze_merger=True)
    before = {name: tensor.clone() for name, tensor in engine.weights()}
    engine.train(make_packs(make_documents(engine.shape), engine.shape, True, False, 1), objective)
    for name, tensor in engine.weights():
        assert torch.equal(tensor, before[name]) == name.startswith("visual."), name


@pytest.mark.parametrize("critic", [False, True])
def test_steps_are_those_of_adamw(folder: Path, world: World, critic: bool) -> None:
    """Four steps of every parameter: warm-up and decay of the rate, clipping, betas, eps, decay of matrices alone."""
    settings = OptimizerConfig(
        **{"lr": 1e-2, "schedule": "linear", "min_lr_ratio": 0.1, "warmup_steps": 2},
        **{"beta1": 0.8, "beta2": 0.9, "eps": 1e-4, "weight_decay": 0.2, "clip_grad": 0.5},
    )
    rates = [0.005, 0.01, 0.01, 0.01 * (0.1 + 0.9 * 3 / 4)]  # six steps in all, two of them warm-up
    engine = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), ParallelConfig(), world, critic)
    engine.with_optimizer(settings, 6).load(WeightFolder(folder))
    packs = make_packs(make_documents(engine.shape), engine.shape, True, critic, 1)
    reference = {name: torch.nn.Parameter(tensor.double()) for name, tensor in engine.weights()}
    groups = [
        {"params": [p for p in reference.values() if p.dim() > 1], "weight_decay": 0.2},
        {"params": [p for p in reference.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-4)
    for rate in rates:
        engine.backward(packs, objective)
        for name, gradient in engine.gradients():
            reference[name].grad = gradient.double()
        norm = torch.nn.utils.clip_grad_norm_(reference.values(), 0.5)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        step = engine.step()
        assert step["lr"] == pytest.approx(rate, rel=1e-12)
        assert step["grad_norm"] == pytest.approx(float(norm), rel=1e-5) and norm > 0.5
        for name, tensor in engine.weights():
            torch.testing.assert_close(tensor.double(), reference[name].detach(), rtol=1e-6, atol=1e-7)


def test_a_pack_without_images_runs_the_tower_on_one_feature_only(folder: Path, world: World) -> None:
    engine = build(folder, world)
    seen: list[int] = []
    engine.parts[0].vision.patch_embed.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    packs = make_packs(
        [d for d in make_documents(engine.shape, texts=(300,)) if not len(d.patches)], engine.shape, True, False, 1
    )
    engine.backward(packs, objective)
    assert seen == [engine.shape.vision.merge**2]
    assert all(bool((g == 0).all()) for name, g in engine.gradients() if name.startswith("visual."))
    seen.clear()
    engine.scores(packs)
    assert not seen


def test_a_pack_without_labels_counts_nothing(folder: Path, world: World) -> None:
    engine = build(folder, world)
    packs = make_packs(make_documents(engine.shape), engine.shape, False, False, 1)
    alone = engine.backward(packs[:1], objective)
    packs[1].labels.fill_(IGNORED)
    assert engine.backward(packs[:2], objective) == alone


def test_a_rank_may_have_nothing_to_learn_from(folder: Path, world: World) -> None:
    """Its pack of no responses takes part in every pass, and adds nothing to sums or gradients."""
    engine = Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), ParallelConfig(), world, critic=True)
    engine.with_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=0), 10).load(WeightFolder(folder))
    packs = make_packs(make_documents(engine.shape), engine.shape, True, True, 1)[:1]
    (blank,) = Batch([], [], 100, [], 8).packs([[]], **{name: [] for name in packs[0].extras})
    (scores,) = engine.scores([blank])
    assert scores.values is not None and len(scores.values) == 0
    alone = engine.backward(packs, objective)
    gradients = {name: gradient.clone() for name, gradient in engine.gradients()}
    assert engine.backward([*packs, blank], objective) == alone
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in engine.gradients())


def test_a_critic_of_bfloat16_has_float32_values(folder: Path, world: World) -> None:
    """The value of a row is its hidden state times the head, in float64 up to the rounding of float32."""
    model = ModelConfig(path=str(folder), dtype="bfloat16")
    engine = Engine(ModelShape.from_hf(folder), model, ParallelConfig(), world, critic=True).load(WeightFolder(folder))
    hidden: list[torch.Tensor] = []
    head = engine.parts[0].value_head
    head.register_forward_hook(lambda module, inputs, output: hidden.append(inputs[0]))
    packs = make_packs(make_documents(engine.shape), engine.shape, True, True, 1)
    (scores, *_) = engine.scores(packs[:1])
    assert scores.values is not None and len(scores.values) > 100
    expected = hidden[0].double() @ head.weight.detach().double()[0]
    torch.testing.assert_close(scores.values.double(), expected, rtol=1e-5, atol=1e-6)
    assert float(expected.std()) < 1


def test_a_world_that_does_not_fit_is_refused_before_anything_is_made(folder: Path, world: World) -> None:
    with pytest.raises(ConfigError, match="1 processes cannot be cut into tp=2"):
        Engine(ModelShape.from_hf(folder), ModelConfig(path=str(folder)), ParallelConfig(tp=2), world)


def test_transformer_engine_that_is_not_there_is_refused(folder: Path, world: World) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"model\.layers=transformer_engine"):
        build(folder, world, layers="transformer_engine")
    with pytest.raises(ConfigError, match=r"model\.layers=transformer_engine"):
        build(folder, world, dtype="bfloat16", fp8="current")


def test_float32_is_multiplied_by_our_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with Transformer Engine, which multiplies float32 in TF32."""
    names = ("TENorm", "TELayerNormColumnParallelLinear", "TERowParallelLinear")
    stand_in = ModuleType("transformer_engine")
    vars(stand_in).update(
        {name: type(name, (), {}) for name in names}, HAVE_TE=True, TEDotProductAttention=torch.nn.Module
    )
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine", stand_in)
    monkeypatch.setattr("megatron.core.extensions.transformer_engine", stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_layer_classes("auto", torch.bfloat16).norm is stand_in.TENorm
    assert choose_layer_classes("auto", torch.float32) == choose_layer_classes("local", torch.float32)
    with pytest.raises(ConfigError, match=r"model\.layers=transformer_engine with model\.dtype=float32"):
        choose_layer_classes("transformer_engine", torch.float32)
    assert "TF32" in layers_in_use(ModelConfig(path="x", dtype="float32"))


def test_eight_bits_need_bfloat16() -> None:
    with pytest.raises(ConfigError, match="fp8=current needs"):
        ModelConfig(path="x", fp8="current")
