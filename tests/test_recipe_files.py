"""A recipe of the user's own, by its path, in every command that takes settings."""

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ovr_megatron.cli import COMMANDS, select
from ovr_megatron.cli.tokenise import settings
from ovr_megatron.config import ConfigError, RLConfig
from ovr_megatron.errors import UserError
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, OURS
from ovr_megatron.evaluation.command import build_parser, sampling_temperature
from ovr_megatron.launch import compose, parse_options
from ovr_megatron.runtime.command import whole_number

TRAINING = "defaults: [schema, _self_]\nrun: {dir: r}\nmodel: {path: m}\ndata: {pack_tokns: 512}\n"
PREPARING = "defaults: [schema, _self_]\ndir: d\nmodel: m\nwrkers: 2\n"
OPTIONS = "no_such_option: 1\n"
# Words of each command with a recipe FILE that has a mistake, and what its error says.
WITH_RECIPE = {
    "plan": ("FILE", TRAINING, "pack_tokns"),
    "check-data": ("FILE", TRAINING, "pack_tokns"),
    "preflight": ("sft --config-name FILE", TRAINING, "pack_tokns"),
    "sft": ("--config-name FILE", TRAINING, "pack_tokns"),
    "rl": ("--config-name FILE", TRAINING, "pack_tokns"),
    "tokenise": ("set --model m --config-name FILE", TRAINING, "pack_tokns"),
    "prepare": ("--config-name FILE", PREPARING, "wrkers"),
    "evaluate": ("--config-name FILE --model m --data d --out o", OPTIONS, "has no option --no-such-option=1"),
    "judge": ("scores.json --judge j --config-name FILE", OPTIONS, "has no option --no-such-option=1"),
    "behaviours": ("a=b --out o --config-name=FILE", OPTIONS, "has no option --no-such-option=1"),
    "verify": ("--hf m --config-name FILE", OPTIONS, "has no option --no-such-option=1"),
    "slurm": ("sft --config-name FILE", TRAINING, "pack_tokns"),
    "bench": ("model --config-name FILE", OPTIONS, "has no option --no-such-option=1"),
}
# `replay` takes those of its run, RUN/config.yaml; the others have no settings, only paths and a few options.
WITHOUT = {"replay", "settings", "reference", "average", "tiny-model", "grade", "report", "support"}
WITHOUT |= {f"convert {way}" for way in ("from-hf", "to-hf", "from-megatron", "to-megatron")}


def test_every_command_is_in_the_table() -> None:
    assert {command.name for command in COMMANDS} == WITH_RECIPE.keys() | WITHOUT


@pytest.mark.parametrize("name", WITH_RECIPE)
def test_a_file_of_ones_own(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, text, message = WITH_RECIPE[name]
    file = tmp_path / "own recipe.yaml"
    file.write_text(text)
    command, _ = select(name.split())
    main: Callable[[list[str]], int | None] = importlib.import_module(f"ovr_megatron.{command.module}").main
    with_file = [word.replace("FILE", str(file)) for word in words.split()]
    said = ""
    try:
        code = main(with_file)
    except UserError as error:
        said, code = str(error), 2
    except SystemExit as error:  # `bench` runs a script, which leaves the process
        code = error.code
    printed = capsys.readouterr()
    said += printed.out + printed.err
    assert code == 2 and message in said, said


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="ovr tried")
    made.add_argument("files", nargs="*")
    made.add_argument("--data", action="append", required=True)
    made.add_argument("--max-tokens", type=whole_number(1), default=8)
    made.add_argument("--template", default="model")
    made.add_argument("--quiet", action="store_true")
    return made


def test_the_command_line_comes_before_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "own.yml"
    file.write_text("data: [a, 'n=puzzle:digits?x=1&y=-2']\nmax_tokens: 64\nquiet: true\ntemplate: null\n")
    own = parse_options(parser(), ["--config-name", str(file)])
    assert (own.data, own.max_tokens, own.quiet, own.template) == (["a", "n=puzzle:digits?x=1&y=-2"], 64, True, "model")
    line = parse_options(parser(), ["x", "y", f"--config-name={file}", "--data", "b", "--max-tokens=3"])
    assert (line.data, line.max_tokens, line.quiet, line.files) == (["b"], 3, True, ["x", "y"])
    assert parse_options(parser(), ["--data", "b", "x"]).files == ["x"]


def test_a_recipe_is_built_on_one_of_the_package_or_one_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "it's, (ü=1)"  # a path may hold any character
    folder.mkdir()
    (folder / "base.yaml").write_text("defaults: [ppo_7b_8gpu, _self_]\nprompts: 64\n")
    (folder / "own.yaml").write_text("defaults: [base, _self_]\niterations: 10\n")
    config = compose(str(folder / "own.yaml"), ["model.path=7B", "responses=4"])
    assert isinstance(config, RLConfig)
    assert (config.parallel.tp, config.prompts, config.iterations, config.responses) == (4, 64, 10, 4)
    (folder / "own.yaml").write_text("defaults: [nowhere, _self_]\n")
    with pytest.raises(ConfigError, match="nowhere"):
        compose(str(folder / "own.yaml"), ["model.path=7B"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "is no mapping; write it as YAML, OPTION: VALUE"),
        ("data: {a: b}\n", "data has a section"),
        ("data: [{a: b}]\n", "data has a section"),
        ("data: [\n", "write it as YAML"),
        ("nothing: 1\ndata: a\n", "own.yaml: ovr tried has no option --nothing=1; --help lists them"),
    ],
)
def test_mistakes_in_a_recipe_of_options_are_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_options(parser(), ["--config-name", str(file)])


def test_a_bad_value_of_a_recipe_is_refused_as_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("data: a\nmax_tokens: many\n")
    with pytest.raises(SystemExit):
        parse_options(parser(), ["--config-name", str(file)])
    assert "--max-tokens: 'many' is not a whole number" in capsys.readouterr().err


def test_the_data_of_a_training_recipe_are_those_of_tokenise(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("defaults: [sft_3b_1gpu, _self_]\ndata: {learn: last}\n")
    own = settings([], str(file))
    assert (own.learn, own.template, own.pack_tokens) == ("last", "model", 8192)
    packaged = settings(["data.sources=[{path: rows.jsonl}]"], "sft_3b_1gpu")
    assert (packaged.template, packaged.pack_tokens, packaged.sources[0].path) == ("model", 8192, "rows.jsonl")
    file.write_text("defaults: [schema, _self_]\ndata: {learn: last, template: model}\n")
    own = settings(["data.pack_tokens=512"], str(file))
    assert (own.learn, own.template, own.pack_tokens) == ("last", "model", 512)


def test_the_published_checkpoints_are_evaluated_with_their_own_settings(tmp_path: Path) -> None:
    words = ["--config-name", "evaluate_ovr", "--model", str(tmp_path), "--out", "o"]
    args = parse_options(build_parser(), words)
    runnable = {name for name, benchmark in BENCHMARKS.items() if benchmark.harness == OURS and benchmark.paper}
    assert set(args.data) == runnable
    assert (args.template, args.max_tokens, args.dtype, args.max_pixels) == ("model", 32768, None, None)
    assert sampling_temperature(tmp_path, args) == 1.0
    file = tmp_path / "generation_config.json"
    for config, temperature in (({"temperature": 0.6, "do_sample": True}, 0.6), ({"temperature": 0.6}, 1.0), ({}, 1.0)):
        file.write_text(json.dumps(config))
        assert sampling_temperature(tmp_path, args) == temperature
        given = parse_options(build_parser(), [*words, "--temperature", "0.3"])
        assert sampling_temperature(tmp_path, given) == 0.3
    file.write_text('{"temperature": "hot", "do_sample": true}')
    with pytest.raises(ConfigError, match="temperature is 'hot'; it must be a number up to 100"):
        sampling_temperature(tmp_path, args)
