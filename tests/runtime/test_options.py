"""Numbers on a command line, and options that are made of settings."""

import argparse

import pytest

from ovr_megatron.config import ConfigError, DataConfig, EvaluationConfig, EvaluationSettings, RolloutConfig
from ovr_megatron.config.checks import fields_of
from ovr_megatron.evaluation.judge_settings import JudgeConfig, add_limits
from ovr_megatron.runtime.command import number, whole_number
from ovr_megatron.runtime.options import add_option, read_options


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("12", 12), ("+3", 3), ("007", 7)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole_number(0)(text) == value


@pytest.mark.parametrize("text", ["-1", "1.0", "1e3", "", "two", "nan", "1_000", "9" * 30])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 0"):
        whole_number(0)(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e400", "4", "half"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a finite number above 0 and of at most 1"):
        number(above=0, most=1)(text)


def test_numbers() -> None:
    assert number(above=0, most=1)("1e-3") == 1e-3
    assert number()("-2.5") == -2.5
    with pytest.raises(argparse.ArgumentTypeError, match=r"'inf' is not a finite number$"):
        number()("inf")


@pytest.mark.parametrize(
    ("schema", "name", "text", "value"),
    [
        (RolloutConfig, "max_num_seqs", "7", 7),
        (RolloutConfig, "temperature", "0.5", 0.5),
        (EvaluationSettings, "samples", "0", 0),
        (EvaluationSettings, "metric", "exact", "exact"),
        (JudgeConfig, "key_env", "KEY", "KEY"),
    ],
)
def test_an_option_has_name_type_and_default_of_its_setting(schema: type, name: str, text: str, value: object) -> None:
    parser = argparse.ArgumentParser()
    add_option(parser, schema, name)
    assert vars(parser.parse_args([])) == {name: fields_of(schema)[name].default}
    assert vars(parser.parse_args([f"--{name.replace('_', '-')}", text])) == {name: value}


@pytest.mark.parametrize(
    ("schema", "name", "text", "message"),
    [
        (RolloutConfig, "max_num_seqs", "0", "'0' is not a whole number of at least 1"),
        (EvaluationSettings, "limit", "-1", "'-1' is not a whole number of at least 0"),
        (EvaluationSettings, "samples", "65537", "'65537' is more than 65,536"),
        (EvaluationSettings, "temperature", "101", "'101' is not a finite number of at least 0 and of at most 100"),
        (RolloutConfig, "schedule", "queue", "invalid choice: 'queue'"),
    ],
)
def test_an_option_has_the_bounds_of_its_setting(
    capsys: pytest.CaptureFixture, schema: type, name: str, text: str, message: str
) -> None:
    parser = argparse.ArgumentParser()
    add_option(parser, schema, name)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--{name}".replace("_", "-"), text])
    assert message in capsys.readouterr().err


def test_a_default_of_the_command_replaces_that_of_the_setting_and_is_shown_first() -> None:
    parser = argparse.ArgumentParser()
    add_option(parser, DataConfig, "template", default="model")
    assert parser.parse_args([]).template == "model" and "{model,think}" in parser.format_help()


def test_settings_are_built_of_options_and_of_values() -> None:
    parser = argparse.ArgumentParser()
    add_limits(parser)
    args = parser.parse_args(["--max-tokens", "9", "--allow-http", "--key-env", "KEY"])
    config = read_options(JudgeConfig, args, judge="http://host/v1#m")
    assert config == JudgeConfig(judge="http://host/v1#m", max_tokens=9, allow_http=True, key_env="KEY")
    with pytest.raises(ConfigError, match="give lexical, vllm:FOLDER or URL#MODEL"):
        read_options(JudgeConfig, args, judge="somebody")


def test_an_evaluation_has_one_schema() -> None:
    """What a run has of it is described, bounded and named as what the command has."""
    own, inherited = fields_of(EvaluationSettings), fields_of(EvaluationConfig)
    assert [name for name in own if name in inherited] == list(inherited)
    for name in inherited:
        assert own[name].description and str(own[name].metadata) == str(inherited[name].metadata)
