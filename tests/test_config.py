import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies
from omegaconf import DictConfig, OmegaConf
from pydantic.fields import FieldInfo

from ovr_megatron import config as configuration
from ovr_megatron.config import (
    ColdStartConfig,
    ConfigError,
    ModelConfig,
    ParallelConfig,
    RLConfig,
    RolloutConfig,
    build,
    defaults,
    save,
)
from ovr_megatron.config.checks import fields_of, inner_schemas
from ovr_megatron.config.described import described_yaml
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.keys import NAMES_ELSEWHERE, setting_names, unknown_setting
from ovr_megatron.launch import compose, compose_values, read_command_line, recipe_path
from ovr_megatron.rl.setup import check_parts

REQUIRED = ["run.dir=runs/a", "model.path=models/tiny"]
CURRICULUM = ["curriculum=[{until: 300, max_tokens: 16384}, {until: 900, max_tokens: 32768}]"]


def merge(schema: type, *overrides: str) -> DictConfig:
    """The defaults of `schema` under KEY=VALUE, as on the command line."""
    given = OmegaConf.from_dotlist([*REQUIRED, *(CURRICULUM if schema is RLConfig else []), *overrides])
    return OmegaConf.merge(defaults(schema), given)


def complaint(schema: type, *overrides: str) -> str:
    with pytest.raises(ConfigError) as raised:
        build(schema, merge(schema, *overrides))
    return str(raised.value)


@pytest.mark.parametrize("schema", [ColdStartConfig, RLConfig])
def test_defaults_name_every_key(schema: type) -> None:
    values = defaults(schema)
    assert list(values) == [item.name for item in dataclasses.fields(schema)]
    assert values["run"]["dir"] == values["model"]["path"] == "???"
    assert list(values["data"]) == [item.name for item in dataclasses.fields(configuration.DataConfig)]


def test_defaults_are_the_recipe() -> None:
    """900 steps of 640 packs of 64k tokens; 512 prompts x 16 responses, gamma = lambda = 1, clip 0.2 (the paper)."""
    cold_start = build(ColdStartConfig, merge(ColdStartConfig))
    assert (cold_start.steps, cold_start.packs_per_step, cold_start.data.pack_tokens) == (900, 640, 65536)
    rl = build(RLConfig, merge(RLConfig))
    assert (rl.iterations, rl.prompts, rl.responses, rl.algorithm.critic_steps) == (900, 512, 16, 4)
    assert (rl.algorithm.gamma, rl.algorithm.lam, rl.algorithm.clip) == (1.0, 1.0, 0.2)
    assert (rl.optimizer.lr, rl.critic.optimizer.lr) == (1e-6, 5e-6)


def test_values_given_replace_defaults_and_nothing_else() -> None:
    plain = build(RLConfig, merge(RLConfig))
    changed = build(RLConfig, merge(RLConfig, "critic.optimizer.warmup_steps=7", "data.sources=[{path: a.jsonl}]"))
    assert changed.critic.optimizer == dataclasses.replace(plain.critic.optimizer, warmup_steps=7)
    assert [source.path for source in changed.data.sources] == ["a.jsonl"]
    assert changed.optimizer == plain.optimizer
    assert [stage.until for stage in changed.curriculum] == [300, 900]


def test_configuration_is_frozen() -> None:
    config = build(ColdStartConfig, merge(ColdStartConfig))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.dtype = "bfloat16"


def test_saved_configuration_builds_the_same(tmp_path: Path) -> None:
    config = build(RLConfig, merge(RLConfig, "optimizer.lr=3e-7", "data.sources=[{path: a.jsonl, weight: 2}]"))
    save(config, tmp_path / "run/config.yaml")
    assert build(RLConfig, OmegaConf.load(tmp_path / "run/config.yaml")) == config


def test_missing_values_are_all_named() -> None:
    with pytest.raises(ConfigError, match=re.escape("no value for model.path, run.dir; give it as KEY=VALUE")):
        build(ColdStartConfig, defaults(ColdStartConfig))


@pytest.mark.parametrize("override", ["=3", "~", "++=1", "@group=1", "a@b=1", "", "seed"])
def test_an_override_without_a_key_or_a_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose("tiny_rl", [override])
    assert str(raised.value) == f"{override!r} cannot be read; write a setting as KEY=VALUE"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny_rl", "prompts=3"], "tiny_rl is a recipe; write --config-name tiny_rl"),
        (["mine.yaml"], "mine.yaml is a recipe; write --config-name mine.yaml"),
        (["--lr", "1e-3"], "there is no option --lr; a setting is written without dashes: optimizer.lr=VALUE"),
        (["--kl-coef=3"], "there is no option --kl-coef=3; a setting is written without dashes: algorithm.kl_"),
        (["--config", "tiny_rl"], "there is no option --config; did you mean --config-name?"),
        (
            ["--zebra"],
            "there is no option --zebra; there are --config-name --config-dir --dry-run --help --rollout-only "
            "--rehearse --train-only --critic-only, and settings, ",
        ),
        (["--rehears"], "there is no option --rehears; did you mean --rehearse?"),
        (["--hlep"], "there is no option --hlep; did you mean --help?"),
    ],
)
def test_a_word_that_is_neither_option_nor_setting_is_corrected(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_command_line(RLConfig, "tiny_rl", None, [*REQUIRED, *words])
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("promts=8", "promts"),
        ("optimizer.learning_rate=1e-6", "optimizer.learning_rate"),
        ("data.sources=[{path: a, wieght: 2}]", "data.sources.0.wieght"),
        ("curriculum=[{until: 900, max_tokens: 8, name: x}]", "curriculum.0.name"),
    ],
)
def test_unknown_key_is_named(override: str, key: str) -> None:
    assert complaint(RLConfig, override).startswith(f"there is no setting {key}; ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts=many", "prompts='many' must be a whole number"),
        ("prompts=2.5", "prompts=2.5 must be a whole number"),
        ("prompts=null", "prompts=null must be a whole number"),
        ("optimizer.lr=fast", "optimizer.lr='fast' must be a number"),
        ("model.freeze_vision=perhaps", "model.freeze_vision='perhaps' must be true or false"),
        ("run.trackers=[3]", "run.trackers[0]=3 must be a text"),
        ("run.trackers=wandb", "run.trackers=wandb must be a list; write 'run.trackers=[wandb]'"),
        ("data.sources=a.jsonl", "data.sources=a.jsonl must be a list; write 'data.sources=[{path: a.jsonl}]'"),
        ("data.sources=[a.jsonl]", "data.sources[0]=a.jsonl must have fields with names; write {path: a.jsonl}"),
        (
            "data.sources=[{weight: 1}]",
            "no value for data.sources[0].path; the fields are path, weight, format, image_root, name, streaming, "
            "shuffle_rows",
        ),
        (
            "data.sources=[{file: a.jsonl}]",
            "no value for data.sources[0].path, and file is no field of it; the fields are path, weight, ",
        ),
        ("curriculum=900", "curriculum=900 must be a list; write 'curriculum=[{until: 900, max_tokens: VALUE}]'"),
        (
            "critic.parallel=2",
            "critic.parallel=2: critic.parallel is a group of settings; give one of them, as critic.parallel.tp, ",
        ),
        ("reward.rules=a:b", "reward.rules=a:b must have names; write reward.rules.NAME=a:b"),
    ],
)
def test_a_value_of_another_form_says_how_it_is_written(override: str, message: str) -> None:
    assert complaint(RLConfig, override).startswith(message)


def test_an_object_for_a_list_says_how_it_is_written() -> None:
    with pytest.raises(ConfigError) as raised:
        compose("tiny_rl", [*REQUIRED, "data.sources={path: a.jsonl}"])
    assert str(raised.value) == "data.sources={path: a.jsonl} must be a list; write 'data.sources=[{path: a.jsonl}]'"


@pytest.mark.parametrize(
    ("name", "sft", "rl"),
    [
        ("learning_rate", "optimizer.lr", "optimizer.lr"),
        ("critic.optimizer.learning_rate", "optimizer.lr", "critic.optimizer.lr"),
        ("batch_size", "packs_per_step", "prompts"),
        ("trainer.save_freq", "run.save_every", "run.save_every"),
        ("optimizer.epsilon", "optimizer.eps", "optimizer.eps"),
        ("critic.optimizer.beta", "optimizer.beta2", "critic.optimizer.beta1 or critic.optimizer.beta2"),
        ("algorithm.filter_groups.enable", "", "algorithm.dynamic_sampling"),
        ("model.lora.r", "model.lora.rank", "model.lora.rank"),
        ("data.source", "data.sources", "data.sources"),
    ],
)
def test_a_name_of_another_trainer_leads_to_ours(name: str, sft: str, rl: str) -> None:
    for schema, ours in ((ColdStartConfig, sft), (RLConfig, rl)):
        message = unknown_setting(schema, name)
        assert message.startswith(f"there is no setting {name}; ")
        # SFT has no such setting, nor one that is similar, where `ours` is empty.
        assert message.endswith(f"; did you mean {ours}?" if ours else "; --help lists all settings")


def test_names_of_other_trainers_are_those_of_the_page() -> None:
    page = Path(__file__).resolve().parents[1] / "docs/coming_from.md"
    lines = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    for name, ours in NAMES_ELSEWHERE.items():
        word = re.compile(rf"(?<![a-z_]){name}(?![a-z_])")
        rows = ["|".join(cells[2:]) for cells in lines if word.search(cells[1])]
        settings = [setting.removesuffix("[].max_tokens") for setting in ours]
        assert any(f"`{setting}`" in row for row in rows for setting in settings), name
        assert {*ours} <= {*setting_names(ColdStartConfig), *setting_names(RLConfig)}


# For each check: a value that it refuses, and what the message must name or advise.
REFUSED = [
    (
        "algorithm={estimator: maxrl, wrong_reward: -1}",
        "algorithm.estimator=maxrl divides by a group's success rate, for which rewards must lie in 0..1",
    ),
    (
        "algorithm={estimator: none, teacher: t, kl_coefficient: 0.1, kl_in: reward}",
        "takes the divergence from rewards, of which algorithm.estimator=none takes nothing",
    ),
    (
        "algorithm={estimator: none, teacher: t, overlong_buffer: 8}",
        "algorithm.estimator=none takes nothing from the rewards; leave",
    ),
    ("algorithm={estimator: grpo, lam_policy: 0.0}", "algorithm.lam_policy=0.0: grpo has no critic"),
    (
        "data.sources=[{path: a, format: csv}]",
        "'csv' is not known; choose one of auto, messages, orz, verl, llava, alpaca, query, mathvision, puzzle",
    ),
    ("data.sources=[{path: a, weight: 0}]", "weight=0.0 of a must be positive"),
    ("data.template=chatml", "data.template='chatml' is not known; choose one of think, model"),
    ("data.min_pixels=0", "data.min_pixels=0 must be positive and at most data.max_pixels=1003520"),
    ("data.max_pixels=3000", "data.min_pixels=3136 must be positive and at most data.max_pixels=3000"),
    ("data.max_images=0", "data.max_images=0 must be positive"),
    ("data.max_frames=-1", "data.max_frames=-1 must be positive"),
    ("data.pack_tokens=0", "data.pack_tokens=0 must be positive"),
    ("data.max_prompt_tokens=0", "data.max_prompt_tokens=0 must be positive"),
    ("model.dtype=float16", "model.dtype='float16' is not known; choose one of float32, bfloat16"),
    ("parallel.tp=0", "parallel.tp=0 must be positive"),
    ("parallel.pp=0", "parallel.pp=0 must be positive"),
    ("parallel.cp=-2", "parallel.cp=-2 must be positive"),
    ("parallel.sequence_parallel=true", "parallel.sequence_parallel=true needs parallel.tp of at least 2"),
    ("optimizer.schedule=step", "optimizer.schedule='step' is not known; choose one of constant, cosine, linear"),
    ("optimizer.lr=0", "optimizer.lr=0.0 must be positive"),
    ("optimizer.min_lr_ratio=1.5", "optimizer.min_lr_ratio=1.5 must lie in 0..1"),
    ("run.save_every=0", "run.save_every=0 must be positive"),
    ("run.keep_last=-1", "run.keep_last=-1 must be 0 (keep all) or more"),
    ("rollout.temperature=0", "rollout.temperature=0.0 must be positive"),
    ("rollout.top_p=0.9", "rollout.top_p=0.9: the trainer scores the whole distribution"),
    ("rollout.tp=0", "rollout.tp=0 must be positive"),
    ("rollout={ranks: 3, tp: 2}", "rollout.ranks=3 is no multiple of rollout.tp=2"),
    ("rollout.max_staleness=1", "set rollout.oversample above 0, as 0.5, or let rollout.ranks"),
    ("algorithm.reduction=mean", "algorithm.reduction='mean' is not known; choose one of token, sequence"),
    ("algorithm.gamma=0", "algorithm.gamma=0.0 must be positive and at most 1"),
    ("algorithm.lam=1.1", "algorithm.lam=1.1 must lie in 0..1"),
    ("algorithm.critic_steps=0", "algorithm.critic_steps=0 must be positive"),
    ("critic.head_init=zero", "critic.head_init='zero' is not known; choose one of orz, kaiming, paper"),
    ("reward.workers=0", "reward.workers=0 must be positive"),
    ("reward.timeout_s=0", "reward.timeout_s=0.0 must be positive"),
    ("critic.optimizer={beta1: 1, lr: 1}", "critic.optimizer.beta1=1.0 must be 0 or more and below 1"),
    ("reward.memory_mib=255", "reward.memory_mib=255 must be at least 256"),
    ("data.pack_tokens=1000000000000", "data.pack_tokens=1000000000000 must be at most 2147483647"),
    ("optimizer.eps=inf", "optimizer.eps=inf must be a finite number"),
    ("curriculum=[{until: 900, max_tokens: 0}]", "curriculum[0].max_tokens=0 must be positive"),
    ("iterations=0", "iterations=0 must be positive"),
    ("prompts=0", "prompts=0 must be positive"),
    ("responses=0", "responses=0 must be positive"),
    ("curriculum=[]", "curriculum is empty: give at least one {until, max_tokens}"),
    (
        "curriculum=[{until: 900, max_tokens: 9000}, {until: 900, max_tokens: 9001}]",
        "curriculum: 'until' must rise, got [900, 900]",
    ),
    (
        "curriculum=[{until: 300, max_tokens: 8192}, {until: 900, max_tokens: 9000}]",
        "curriculum[0].max_tokens=8192 leaves no room for a response to a prompt of data.max_prompt_tokens=8192",
    ),
    ("iterations=901", "curriculum ends at iteration 900 but iterations=901; raise the last 'until'"),
    ("model={freeze_vision: true, freeze_merger: true, freeze_language: true}", "leave nothing to train"),
    ("data.sources=[{path: ''}]", "data.sources[0].path is empty"),
    ("critic.path=''", "critic.path is empty"),
    ("rollout.stop=['a', '']", "rollout.stop[1] is empty"),
    ("rollout.max_staleness=2", "without rollout.oversample a round finishes all; set rollout.oversample above 0"),
    ("reward.rules={image: ''}", "reward.rules.image is empty"),
    ("reward.rules.image={math: much}", "reward.rules.image.math='much' must be a number"),
    (
        "reward.rules.image={math: 0.9, format: 0.2}",
        "reward.rules.image: the weights {'math': 0.9, 'format': 0.2} add up",
    ),
    (
        "reward.judges={a: {base_url: 'http://h/v1', model: m, timeout_s: 0}}",
        "reward.judges.a.timeout_s=0.0 must be posi",
    ),
    ("reward.judges=http://h/v1", "must have names; write reward.judges.NAME.base_url=VALUE"),
    ("reward.judges={a: {url: 'http://h/v1'}}", "there is no setting reward.judges.a.url; did you mean"),
    ("evaluation.rules={no_set: exact}", "evaluation.rules.no_set: no set of evaluation.sources has this name"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_refused_value_says_what_to_change(override: str, message: str) -> None:
    assert message in complaint(RLConfig, override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("only=rollout", "only=rollout with rollout.max_staleness=2: one policy draws all tokens"),
        (
            "algorithm.dynamic_sampling=3",
            "rollout.oversample=0.5 and algorithm.dynamic_sampling both start more prompts",
        ),
        ("data.sources=[{path: rows.jsonl, streaming: true}]", "draws long prompts once more"),
    ],
)
def test_rounds_that_continue_responses_are_refused_where_they_cannot_be(override: str, message: str) -> None:
    assert message in complaint(RLConfig, "rollout.oversample=0.5", "rollout.max_staleness=2", override)


SCHEMAS = [ColdStartConfig, RLConfig, PrepareConfig]


def fields(schema: type, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting of a schema, with those of the classes inside it."""
    for name, field in fields_of(schema).items():
        yield f"{prefix}{name}", field
        for inner in inner_schemas(field.annotation):
            yield from fields(inner, f"{prefix}{name}.")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_number_has_bounds(schema: type) -> None:
    for name, field in fields(schema):
        # Rewards may be negative.
        if field.annotation in (int, float) and not name.startswith(("algorithm.wrong_reward", "algorithm.cosine_")):
            lowest = [getattr(mark, "ge", getattr(mark, "gt", None)) for mark in field.metadata]
            assert any(bound is not None and bound >= 0 for bound in lowest), name


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_setting_is_described(schema: type) -> None:
    assert [name for name, field in fields(schema) if not (field.description or "").endswith(".")] == []


@pytest.mark.parametrize(("schema", "recipe"), [(ColdStartConfig, "tiny_cold_start"), (RLConfig, "rl_7b_64gpu")])
def test_help_is_the_recipe_with_comments(schema: type, recipe: str) -> None:
    values = compose_values(schema, recipe_path(recipe), [])
    text = described_yaml(schema, values)
    assert OmegaConf.create(text) == values
    assert [line for line in text.splitlines() if not line.lstrip().startswith("#")] == OmegaConf.to_yaml(
        values
    ).splitlines()
    assert "  # Newest checkpoints that stay. [0 (keep all) or more]\n  keep_last: " in text
    assert max(map(len, text.splitlines())) <= 120


def test_validation_needs_rows_of_one_kind() -> None:
    assert "validation.every=5 has no rows" in complaint(ColdStartConfig, "validation.every=5")
    both = complaint(ColdStartConfig, "validation.share=0.1", "validation.sources=[{path: a.jsonl}]")
    assert "validation.share=0.1 holds rows out of the training sources, and validation.sources are given" in both
    assert "validation.share=1" in complaint(ColdStartConfig, "validation.share=1")


def test_ranks_that_only_generate_need_two_sides_at_work() -> None:
    assert "only=rollout with rollout.ranks=2" in complaint(RLConfig, "only=rollout", "rollout.ranks=2")
    learning = complaint(RLConfig, "only=train", "rollouts_from=runs/other", "rollout.ranks=2")
    assert "only=train with rollout.ranks=2" in learning
    both = complaint(RLConfig, "rollout={ranks: 2, max_staleness: 1, oversample: 0.5}")
    assert "rollout.max_staleness=1 and rollout.oversample=0.5 with rollout.ranks=2" in both
    assert "rollout.ranks=2: supervised fine-tuning has no rollouts" in complaint(ColdStartConfig, "rollout.ranks=2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.ranks=0", "rollout.stream_parts=4 needs ranks that generate while others train"),
        ("rollout.max_staleness=1", "with rollout.max_staleness=1: the responses are there before"),
        ("rollout.oversample=0.5", "with rollout.oversample=0.5: only the end of the round says which prompts"),
        ("algorithm.estimator=gae", "advantages of algorithm.estimator=gae are normalised over all responses"),
        ("algorithm.estimator=reinforce_pp", "advantages of algorithm.estimator=reinforce_pp are normalised"),
        ("algorithm.policy_steps=2", "each of the 2 policy updates of an iteration learns from responses to all"),
        ("algorithm.policy_epochs=3", "each of the 3 policy updates"),
        ("algorithm.positive_nll=0.1", "algorithm.positive_nll=0.1 divides by the tokens of all right responses"),
        ("algorithm.dynamic_sampling=2", "with algorithm.dynamic_sampling=2 only the last round says"),
        ("offload=true algorithm.teacher=T", "the reference or teacher needs the device memory"),
        (
            "offload=true algorithm.kl_coefficient=0.1",
            "the reference or teacher needs the device memory",
        ),
    ],
)
def test_what_cannot_be_learned_from_in_parts(override: str, message: str) -> None:
    settings = ("rollout={ranks: 1, stream_parts: 4}", "algorithm.estimator=grpo")
    sentence = complaint(RLConfig, *settings, *override.split())
    assert message in sentence and "rollout.stream_parts=4" in sentence


def test_every_replica_has_a_prompt_of_each_part() -> None:
    settings = ("rollout={ranks: 8, stream_parts: 32}", "algorithm.estimator=grpo", "prompts=128")
    config = build(RLConfig, merge(RLConfig, *settings))
    check_parts(config, trainers=8)
    with pytest.raises(ConfigError) as raised:
        check_parts(config, trainers=16)
    assert "a part would have 8 of prompts=128, fewer than the 16 data-parallel replicas" in str(raised.value)
    assert "set rollout.stream_parts=8 or less" in str(raised.value)
    check_parts(build(RLConfig, merge(RLConfig, *settings, "rollout.stream_parts=8")), trainers=16)


@pytest.mark.parametrize(
    ("ranks", "max_staleness", "oversample", "rounds_ahead", "continues"),
    [
        (0, 0, 0.0, 0, False),
        (0, 2, 0.5, 0, True),
        (2, 0, 0.5, 0, False),
        (2, 1, 0.0, 1, False),
        (2, 3, 0.0, 3, False),
        (2, 3, 0.5, 1, True),
    ],
)
def test_staleness_is_of_rounds_ahead_or_of_responses_that_go_on(
    ranks: int, max_staleness: int, oversample: float, rounds_ahead: int, continues: bool
) -> None:
    rollout = RolloutConfig(ranks=ranks, max_staleness=max_staleness, oversample=oversample)
    assert (rollout.rounds_ahead, rollout.continues_responses) == (rounds_ahead, continues)


@pytest.mark.parametrize("key", ["epochs", "packs_per_step"])
def test_refused_cold_start_value(key: str) -> None:
    assert f"{key}=0 must be positive" in complaint(ColdStartConfig, f"{key}=0")


def test_supervised_training_has_one_kind_of_data() -> None:
    rows = "data.sources=[{path: a.jsonl}]"
    both = complaint(ColdStartConfig, rows, "data.tokenised=DIR")
    assert "data.tokenised=DIR replaces data.sources and data.exclude" in both
    assert "data.on_error='ignore' is not known; choose one of stop, skip" in complaint(
        ColdStartConfig, "data.on_error=ignore"
    )


def test_data_parallel_size_is_what_the_layout_leaves() -> None:
    layout = ParallelConfig(tp=2, pp=2, cp=2)
    assert [layout.data_parallel(world) for world in (8, 64)] == [1, 8]
    with pytest.raises(ConfigError, match=r"12 processes cannot be cut into tp=2,pp=2,cp=2, 8 ranks.*multiple of 8"):
        layout.data_parallel(12)


def test_checks_hold_outside_build_too() -> None:
    values: dict[str, Any] = {"dir": "runs/a", "save_every": 0}
    with pytest.raises(ConfigError, match=r"run\.save_every=0"):
        configuration.RunConfig(**values)


def test_values_of_environment_variables_stay_out_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the saved configuration nor a message shows what a variable holds; loaded again it is the same."""
    monkeypatch.setenv("OVR_TEST_SECRET", "hunter2")
    monkeypatch.setenv("OVR_TEST_SEED", "17")
    overrides = ["run.dir=/runs/${oc.env:OVR_TEST_SECRET}", "run.seed=${oc.env:OVR_TEST_SEED}"]
    overrides += ["data.sources=[{path: 'a.jsonl'}, {path: '${oc.env:OVR_TEST_SECRET}/b.jsonl'}]"]
    values = OmegaConf.merge(defaults(RLConfig), OmegaConf.from_dotlist([*overrides, "model.path=m", *CURRICULUM]))
    config = build(RLConfig, values)
    assert (config.run.dir, config.run.seed, config.data.sources[1].path) == ("/runs/hunter2", 17, "hunter2/b.jsonl")
    save(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert (
        "hunter2" not in text and "/runs/${oc.env:OVR_TEST_SECRET}" in text and "seed: ${oc.env:OVR_TEST_SEED}" in text
    )
    assert build(RLConfig, OmegaConf.load(tmp_path / "config.yaml")) == config
    save(dataclasses.replace(config, iterations=3), tmp_path / "config.yaml")
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"run\.seed") as error:
        build(RLConfig, OmegaConf.merge(values, {"run": {"seed": "${oc.env:OVR_TEST_SECRET}"}}))
    assert "hunter2" not in str(error.value)
    with pytest.raises(ConfigError, match="OVR_TEST_ABSENT"):
        build(RLConfig, OmegaConf.merge(values, {"run": {"seed": "${oc.env:OVR_TEST_ABSENT}"}}))


@settings(max_examples=30)
@given(strategies.text("ab/ ü=('),{}[]\"#$!~*?:;&|<>%@\n", min_size=1, max_size=12))
def test_a_path_may_hold_any_character(text: str) -> None:
    """Not at its ends, where white space and quotes belong to the command line."""
    path = f"/runs/{text}/x"
    if "${" not in path:
        assert compose("tiny_cold_start", [f"run.dir={path}", "model.path=m"]).run.dir == path


@pytest.mark.parametrize(
    ("written", "path"),
    [
        (r"'/runs/it\'s'", "/runs/it's"),
        ('"/runs/a,b"', "/runs/a,b"),
        (r"/runs/a\,b", "/runs/a,b"),  # as Hydra has it escaped
        (r"/runs/a\b", r"/runs/a\b"),
        ("it's\\", "it's\\"),
        ("1e3", "1e3"),
        ("[x]", "[x]"),
        ("${model.path}", "m"),
    ],
)
def test_a_path_in_quotes_and_escaped(written: str, path: str) -> None:
    assert compose("tiny_cold_start", [f"run.dir={written}", "model.path=m"]).run.dir == path


def test_delayed_scaling_is_refused_in_reinforcement_learning() -> None:
    """Its reduction after every pack waits for ranks that have no further one."""
    eight_bits = ["model.dtype=bfloat16", "model.fp8=delayed"]
    assert "take model.fp8=current or block" in complaint(RLConfig, *eight_bits)
    assert build(ColdStartConfig, merge(ColdStartConfig, *eight_bits)).model.fp8 == "delayed"


def test_a_list_for_a_mapping_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"tiny_rl: reward\.rules: Cannot merge"):
        compose("tiny_rl", ["run.dir=x", "model.path=m", "reward.rules=[exact]"])


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tiny_cold_start: run\.dir: Interpolation key 'nothing' not found"):
        compose("tiny_cold_start", ["run.dir=${nothing}", "model.path=m"])
    assert complaint(ColdStartConfig, "run.dir=${nothing}") == "run.dir: Interpolation key 'nothing' not found"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 8}, "freeze_language": True}, "leave out model.freeze_language"),
        ({"lora": {"rank": 8, "vision": True}, "freeze_vision": True}, "leave out one of them"),
        ({"lora": {"rank": -1}}, "rank"),
        ({"lora": {"rank": 8, "layers": "heads"}}, "attention"),
        ({"lora": {"rank": 8, "alpha": 0}}, "alpha"),
    ],
)
def test_adapters_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(path="x", **settings)


def test_a_frozen_tower_may_have_adapters_above_it() -> None:
    model = ModelConfig(path="x", freeze_vision=True, freeze_merger=True, lora={"rank": 8})
    assert not (model.trains_language or model.trains_vision or model.trains_merger or model.adapts_vision)


def test_a_section_that_may_be_null_takes_its_fields_one_by_one() -> None:
    config = compose("rl_7b_64gpu", ["model.path=x", "critic.parallel.tp=8", "critic.parallel.overlap=true"])
    assert isinstance(config, RLConfig)
    assert config.critic.parallel == ParallelConfig(tp=8, overlap=True)
    with pytest.raises(ConfigError, match=r"no setting critic.parallel.tpp; did you mean critic.parallel.tp\?"):
        compose("rl_7b_64gpu", ["model.path=x", "critic.parallel.tpp=8"])
