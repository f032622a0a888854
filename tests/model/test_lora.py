"""Adapters (LoRA) compute what PEFT computes, in every layout: one launch of four processes."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from ovr_megatron.checkpoint.conversion import export_hf, import_hf
from ovr_megatron.checkpoint.manifest import CheckpointError
from ovr_megatron.config import LoraConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.weights.adapters import MergedFolder, adapter_rows, check_adapter
from ovr_megatron.weights.folder import ADAPTER_WEIGHTS, WeightError, WeightFolder
from tests.model.matrix import WHOLE
from tests.ranks import launch

ROOT = Path(__file__).resolve().parents[2]
BOUNDS = {"outputs": 1e-4, "gradients": 1e-4, "loss": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    make_tiny_model(folder / "model", tied=False, seed=5, perturb=True)
    launch(ROOT / "tests/model/lora.py", folder / "model", folder, ranks=4)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def check(results: dict[str, Any]) -> None:
    wrong = []
    for layout, row in results["table"].items():
        print(f"{layout:26}" + "".join(f"{row[column]:13.1e}" for column in BOUNDS))
        wrong += [(layout, column, row[column]) for column, bound in BOUNDS.items() if not row[column] <= bound]
    assert not wrong


def test_every_layout_computes_what_peft_computes(results: dict[str, Any]) -> None:
    check(results)
    assert len(results["table"]) == (16 if WHOLE else 8)


@pytest.mark.skipif(not WHOLE, reason="one family is enough in a short run")
def test_adapters_of_a_further_family_compute_what_peft_computes(tmp_path: Path) -> None:
    sizes = TinySizes(layers=8)
    make_tiny_model(tmp_path / "model", tied=False, seed=5, perturb=True, sizes=sizes, family="qwen3_vl")
    launch(ROOT / "tests/model/lora.py", tmp_path / "model", tmp_path, ranks=4)
    results = json.loads((tmp_path / "results.json").read_text())
    check(results)
    assert max(results["merged"].values()) < 1e-5


def test_a_new_adapter_changes_nothing(results: dict[str, Any]) -> None:
    assert results["unchanged at the start"] < 1e-5


def test_the_first_adapter_does_not_depend_on_the_layout(results: dict[str, Any]) -> None:
    for losses in results["losses"].values():
        assert losses == pytest.approx(results["written losses"], rel=1e-4)
    assert results["losses"]["tp=2,sp=1"] == results["written losses"]
    assert results["written losses"][-1] < results["written losses"][0]


def test_merged_equals_unmerged(results: dict[str, Any]) -> None:
    print(results["merged"], results["shards"])
    assert max(results["merged"].values()) < 1e-5
    # PEFT merges the same file to the same weights.
    assert results["merged by PEFT"] < 1e-6
    # What goes to vLLM is the merged weight.
    assert max(results["shards"].values()) < 1e-6


def test_policy_and_critic_have_one_base(results: dict[str, Any]) -> None:
    """The frozen weights are one memory, offloaded for both; no bit differs from a critic that has its own."""
    for layout, facts in results["one base"].items():
        assert all(facts.values()) and len(facts) == 7, (layout, facts)
    assert len(results["one base"]) == (13 if WHOLE else 3)


def test_disabled_adapters_leave_the_initial_model(results: dict[str, Any]) -> None:
    assert results["without adapters"] == 0


def test_a_resumed_run_goes_on_bit_for_bit(results: dict[str, Any]) -> None:
    written, same, *others = results["resumed"]
    assert same == written
    for other in others:
        assert other == pytest.approx(written, rel=1e-5)


def test_a_run_goes_on_beside_its_own_weights_only(results: dict[str, Any]) -> None:
    other_weights, other_alpha, no_adapters = results["refused"]
    assert "trained beside the weights of" in other_weights and "give the first as model.path" in other_weights
    assert "adapters of alpha / rank 2, the settings make it 4" in other_alpha
    assert "holds adapters and model.lora.rank is 0" in no_adapters


def test_a_critic_is_merged_without_its_head(results: dict[str, Any]) -> None:
    names = results["merged critic"]
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert not {"lm_head.weight", "value_head.weight"} & set(names)


def test_a_folder_of_adapters_is_no_model(folder: Path, tmp_path: Path) -> None:
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    export = partial(export_hf, critic=False, dtype=None, workers=1, force=False)
    with pytest.raises(CheckpointError, match="holds adapters: give --merge"):
        export(checkpoint, tmp_path / "export")
    with pytest.raises(WeightError, match="holds a LoRA adapter and no model"):
        WeightFolder(checkpoint / "policy")
    import_hf(folder / "model", tmp_path / "imported", workers=1, force=False, yarn=None)
    with pytest.raises(CheckpointError, match="nothing to merge; leave out --merge"):
        export(tmp_path / "imported", tmp_path / "export", merge=True)


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (checkpoint,) = (folder / "checkpoints").glob("step_*")
    adapter = WeightFolder(checkpoint / "policy", ADAPTER_WEIGHTS)
    sizes = TinySizes(hidden=256, heads=8, kv_heads=4)
    make_tiny_model(tmp_path / "other", tied=False, seed=5, sizes=sizes)
    with pytest.raises(WeightError, match="the adapter is of another model"):
        MergedFolder(tmp_path / "other", adapter, 2.0)
    shape = ModelShape.from_hf(folder / "model")
    with pytest.raises(WeightError, match=r"model.lora.rank and the model must be those"):
        check_adapter(adapter, adapter_rows(shape, LoraConfig(rank=8, vision=True)))
    with pytest.raises(WeightError, match=r"model.lora.layers, model.lora.vision and the model must be those"):
        check_adapter(adapter, adapter_rows(shape, LoraConfig(rank=4)))


def test_a_checkpoint_holds_adapters_only(folder: Path, results: dict[str, Any]) -> None:
    (policy,) = (folder / "checkpoints").glob("step_*/policy")
    assert not (policy / "model.safetensors").exists()
    with safe_open(policy / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert any(".visual." in name for name in names)
    config = json.loads((policy / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    # Four linears in each of four language layers and two blocks of the tower, A and B of each.
    assert results["trained"] == (4 + 2) * 4 * 2
