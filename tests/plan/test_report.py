"""The plan as a whole: FLOP beside a counter's, sampled lengths, recipes, layouts, and the two command lines."""

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.config import ColdStartConfig, ConfigError, DataConfig, ModelConfig, RunConfig, SourceConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.sources import open_source
from ovr_megatron.families import ModelShape
from ovr_megatron.families.qwen2_5_vl.flops import patch_forward
from ovr_megatron.launch import compose
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.plan import cost, search
from ovr_megatron.plan.flops import FRAME, token_flops
from ovr_megatron.plan.hardware import find_gpu
from ovr_megatron.plan.parameters import count_parameters
from ovr_megatron.plan.report import Options, plan, processes, read_shape
from ovr_megatron.plan.scenario import Scenario, build_scenario
from ovr_megatron.plan.simulation import SimulationOptions
from ovr_megatron.plan.text import show
from ovr_megatron.plan.workload import Workload, assume_workload, measure

ROOT = Path(__file__).resolve().parents[2]
RECIPES_7B = ("cold_start_7b_64gpu", "rl_7b_64gpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = TinySizes(vision_depth=3, max_positions=4096)
    return make_tiny_model(tmp_path_factory.mktemp("plan") / "model", tied=False, seed=1, sizes=sizes)


def of_7b(recipe: str, *overrides: str) -> Scenario:
    config = compose(recipe, overrides)
    return build_scenario(config, read_shape("7B")[0], find_gpu("h100"), 64, None)


def counted(model: torch.nn.Module, **inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def test_flop_of_a_text_and_an_image_are_what_a_counter_counts(folder: Path) -> None:
    shape = ModelShape.from_hf(folder)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    length = 96
    load = Workload(length, length, 0, "")
    ours = length * token_flops(shape, ModelConfig(path="x"), load).forward
    # The counter's attention is not causal: it has twice our products of queries, keys and values.
    attention = shape.layers * 2 * shape.heads * shape.head_dim * length**2
    assert counted(theirs, input_ids=torch.arange(length)[None]) == ours + attention
    grid = torch.tensor([[1, 32, 40]])
    patches = torch.randn(1280, shape.vision.patch_dim)
    found = counted(theirs.model.visual, hidden_states=patches, grid_thw=grid)
    assert found == pytest.approx(1280 * sum(patch_forward(shape, 1280)), rel=1e-3)


def test_training_flop_follow_what_is_frozen(folder: Path) -> None:
    shape = ModelShape.from_hf(folder)
    load = Workload(100, 100, 40, "")
    tower, merger = (0.4 * n for n in patch_forward(shape, FRAME))
    free = token_flops(shape, ModelConfig(path="x"), load)
    language = free.forward - tower - merger
    assert free.training == pytest.approx(3 * free.forward)
    frozen = token_flops(shape, ModelConfig(path="x", freeze_vision=True, freeze_merger=True), load)
    assert frozen.training == pytest.approx(3 * language + tower + merger)
    projector = token_flops(shape, ModelConfig(path="x", freeze_vision=True, freeze_language=True), load)
    # Attention has a backward pass in any case.
    attention = 2 * shape.layers * shape.heads * shape.head_dim * load.attended_length
    assert projector.training == pytest.approx(2 * language + attention + tower + 3 * merger)
    text = Workload(100, 100, 0, "")
    without_images = token_flops(shape, ModelConfig(path="x", freeze_language=True), text)
    assert without_images.training == pytest.approx(2 * language + attention)
    assert 100 * without_images.training == pytest.approx(training_flops(shape, [100], language_trains=False))


def test_lengths_and_patches_are_measured_on_the_data(folder: Path) -> None:
    source = SourceConfig(path="puzzle:digits?form=image&task=sum")
    data = DataConfig(sources=[source], min_pixels=784, max_pixels=12544)
    found = measure(str(folder), data, seed=1, generation=False, rows=8)
    samples = Processor(folder, data).encode([open_source(source)[i] for i in range(400)][:200], generation=False)
    lengths = {len(sample) for sample in samples}
    assert min(lengths) <= found.tokens <= max(lengths)
    assert found.patches == len(samples[0].patches) > 0
    assert found.tokens <= found.attended_length <= max(lengths)
    assert "8 of 8 rows" in found.basis


def test_a_finite_source_is_measured_whole(folder: Path, tmp_path: Path) -> None:
    texts = ["short", "a longer answer of several words", "x " * 200]
    turns = [[("user", "?"), ("assistant", f"So</think>{text}")] for text in texts]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(tmp_path / "rows.jsonl"))
    data = DataConfig(sources=[source])
    opened = open_source(source)
    lengths = [len(s) for s in Processor(folder, data).encode([opened[i] for i in range(3)], generation=False)]
    found = measure(str(folder), data, seed=1, generation=False, rows=3)
    assert found.tokens == sum(lengths) / 3
    assert found.attended_length == sum(n * n for n in lengths) / sum(lengths)


@pytest.mark.parametrize("recipe", RECIPES_7B)
def test_the_7b_recipes_fit_64_gpus_of_80_gb(recipe: str) -> None:
    found = plan(compose(recipe, []), Options(world=64, search=False))
    text = show(found)
    assert found["fits"] and "DOES NOT FIT" not in text
    assert sum(found["model"]["parameters"].values()) == 8_292_166_656  # the hub's Qwen2.5-VL-7B-Instruct
    seconds = found["at_mfu"]["hours"] * 3600
    assert seconds * 64 * 989e12 * 0.4 == pytest.approx(found["flops"])
    assert f"{found['at_mfu']['hours']:,.1f} hours" in text


def test_without_sharding_the_rl_recipe_does_not_fit() -> None:
    found = plan(compose("rl_7b_64gpu", ["parallel.distributed_optimizer=false"]), Options(world=64, search=False))
    assert not found["fits"]
    assert "DOES NOT FIT into 79.6" in show(found)


def test_more_of_a_resource_never_takes_more_memory() -> None:
    def most(*overrides: str) -> int:
        found = plan(compose("cold_start_7b_64gpu", overrides), Options(world=64, search=False))
        return max(phase["total"] for phase in found["phases"])

    whole = most("model.recompute=none")
    assert whole > most("model.recompute=selective") > most("model.recompute=full")
    assert most("parallel.cp=2") > most("parallel.cp=4") > most("parallel.cp=8")
    assert most("parallel.sequence_parallel=false") > most()


def test_layouts_are_listed_fastest_first_with_reasons_for_the_others() -> None:
    work = of_7b("cold_start_7b_64gpu")
    found = search.candidates(work)
    fitting = [c for c in found if not c.reason]
    assert [c.hours for c in fitting] == sorted(c.hours for c in fitting)
    assert all(c.bytes <= work.gpu.memory for c in fitting)
    assert found[: len(fitting)] == fitting and all(c.reason for c in found[len(fitting) :])
    reasons = {c.reason.split(" needs ")[0] for c in found if c.reason}
    assert any("does not divide the model's 4 key-value heads" in reason for reason in reasons)
    assert "out of memory: phase train" in reasons
    assert any(c.layout == search.layout_of(work) for c in fitting)
    # The recipe's own layout costs what the plan of the recipe says.
    own = next(c for c in fitting if c.layout == search.layout_of(work))
    assert own.hours == search.hours(work)


def test_bubble_of_a_pipeline() -> None:
    work = of_7b("cold_start_7b_64gpu", "parallel.pp=4", "parallel.cp=1", "parallel.tp=2")
    assert cost.bubble(work, work.spans[0]) == 3 / (640 / 8)
    interleaved = work.with_settings(parallel=replace(work.config.parallel, vpp=7))
    assert cost.bubble(interleaved, work.spans[0]) == pytest.approx(3 / (7 * 640 / 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["no_such_recipe"],
            "no_such_recipe is no recipe; give the path of a YAML file, or of those in .* one: cold_start_7b_64gpu",
        ),
        (["cold_start_7b_64gpu", "parallel.tp=8"], "parallel.tp=8 does not divide the model's 4 key-value heads"),
        (["cold_start_7b_64gpu", "packs_per_step=641"], "packs_per_step=641 cannot be shared by 8"),
        (["cold_start_7b_64gpu", "model.path=9B"], "model.path=9B is no folder; for a plan it can also be one of 3B"),
        (["tiny_cold_start"], "no value for model.path"),
        (["cold_start_7b_64gpu", "data.sed=1"], "there is no setting data.sed"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(compose(arguments[0], arguments[1:]), Options(world=64, search=False))


def test_processes_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(variable, raising=False)
    parallel = compose("cold_start_7b_64gpu", ["parallel.pp=2"]).parallel
    assert processes("cold_start_7b_64gpu", parallel) == 64
    assert processes("tiny_rl", parallel) == 16
    monkeypatch.setenv("WORLD_SIZE", "32")
    assert processes("cold_start_7b_64gpu", parallel) == 32


def test_stated_lengths_end_at_the_limit() -> None:
    assert assume_workload(3700, 65536).attended_length == 7400
    assert assume_workload(40000, 49152).attended_length == 49152


def test_what_is_measured_replaces_what_is_stated(folder: Path) -> None:
    data = DataConfig(sources=[SourceConfig(path="puzzle:digits?form=text&task=sum")], mean_tokens=4000)
    config = ColdStartConfig(run=RunConfig(dir="run"), model=ModelConfig(path=str(folder)), data=data)
    found = plan(config, Options(world=1, search=False))
    assert found["spans"][0]["mean_tokens"] < 200 and "rows measured" in found["spans"][0]["told"]


def test_command_line(loaded_python: Path, tmp_path: Path) -> None:
    command = [loaded_python, ROOT / "tools/plan.py", "rl_7b_64gpu", "--gpu", "a100-40", "--json", "iterations=10"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr  # it does not fit
    found = json.loads(done.stdout)
    assert found["steps"] == 10 and not found["fits"] and len(found["candidates"]) > 1000
    assert {phase["name"] for phase in found["phases"]} >= {"generate", "value", "update policy", "sync"}
    assert all(math.isfinite(c["hours"]) for c in found["candidates"])


def test_dry_run_starts_nothing(loaded_python: Path, folder: Path, tmp_path: Path) -> None:
    """A world of 16 that is not there: a process group would wait for it."""
    settings = ["--dry-run", "--config-name", "tiny_cold_start", f"model.path={folder}", f"run.dir={tmp_path / 'run'}"]
    settings += ["packs_per_step=32"]
    command = [loaded_python, "-m", "ovr_megatron.coldstart", *settings]
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "16",
        "RANK": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "processes   16 x h100" in done.stdout and "by the cost model" in done.stdout
    assert not (tmp_path / "run").exists()


def test_8_bit_copies_are_planned_and_wait_with_offload() -> None:
    """Two bytes for each number of the layers' matrices of a rank, in each phase in which the model is there."""
    whole, copies = ["model.path=7B"], {}
    for fp8 in ("none", "current"):
        for offload in ("false", "true"):
            config = compose("rl_7b_64gpu", [*whole, f"model.fp8={fp8}", f"offload={offload}"])
            found = plan(config, Options(64, search=False))
            copies[fp8, offload] = {phase["name"]: phase["items"].get("FP8 copies", 0) for phase in found["phases"]}
    matrices = 28 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944) // 4  # tp=4
    assert not any(copies["none", "false"].values())
    assert copies["current", "false"] == dict.fromkeys(copies["none", "false"], 2 * 2 * matrices), "policy and critic"
    kept = {"generate": 0} | dict.fromkeys(("value", "update critic", "update policy", "sync"), 2 * matrices)
    assert copies["current", "true"] == kept


def test_with_offload_vllm_has_the_gpu_to_itself_and_leaves_nothing() -> None:
    items = {}
    for offload in ("false", "true"):
        config = compose("rl_7b_64gpu", ["model.path=7B", f"offload={offload}"])
        found = plan(config, Options(64, search=False))
        items[offload] = {phase["name"]: phase["items"] for phase in found["phases"]}
        assert found["fits"]
    assert items["true"]["generate"]["vLLM cache"] > 1.8 * items["false"]["generate"]["vLLM cache"]
    assert all(("vLLM graphs" in held) == (name in ("generate", "sync")) for name, held in items["true"].items())
    assert all("vLLM graphs" in held for held in items["false"].values())


def test_ranks_that_only_generate_have_the_engines_and_nothing_else() -> None:
    config = compose("rl_7b_64gpu", ["model.path=7B", "rollout.ranks=32"])
    split = plan(config, Options(64, search=False))
    items = {phase["name"]: phase["items"] for phase in split["phases"]}
    assert {name for name in items["generate"] if name in ("policy", "critic")} == set()
    for name in ("value", "update critic", "update policy", "sync"):
        assert "policy" in items[name] and not any(item.startswith("vLLM") for item in items[name]), name
    assert split["replicas"] == 32 // config.parallel.ranks and split["engine"]["engines"] == 32 // config.rollout.tp
    turns = split["spans"][0]
    ahead = plan(replace(config, rollout=replace(config.rollout, max_staleness=1)), Options(64, search=False))
    generate = turns["parts"]["generate"]
    training = turns["seconds"] - generate
    # Of the two the longer one is what an iteration takes.
    assert ahead["spans"][0]["seconds"] == pytest.approx(max(generate, training))
    with pytest.raises(ConfigError, match=r"rollout\.ranks=64 of 64 processes leaves none to train"):
        plan(compose("rl_7b_64gpu", ["model.path=7B", "rollout.ranks=64"]), Options(64, search=False))


def test_a_critic_of_another_size_is_counted() -> None:
    """Its bytes and FLOP are those of a critic of a recipe whose policy has this size, in the same layout."""
    layout = "{tp: 2, sequence_parallel: true, distributed_optimizer: true, overlap: true}"
    options = Options(8, search=False)
    mixed = plan(compose("ppo_7b_8gpu", ["critic.path=3B", f"critic.parallel={layout}"]), options)
    large = plan(compose("ppo_7b_8gpu", []), options)
    small = plan(compose("ppo_7b_8gpu", ["model.path=3B", f"parallel={layout}"]), options)

    def ranks(found: dict, model: str) -> list[dict]:
        return [rank for rank in found["rank"] if rank["model"] == model]

    assert ranks(mixed, "policy") == ranks(large, "policy")
    assert ranks(mixed, "critic") == ranks(small, "critic") != ranks(large, "critic")
    critic = {name: found["checkpoint_bytes"] for name, found in (("large", large), ("small", small))}
    assert critic["small"] < mixed["checkpoint_bytes"] < critic["large"]
    for ours, theirs, smallest in zip(mixed["spans"], large["spans"], small["spans"], strict=True):
        assert smallest["flops"] < ours["flops"] < theirs["flops"]
        for phase in ("value", "update critic"):
            assert ours["parts"][phase] == smallest["parts"][phase]
        assert ours["parts"]["update policy"] == theirs["parts"]["update policy"]


def test_a_critic_that_is_no_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"critic.path=9B is no folder; for a plan it can also be one of"):
        plan(compose("ppo_7b_8gpu", ["critic.path=9B"]), Options(8, search=False))


def test_a_run_that_learns_from_archived_rollouts_has_no_engine() -> None:
    """Without generation and new weights for vLLM; the critic alone has the weights of a policy that never trains."""
    overrides = ["model.path=3B", "parallel.tp=2", "offload=false"]
    archive = ["rollouts_from=runs/a"]
    whole = plan(compose("rl_7b_64gpu", overrides), Options(64, search=False))
    train = plan(compose("rl_7b_64gpu", [*overrides, *archive, "only=train"]), Options(64, search=False))
    critic = plan(compose("rl_7b_64gpu", [*overrides, *archive, "only=critic"]), Options(64, search=False))
    assert train["checkpoint_bytes"] == whole["checkpoint_bytes"]
    learning = {"value", "update critic", "update policy"}
    phases = [{phase["name"] for phase in mode["phases"]} for mode in (whole, train, critic)]
    assert phases == [{"generate", *learning, "sync"}, learning, {"value", "update critic"}]
    for mode in (train, critic):
        assert mode["engine"] is None and mode["fits"]
        assert not any(name.startswith("vLLM") for phase in mode["phases"] for name in phase["items"])
        for span, whole_span in zip(mode["spans"], whole["spans"], strict=True):
            assert span["parts"].keys() == phases[1 if mode is train else 2]
            assert all(span["parts"][name] == whole_span["parts"][name] for name in span["parts"])
            assert span["flops"] < whole_span["flops"]
    (policy,) = [rank for rank in critic["rank"] if rank["model"] == "policy"]
    assert policy["weights"] > 0 == policy["gradients"] == policy["optimizer"]
    held = {phase["name"]: phase["items"]["policy"] for phase in critic["phases"]}
    assert set(held.values()) == {policy["weights"]}
    # The head of the 3B is its embedding: the critic has one column more, in bfloat16 with float32 master and moments.
    assert 2 * critic["checkpoint_bytes"] - whole["checkpoint_bytes"] == 2048 * (2 + 3 * 4)
    with pytest.raises(ConfigError, match="only=train generates nothing"):
        config = compose("rl_7b_64gpu", [*overrides, *archive, "only=train"])
        plan(config, Options(64, search=False, simulation=SimulationOptions()))


def test_a_teacher_has_a_phase_and_memory_of_its_own_size() -> None:
    """The 7B's weights, cut by the teacher's own tp; with offload they are on the GPU in its own phase alone."""
    teacher = count_parameters(read_shape("7B")[0])
    # The norms and the tower's biases are whole on every rank.
    share = 2 * sum(teacher.values()) / 4
    for offload in ("false", "true"):
        settings = [f"offload={offload}", "algorithm.teacher=7B", "algorithm.teacher_parallel={tp: 4}"]
        with_teacher = plan(compose("distill_3b_8gpu", ["model.path=3B", *settings]), Options(8, search=False))
        held = {phase["name"]: phase["items"].get("teacher", 0) for phase in with_teacher["phases"]}
        assert share <= held["teacher"] < 1.01 * share
        elsewhere = {size for name, size in held.items() if name != "teacher"}
        assert elsewhere == ({0} if offload == "true" else {held["teacher"]})
    alone = plan(
        compose("distill_3b_8gpu", ["model.path=3B", "algorithm.estimator=grpo", "algorithm.teacher=null"]),
        Options(8, search=False),
    )
    (rank,) = [rank for rank in with_teacher["rank"] if rank["model"] == "teacher"]
    assert rank["weights"] == held["teacher"] and rank["gradients"] == rank["optimizer"] == 0
    (span,) = with_teacher["spans"]
    assert "teacher" not in alone["spans"][0]["parts"] and span["parts"]["teacher"] > 0
    # A forward pass of the 7B is two FLOP a weight and token of its language model, with attention and images on top.
    weights = teacher["layers"] + read_shape("7B")[0].vocab * 3584
    added = (span["flops"] - alone["spans"][0]["flops"]) / span["tokens"]
    assert 2 * weights < added < 1.3 * 2 * weights
    with pytest.raises(ConfigError, match=r"algorithm\.teacher=9B is no folder"):
        plan(compose("distill_3b_8gpu", ["model.path=3B", "algorithm.teacher=9B"]), Options(8, search=False))
