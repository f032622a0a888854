"""Every recipe composes and fits the machine in its name; recipes of adapters fit cards of 24 and 48 GB."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from ovr_megatron.cli.plan import main
from ovr_megatron.config import ConfigError
from ovr_megatron.families.presets import presets
from ovr_megatron.launch import RECIPES, compose
from ovr_megatron.plan.hardware import GPUS, find_gpu, gpu_in_name
from ovr_megatron.plan.report import Options, plan, processes

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = ("prepare", "tiny", "evaluate")
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(ELSEWHERE))
NODE = 8


def test_the_recipes_are_those_of_the_documentation() -> None:
    assert len(NAMES) == 20


def test_the_documentation_names_the_recipes_that_keep_the_model_s_template() -> None:
    recipes = {path.stem: path.read_text() for path in RECIPES.glob("*.yaml")}
    keep = {name for name, text in recipes.items() if re.search(r"^ *template: model$", text, re.MULTILINE)}
    sentence = re.search(r"The recipes (.*) keep the model's chat template", (ROOT / "docs/recipes.md").read_text())
    patterns = re.findall(r"`([^`]+)`", sentence[1])
    assert keep == {name for name in recipes if any(fnmatch(name, pattern) for pattern in patterns)}


def test_help_names_the_published_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"published models: {', '.join(presets())}" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_machine(name: str) -> None:
    config = compose(name, ["model.path=7B"] if "_7b_" in name else [])
    world = max(processes(name, config.parallel), NODE if name == "rl_7b_from_ovr_coldstart" else 1)
    summary = plan(config, Options(world, gpu_in_name(name), search=False))
    needs = {phase["name"]: f"{phase['total'] / 2**30:.1f} GiB" for phase in summary["phases"]}
    print(name, needs, f"{summary['by_cost_model']['hours']:.0f} hours")
    assert summary["fits"], needs
    assert summary["by_cost_model"]["hours"] > 0


@pytest.mark.parametrize("name", ["sft_7b_8gpu", "cold_start_7b_8gpu"])
def test_the_tower_may_train(name: str) -> None:
    config = compose(name, ["model.path=7B", "model.freeze_vision=false", "model.freeze_merger=false"])
    assert plan(config, Options(NODE, search=False))["fits"]


def test_a_gpu_is_a_kind_or_a_memory() -> None:
    assert gpu_in_name("grpo_lora_3b_24gb") == "a10"
    assert gpu_in_name("sft_lora_7b_48gb") == "l40s"
    assert gpu_in_name("rl_7b_64gpu") == "h100"
    assert find_gpu("40").memory == 40 << 30
    assert find_gpu("h200") is GPUS["h200"]
    for name in ("h300", "-1", "nan", "0"):
        with pytest.raises(ConfigError, match="give its memory in GiB"):
            find_gpu(name)
