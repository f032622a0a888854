"""On the real device as on the one that `tests/model/residency.py` plays: more packs, no more waiting for it."""

import warnings
from pathlib import Path

import pytest
import torch

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.ppo.objectives import PolicyObjective, ValueObjective
from ovr_megatron.runtime.distributed import World
from tests.gpu.test_model import build
from tests.model.test_residency import packs_of


@pytest.mark.parametrize(("layers", "fp8"), [("local", "none"), ("transformer_engine", "none"), ("auto", "current")])
@pytest.mark.parametrize("critic", [False, True], ids=["policy", "critic"])
def test_nothing_waits_between_the_packs(
    folders: dict[str, Path], world: World, layers: str, fp8: str, critic: bool
) -> None:
    engine = build(folders["untied"], world, critic, layers=layers, fp8=fp8, dtype="bfloat16")
    objective = (ValueObjective if critic else PolicyObjective)(AlgorithmConfig())
    packs = packs_of(engine.shape)
    engine.backward(packs * 3, objective)  # kernels are chosen and compiled
    waits = []
    for chosen in (packs, packs * 3):
        with warnings.catch_warnings(record=True, action="always") as told:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                engine.backward(chosen, objective)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append([f"{w.filename}:{w.lineno}" for w in told if "a synchronizing CUDA operation" in str(w.message)])
    print(layers, fp8, critic, waits[0])
    assert len(waits[0]) == len(waits[1]), waits[1]
