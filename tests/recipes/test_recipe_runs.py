"""Every training recipe, scaled down to two ranks of a CPU, trains two steps with the choices that its file makes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ovr_megatron.config import SourceConfig
from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.sources import open_source
from ovr_megatron.families import family_of_folder
from ovr_megatron.launch import RECIPES
from ovr_megatron.model.tiny import make_tiny_model
from tests.ranks import launch
from tests.recipes.launch import LONGEST, model_family, rows_of, scale_down

pytestmark = pytest.mark.both_cores

ROOT = Path(__file__).resolve().parents[2]
ALL = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("prepare", "evaluate")))
# One of each kind; tests/soak.sh trains all of them.
KINDS = ["cold_start_7b_64gpu", "sft_7b_8gpu", "sft_lora_3b_24gb", "ppo_7b_8gpu", "grpo_7b_8gpu", "grpo_lora_3b_24gb"]
KINDS += ["grpo_qwen3_vl_4b_8gpu"]
NAMES = ALL if os.environ.get("OVR_TEST_WHOLE") else KINDS


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of the recipes, all trained by one launch on chats and problems with images."""
    out = tmp_path_factory.mktemp("recipes")
    for family in {model_family(recipe) for recipe in NAMES}:
        make_tiny_model(out / family, tied=True, seed=5, family=family)
        # A teacher that equals its student teaches nothing.
        make_tiny_model(out / f"{family}_teacher", tied=True, seed=6, family=family)
    kinds = {"chats": "image", "problems": "image&answered=0", "texts": "text&answered=0"}
    for name, kind in kinds.items():
        rows = open_source(SourceConfig(path=f"puzzle:digits?task=sum&form={kind}"))
        lines = [json.dumps(row_to_json(rows[index])) for index in range(24)]
        assert all(('"image"' in line) == (name != "texts") for line in lines)
        (out / f"{name}.jsonl").write_text("\n".join(lines))
    launch(ROOT / "tests/recipes/launch.py", out, *NAMES, ranks=2)
    return out


def values_of(recipe: str) -> Any:
    """What the recipe's file says, with those that it is built on."""
    values = OmegaConf.load(RECIPES / f"{recipe}.yaml")
    bases = [base for base in values.pop("defaults") if base not in ("schema", "_self_")]
    return OmegaConf.merge(*map(values_of, bases), values)


def leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return found


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_trains_two_steps_with_its_own_choices(runs: Path, recipe: str) -> None:
    run = runs / recipe
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    checkpoint = run / "checkpoints/step_000002"
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 2
    assert family_of_folder(checkpoint / "policy").name == model_family(recipe)

    chosen = leaves(OmegaConf.to_container(values_of(recipe)))
    scaled = {override.partition("=")[0] for override in scale_down(recipe, runs)}
    built = leaves(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    kept = {name: value for name, value in chosen.items() if name not in scaled}
    assert kept and {name: built[name] for name in kept} == kept
    assert not {name for name in scaled if name.startswith(("model.", "optimizer.", "critic."))} - {"model.path"}

    assert_moments_of_what_trains(checkpoint, "policy", chosen)
    is_rl = "iterations" in chosen
    has_critic = is_rl and chosen.get("algorithm.estimator", "gae") == "gae"
    assert (checkpoint / "critic").exists() == has_critic and ("critic/loss" in lines[0]) == has_critic
    if has_critic:
        assert_moments_of_what_trains(checkpoint, "critic", chosen)
    if is_rl:
        assert_rollouts(run, lines, rows_of(recipe) == "problems")
    else:
        warmup = chosen["optimizer.warmup_steps"]
        rates = [line["optimizer/lr"] for line in lines]
        assert rates == pytest.approx([chosen["optimizer.lr"] * step / warmup for step in (1, 2)])
        assert all(line["optimizer/grad_norm"] > 0 for line in lines)


def assert_moments_of_what_trains(checkpoint: Path, name: str, chosen: dict[str, Any]) -> None:
    """Adam has moments of the parts that the recipe trains, which gradients have reached, and of no others."""
    moments = load_file(checkpoint / f"{name}-exp_avg/model.safetensors")
    moved = {key for key, tensor in moments.items() if tensor.any()}
    if chosen.get("model.lora.rank"):
        # The gradient of A is 0 until B has moved, after the first step.
        assert all("lora_" in key or key == "v_head.weight" for key in moments) and moved
        assert not any("visual" in key for key in moments)
        return
    vision = {key for key in moments if "visual." in key}
    merger = {key for key in vision if "merger." in key}
    assert bool(vision - merger) != chosen.get("model.freeze_vision", False)
    assert bool(merger) != chosen.get("model.freeze_merger", False)
    matrices = {key for key in moments if key.endswith(("proj.weight", "qkv.weight"))}
    assert matrices and matrices <= moved


def test_the_text_only_stage_goes_on_from_a_run_on_images_and_leaves_its_tower(runs: Path) -> None:
    checkpoints = [runs / name / "checkpoints/step_000002" for name in ("images", "text")]
    folders = [runs / "qwen2_5_vl", *(checkpoint / "policy" for checkpoint in checkpoints)]
    first, multimodal, text = (load_file(folder / "model.safetensors") for folder in folders)
    vision = {key for key in text if "visual." in key}
    # The first stage has moved the tower: its weights are not those of the model that it began with.
    moved = {key for key in vision if not torch.equal(multimodal[key], first[key].to(multimodal[key].dtype))}
    assert any("merger." in key for key in moved) and any("blocks." in key for key in moved)
    assert {key for key in vision if not torch.equal(text[key], multimodal[key])} == set()
    language = {key for key in text if key.endswith("proj.weight")} - vision
    assert language and all(not torch.equal(text[key], multimodal[key]) for key in language)
    # No text has a gradient for the tower: what is frozen has no moments either.
    moments = load_file(checkpoints[1] / "policy-exp_avg/model.safetensors")
    assert language <= moments.keys() and not vision & moments.keys()
    for name, has_images in (("images", True), ("text", False)):
        lines = [json.loads(line) for line in (runs / name / "metrics/train.jsonl").read_text().splitlines()]
        assert_rollouts(runs / name, lines, has_images)


def assert_rollouts(run: Path, lines: list[dict[str, float]], has_images: bool) -> None:
    """Both iterations have responses within the limit; the groups of the first differ, and the policy has learned."""
    for line, file in zip(lines, sorted((run / "rollouts").glob("*.jsonl")), strict=True):
        rows = [json.loads(row) for row in file.read_text().splitlines()]
        assert len(rows) == 8 and all(bool(row["image"]) == has_images and 0 < row["tokens"] <= LONGEST for row in rows)
        assert line["rollout/mismatch_mean"] < 0.05  # as rollout.mismatch_warning
    assert max(line["policy/grad_norm"] for line in lines) > 0
