"""Between the start of a step and its end the host never waits for the device."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from ovr_megatron.config import AlgorithmConfig, ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.document_losses import DocumentLosses
from ovr_megatron.data.packing import Pack
from ovr_megatron.engine import Engine, LossSum
from ovr_megatron.families import ModelShape, families
from ovr_megatron.model import attention, heads
from ovr_megatron.model.scores import Scores
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.objectives import PolicyObjective, ValueObjective
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.device import send
from ovr_megatron.weights.folder import WeightFolder
from tests.model.residency import Residency
from tests.plan.engines import PACKS, text_and_images

# A step ends with two: Megatron asks whether any token was counted, and the means are read for the log.
ENDS = ("core/distributed/finalize_model_grads.py", "engine.py")


@pytest.fixture
def residency(monkeypatch: pytest.MonkeyPatch) -> Residency:
    """Everything that the project sends goes to the played device; the head's tiles are kernels there."""
    for family in families():
        family.load_model_class()  # so that its modules are there and have their `send` replaced
    found = Residency()
    modules = [module for name, module in sys.modules.items() if name.startswith("ovr_megatron")]
    for module in [module for module in modules if getattr(module, "send", None) is send]:
        monkeypatch.setattr(module, "send", found.sent)
    for module, name in ((heads, "_add_tile"), (heads, "_tile_gradient"), (attention, "_turn")):
        monkeypatch.setattr(module, name, found.kernel(getattr(module, name)))
    return found


def test_what_would_wait_is_seen() -> None:
    found = Residency()
    here, host = torch.ones(4), torch.ones(4)
    found.put([here])
    with found:
        float(here.sum())
        here + host
        here[here > 0]
        torch.tensor([1.0], device="cpu")
        float(host.sum()), host.tolist()
        here.tolist()
        here.view(2, 2) * torch.zeros(2, 2, device="cpu") * 2.0
    assert [(key.partition(": ")[2].split(" with")[0], count) for key, count in found.noted.items()] == [
        ("aten._local_scalar_dense reads the device", 1),
        ("aten.add mixes the device", 1),
        ("aten.index counts a mask on the device", 1),
        ("torch.tensor copies a value to the device", 1),
        ("tolist reads the device", 1),
    ]


def packs_of(shape: ModelShape) -> list[Pack]:
    found = [text_and_images(shape, *PACKS[name]) for name in ("documents", "images")]
    for pack in found:
        names = ("advantages", "rollout_logprobs", "weights", "returns", "values")
        pack.extras |= {name: torch.randn(len(pack.tokens)) for name in names}
        pack.extras["modalities"] = torch.randint(0, 3, (len(pack.tokens),)).float()
    return found


@pytest.mark.parametrize("critic", [False, True], ids=["policy", "critic"])
def test_nothing_waits_between_the_packs(tmp_path: Path, residency: Residency, critic: bool) -> None:
    world = distributed.start(ParallelConfig(), seed=1)
    folder = make_tiny_model(tmp_path / "model", tied=False, seed=1)
    shape = ModelShape.from_hf(folder)
    model = ModelConfig(path=str(folder))
    engine = Engine(shape, model, ParallelConfig(), world, critic).with_optimizer(OptimizerConfig(), 1)
    engine.load(WeightFolder(folder))
    objective = (ValueObjective if critic else PolicyObjective)(AlgorithmConfig())
    packs = packs_of(shape)
    losses = DocumentLosses(0)

    def loss(scores: Scores, pack: Pack) -> LossSum:
        own = scores.values if critic else scores.logprobs
        assert own is not None
        losses.add(pack, scores.rows, own)
        return objective(scores, pack)

    residency.put(engine._weight_tensors())
    residency.put(engine._gradient_tensors())
    residency.put(buffer for part in engine.parts for buffer in part.buffers())
    residency.put(optimizer.get_loss_scale() for optimizer in engine.live.optimizers)
    counts = []
    for chosen in (packs, packs * 2):
        residency.noted.clear()
        with residency:
            engine.backward(chosen, loss)
        counts.append(Counter(residency.noted))
        assert not [key for key in residency.noted if not key.startswith(ENDS)]
    assert counts[0] == counts[1], "more packs, more waiting"
    residency.noted.clear()
    with residency:
        engine.scores(packs)
    assert not residency.noted
