"""The search beside a plan of each layout by itself; its command line composes to the plan that it printed."""

import itertools
import json
import shlex
import time

import pytest

from ovr_megatron.cli import plan as command
from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig
from ovr_megatron.launch import compose, read_command_line
from ovr_megatron.plan.plan_json import Plan
from ovr_megatron.plan.report import Options, plan
from ovr_megatron.plan.text import show

NODE = 8


def searched(recipe: str, *overrides: str, world: int = NODE, gpu: str = "h100") -> Plan:
    return plan(compose(recipe, overrides), Options(world, gpu, recipe=recipe, overrides=overrides))


def test_the_best_is_never_slower_than_the_recipe_and_its_command_gives_its_plan() -> None:
    for recipe, size in (("ppo_7b_8gpu", NODE), ("sft_7b_8gpu", NODE), ("grpo_lora_7b_48gb", 1)):
        began = time.perf_counter()
        found = searched(recipe, world=size, gpu="h100" if size > 1 else "l40s")
        print(recipe, f"{time.perf_counter() - began:.1f} s")
        best = found["candidates"][0]
        assert best["hours"] <= found["by_cost_model"]["hours"]
        words = shlex.split(found["best_command"])
        schema, stage = (ColdStartConfig, "sft") if "sft" in words else (RLConfig, "rl")
        line = read_command_line(schema, "none", "", [*words[words.index(stage) + 1 :], "--dry-run"])
        assert line.recipe == recipe
        again = plan(line.config, Options(size, found["gpu"]["name"], search=False))
        assert again["fits"] and again["by_cost_model"]["hours"] == best["hours"]
        assert max(phase["total"] for phase in again["phases"]) == best["bytes"]
        assert again["layout"]["parallel"] == best["parallel"]


def test_the_search_finds_the_best_of_all_layouts_planned_one_by_one() -> None:
    """A space of 24 layouts, of which some do not fit."""
    fixed = ["parallel.pp=1", "parallel.vpp=1", "parallel.distributed_optimizer=true", "parallel.overlap=true"]
    fixed += ["parallel.sequence_parallel=false", "parallel.cp=1"]
    found = searched("grpo_7b_8gpu", *fixed)
    fitting = {}
    space = ((1, 2), ("none", "selective", "full"), (1, 4), ("true", "false"))
    for tp, recompute, rollout_tp, offload in itertools.product(*space):
        settings = [f"parallel.tp={tp}", f"model.recompute={recompute}", f"rollout.tp={rollout_tp}"]
        settings.append(f"offload={offload}")
        try:
            one = plan(compose("grpo_7b_8gpu", [*fixed, *settings]), Options(NODE, search=False))
        except ConfigError:
            continue
        if one["fits"]:
            fitting[tp, recompute, rollout_tp, offload == "true"] = one["by_cost_model"]["hours"]
    assert 0 < len(fitting) < 24
    fits = [c for c in found["candidates"] if not c["reason"]]
    rows = [c for c in fits if c["parallel"]["tp"] in space[0] and c["rollout_tp"] in space[2]]
    assert {(c["parallel"]["tp"], c["recompute"], c["rollout_tp"], c["offload"]): c["hours"] for c in rows} == fitting
    assert rows[0]["hours"] == min(fitting.values())


def test_settings_of_the_command_line_stay() -> None:
    found = searched("grpo_3b_1gpu", "offload=true", "data.pack_tokens=2048", world=1, gpu="h200")
    assert {(c["offload"], c["rollout_tp"]) for c in found["candidates"]} == {(True, 1)}
    expected = "ovr rl --config-name grpo_3b_1gpu offload=true data.pack_tokens=2048 model.recompute=none"
    assert found["best_command"] == expected
    section = searched("sft_7b_8gpu", "parallel={tp: 2, sequence_parallel: true, overlap: false}")
    assert {c["parallel"]["tp"] for c in section["candidates"]} == {2} and len(section["candidates"]) == 3


def test_beyond_a_node_the_command_is_slurms() -> None:
    fixed = ["parallel.pp=1", "parallel.cp=1", "parallel.vpp=1"]
    words = shlex.split(searched("rl_7b_64gpu", *fixed, world=64)["best_command"])
    assert words[:4] == ["OVR_RECIPE=rl_7b_64gpu", "sbatch", "--nodes=8", "slurm/rl.sh"]
    compose("rl_7b_64gpu", words[4:])
    fixed += ["parallel.tp=2", "rollout.tp=2", "offload=true", "parallel.sequence_parallel=true", "prompts=48"]
    words = shlex.split(searched("ppo_7b_8gpu", *fixed, world=12)["best_command"])
    assert words[1:6] == ["sbatch", "--nodes=2", "--ntasks-per-node=6", "--gpus-per-node=6", "slurm/rl.sh"]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["ppo_7b_8gpu", "--gpu", "24", "--json", "parallel.pp=1", "parallel.vpp=1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["best_command"] is None and all(c["reason"] for c in found["candidates"])


def test_an_engine_without_room_for_one_sequence_does_not_fit() -> None:
    found = plan(compose("grpo_lora_3b_24gb", ["rollout.kv_cache_gib=0.01"]), Options(1, "a10", search=False))
    assert not found["fits"] and "sequences of 2,048  DOES NOT FIT" in show(found)
