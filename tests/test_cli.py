"""What a person sees who makes a mistake on the command line: one sentence, and no traceback."""

import ast
import configparser
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ovr_megatron import __version__, cli
from ovr_megatron.config import ColdStartConfig, ConfigError, DataConfig, RewardJudgeConfig, RLConfig, build
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.stream import RowStream
from ovr_megatron.errors import UserError
from ovr_megatron.families import ModelShape
from ovr_megatron.keys import mapping_names, unknown_setting
from ovr_megatron.launch import read_command_line
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.rewards.rules import RuleError
from ovr_megatron.rl.setup import check_lengths

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    make_tiny_model(folder, seed=0)
    return folder


def fails(python: Path, *arguments: object) -> str:
    command = [python, "-m", "ovr_megatron.coldstart", "--config-name", "tiny_cold_start", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_world_that_the_layout_does_not_divide(loaded_python: Path, tmp_path: Path, model: Path) -> None:
    message = fails(loaded_python, f"run.dir={tmp_path}", f"model.path={model}", "parallel.tp=2")
    assert "error: 1 processes cannot be cut into tp=2" in message


def test_an_unknown_key(loaded_python: Path, tmp_path: Path) -> None:
    message = fails(loaded_python, f"run.dir={tmp_path}", "run.sed=3")
    assert message == "error: there is no setting run.sed; did you mean run.seed?\n"


def test_a_picture_that_is_not_there(loaded_python: Path, tmp_path: Path, model: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "there.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "Four sides.</think>A square."},
            ]
        }
        for name in ("there.png", "absent.png")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.sources=[{{path: {tmp_path}/rows.jsonl}}]"
    message = fails(loaded_python, f"run.dir={tmp_path}/run", f"model.path={model}", source)
    assert f"error: {tmp_path}/rows.jsonl:2: messages[0].content[0].image" in message


def test_an_answer_that_no_grader_can_verify() -> None:
    raw = {"messages": [{"role": "user", "content": "Why?"}], "answer": "Proof. By induction on n, it holds."}
    row = parse_row(raw, "rows.jsonl:7", Path())
    prompts = PromptStream(RowStream([([row], 1.0)], seed=1), None, {})
    with pytest.raises(RowError, match=r"rows\.jsonl:7: answer: .*remove the row"):
        prompts.draw(1)


def test_a_rule_of_a_source_that_no_row_has() -> None:
    row = parse_row({"messages": [{"role": "user", "content": "1+1?"}], "answer": "2", "source": "sums"}, "r:1", Path())
    PromptStream(RowStream([([row], 1.0)], seed=1), None, {"sums": "numeric"})
    with pytest.raises(RuleError, match=r"rule for 'sum', which is the source of no row"):
        PromptStream(RowStream([([row], 1.0)], seed=1), None, {"sums": "numeric", "sum": "numeric"})


JUDGE = RewardJudgeConfig(base_url="http://127.0.0.1/v1", model="m")
# By setting, what is given, what it becomes, and a further key with its value.
MAPPINGS = {
    "reward.rules": (
        "geometry: numeric:0.05, geo/3k-b: 'mine:half'",
        {"geometry": "numeric:0.05", "geo/3k-b": "mine:half"},
        ("more={math: 0.9, format: 0.1}", {"math": 0.9, "format": 0.1}),
    ),
    "reward.judges": (
        "a: {base_url: 'http://127.0.0.1/v1', model: m}",
        {"a": JUDGE},
        ("more={base_url: 'http://127.0.0.1/v1', model: m, timeout_s: 5}", replace(JUDGE, timeout_s=5.0)),
    ),
    "evaluation.rules": ("boxes: 'box:0.5'", {"boxes": "box:0.5"}, ("more=exact", "exact")),
    "patterns.drop": (
        "refusal: \"I cannot help\", many: 'x{3}'",
        {"refusal": "I cannot help", "many": "x{3}"},
        ("more=exact", "exact"),
    ),
}


@pytest.mark.parametrize("schema", [ColdStartConfig, RLConfig, PrepareConfig])
def test_settings_that_are_mappings_take_keys_of_the_users(schema: type) -> None:
    recipe = {ColdStartConfig: "tiny_base", RLConfig: "tiny_rl", PrepareConfig: "prepare_prompts"}[schema]
    needed = ["dir=x", "data.sources=[{path: a}]", "decontaminate.sources=[{path: b}]"]
    sets = "evaluation.sources=[{path: c, name: boxes}, {path: d, name: more}]"
    needed = needed if schema is PrepareConfig else ["run.dir=x", "model.path=y", sets]
    for name in mapping_names(schema):
        text, expected, (more, value) = MAPPINGS[name]
        for prefix in ("", "+", "++"):
            config = read_command_line(schema, recipe, "", [*needed, f"{prefix}{name}={{{text}}}", f"{name}.{more}"])
            section, _, field = name.partition(".")
            assert getattr(getattr(config.config, section), field) == {**expected, "more": value}
    assert set(mapping_names(schema)) <= set(MAPPINGS)


def test_prompts_that_are_too_long_are_dropped_and_counted(model: Path) -> None:
    short, long = ({"messages": [{"role": "user", "content": "1 + 1? " * n}], "answer": "2"} for n in (1, 300))
    rows = [parse_row(raw, f"rows.jsonl:{i}", Path()) for i, raw in enumerate((short, long, long, long))]
    processor = Processor(model, DataConfig(max_prompt_tokens=100))
    prompts = PromptStream(RowStream([(rows, 1.0)], seed=1), processor, {})
    kept, dropped = prompts.draw(3), prompts.dropped
    assert [row.where for row in kept] == ["rows.jsonl:0"] * 3
    assert 6 <= dropped <= 9


@pytest.mark.parametrize(
    ("longest", "rollout", "message"),
    [
        (4096, 0, None),
        (4097, 0, r"curriculum\[1\]\.max_tokens comes to 4097 tokens, .* 4096 positions; .*--yarn 2"),
        (128, 9000, r"rollout\.max_model_len comes to 9000 tokens, .* 4096 positions; .*--yarn 3"),
    ],
)
def test_a_length_past_the_models_positions(model: Path, longest: int, rollout: int, message: str | None) -> None:
    values = {
        "run": {"dir": "run"},
        "model": {"path": str(model)},
        "rollout": {"max_model_len": rollout},
        "data": {"max_prompt_tokens": 32},
        "curriculum": [{"until": 1, "max_tokens": 64}, {"until": 900, "max_tokens": longest}],
    }
    config, shape = build(RLConfig, values), ModelShape.from_hf(model)
    if message is None:
        check_lengths(config, shape)
    else:
        with pytest.raises(ConfigError, match=message):
            check_lengths(config, shape)


# Help and a refused command line come before any library of the work.
HEAVY = ("torch", "torchvision", "megatron", "vllm", "transformers", "datasets", "matplotlib", "pyarrow", "sympy")
COMMANDS = [*sorted((ROOT / "tools").glob("*.py")), *sorted((ROOT / "ovr_megatron").glob("*/__main__.py"))]
OVR = ROOT / "ovr_megatron/__main__.py"
# The commands of `ovr`: another name of each, and words that it refuses.
ALIASES = {
    "plan": ("tools/plan.py", ["no_recipe"]),
    "settings": ("tools/settings.py", ["optimizer"]),
    "reference": ("tools/reference.py", ["SFT"]),
    "prepare": ("tools/prepare_data.py", ["teacher.sample=3"]),
    "check-data": ("tools/check_data.py", ["tiny_rl", "--rows", "-1"]),
    "tokenise": ("tools/tokenise.py", ["set", "--model", "m", "max_images=1"]),
    "preflight": ("tools/preflight.py", ["rl", "run.sede=1"]),
    "sft": ("ovr_megatron/coldstart/__main__.py", ["optimizer.lrr=1"]),
    "rl": ("ovr_megatron/rl/__main__.py", ["--config-name", "no_recipe"]),
    "slurm": ("tools/slurm.py", ["rl", "run.sede=1"]),
    "replay": ("tools/replay.py", ["run", "-1"]),
    "convert from-hf": ("tools/convert_from_hf.py", ["--hf", "m"]),
    "convert to-hf": ("tools/convert_to_hf.py", ["--checkpoint", "c", "--out", "o", "--dtype", "int8"]),
    "convert from-megatron": ("tools/convert_from_megatron.py", ["--megatron", "m"]),
    "convert to-megatron": ("tools/convert_to_megatron.py", ["--checkpoint", "c", "--out", "o", "--dtype", "int8"]),
    "average": ("tools/average_checkpoints.py", ["--out", "o"]),
    "verify": ("tools/verify.py", ["--hf", "m", "--layout", "tp=two"]),
    "tiny-model": ("tools/make_tiny_model.py", ["--out", "."]),
    "evaluate": ("tools/evaluate.py", ["--model", "m"]),
    "judge": ("tools/judge.py", ["s.json"]),
    "behaviours": ("tools/behaviours.py", ["a=b"]),
    "support": ("tools/support.py", ["a.jsonl"]),
    "grade": ("tools/grade.py", ["no_rows.jsonl"]),
    "report": ("tools/report.py", ["run", "--every", "-1"]),
    "bench": ("tools/bench.py", ["no_part"]),
}
CONVERSIONS = ("ovr convert from-hf", "ovr convert to-hf", "ovr convert from-megatron", "ovr convert to-megatron")


def run_light(script: str) -> str:
    """Run ``script`` and return what it prints; it fails where a heavy library is imported or too much is computed."""
    check = (
        f"\nimport sys, time\nimported = {{*{HEAVY}}} & {{*sys.modules}}\nassert not imported, imported\n"
        "assert time.process_time() < 10, time.process_time()\n"
    )
    command = [sys.executable, "-c", script + check]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def as_command(path: Path, *arguments: str, code: int = 0) -> str:
    """Return the source that runs ``path`` as a command in this process and checks its exit code."""
    return (
        f"import runpy, sys\nsys.argv = {[str(path), *arguments]}\n"
        f"try:\n    runpy.run_path({str(path)!r}, run_name='__main__')\n    code = 0\n"
        f"except SystemExit as end:\n    code = end.code or 0\nassert code == {code}, ({str(path)!r}, code)\n"
    )


def test_help_of_every_command_needs_no_library() -> None:
    assert len(COMMANDS) > 18
    text = run_light("".join(as_command(path, "--help") for path in COMMANDS))
    assert text.count("usage: ") == len(COMMANDS)
    assert "\npacks_per_step: 640\n" in text, "every setting of the recipe"


def test_a_mistyped_key_needs_no_library() -> None:
    commands = (
        ("ovr_megatron/coldstart/__main__.py", "optimizer.lrr=1"),
        ("ovr_megatron/rl/__main__.py", "algorithm.critic_step=1"),
        ("tools/prepare_data.py", "teacher.sample=3"),
        ("tools/plan.py", "rl_7b_64gpu", "prompt=3"),
        ("tools/preflight.py", "rl", "rollout.temprature=1"),
        ("tools/tokenise.py", "set", "--model", "m", "data.max_image=1"),
    )
    redirect = "import sys\nsys.stderr = sys.stdout\n"
    text = run_light(redirect + "".join(as_command(ROOT / name, *rest, code=2) for name, *rest in commands))
    nearest = ("optimizer.lr", "algorithm.critic_steps", "teacher.samples", "prompts", "rollout.temperature")
    for line, name in zip(text.splitlines(), (*nearest, "max_images"), strict=True):
        assert f"did you mean {name}?" in line


def test_ovr_and_the_other_name_of_a_command_are_the_same() -> None:
    assert list(ALIASES) == [command.name for command in cli.COMMANDS]
    script = "import sys\nsys.stderr = sys.stdout\n"
    for name, (path, refused) in ALIASES.items():
        for words, code in ((["--help"], 0), (refused, 2)):
            script += as_command(ROOT / path, *words, code=code) + "print(end='\\f')\n"
            script += as_command(OVR, *name.split(), *words, code=code) + "print(end='\\f')\n"
    outputs = run_light(script).split("\f")[:-1]
    assert len(outputs) == 4 * len(ALIASES)
    for alias, ours in zip(outputs[::2], outputs[1::2], strict=True):
        assert alias.strip() and alias == ours
    usages = [output.split("[")[0] for output in outputs[1::4]]
    assert usages == [f"usage: {'bench.py' if name == 'bench' else f'ovr {name}'} " for name in ALIASES]


def test_every_tool_is_a_name_of_a_command() -> None:
    tools = {str(path.relative_to(ROOT)) for path in COMMANDS} - {"tools/measure.py"}  # of the project's own scripts
    assert tools == {path for path, _ in ALIASES.values()}
    for path in tools - {"tools/bench.py"}:
        if path.startswith("tools/"):
            statements = ast.parse((ROOT / path).read_text()).body
            assert len(statements) <= 4, f"{path} has work of its own"


def test_the_help_of_ovr_takes_less_than_a_second() -> None:
    text = run_light(as_command(OVR, "--help") + "import time\nassert time.process_time() < 1, time.process_time()\n")
    assert text.startswith("usage: ovr COMMAND")
    for command in cli.COMMANDS:
        assert f"\n  {command.name} " in text and f" {command.summary}\n" in text


def test_the_entry_points_are_there() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    names = {}
    for line in config["options.entry_points"]["console_scripts"].strip().splitlines():
        name, _, target = line.partition(" = ")
        module, _, function = target.partition(":")
        names[name] = getattr(importlib.import_module(module), function)
    assert names["ovr"] is cli.script
    assert set(names) == {"ovr", "ovr-coldstart", "ovr-rl", "ovr-evaluate"}
    assert all(map(callable, names.values()))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("plann x", "there is no command ovr plann; did you mean ovr plan?"),
        ("tokenize", "there is no command ovr tokenize; did you mean ovr tokenise?"),
        ("convert", f"ovr convert needs another word: write {' or '.join(CONVERSIONS)}"),
        ("convert to_hf", f"ovr convert needs another word: write {' or '.join(CONVERSIONS)}"),
        ("zebra", "there is no command ovr zebra; ovr --help lists all commands"),
        ("--zebra", "there is no command ovr --zebra; ovr --help lists all commands"),
    ],
)
def test_a_mistyped_command_is_answered_with_the_nearest(
    words: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ovr", *words.split()])
    with pytest.raises(SystemExit) as end:
        cli.script()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_what_ovr_says_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ovr {__version__}\n"
    assert cli.main(["convert", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "convert to-hf" in shown and "average" not in shown


def test_benchmarks_without_a_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovr_megatron.cli.bench.ROOT", tmp_path)
    with pytest.raises(UserError, match="the benchmarks are not installed; run ovr bench from a source tree"):
        cli.main(["bench", "model"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lr", ["optimizer.lr"]),
        ("run.sede", ["run.seed"]),
        ("seed", ["run.seed"]),
        ("data.sources.3.wieght", ["data.sources[].weight"]),
        ("evaluation.sources.0.nam", ["evaluation.sources[].name"]),
        ("warmup", ["optimizer.warmup_steps"]),
        ("zebra", []),
    ],
)
def test_the_nearest_setting_is_named(name: str, nearest: list[str]) -> None:
    sentence = unknown_setting(ColdStartConfig, name)
    assert sentence.endswith(f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists all settings")


def test_a_mistake_in_an_element_of_a_list_is_named(tmp_path: Path) -> None:
    values = {"run": {"dir": "x"}, "model": {"path": "x"}, "data": {"sources": [{"path": "x", "wieght": 2}]}}
    with pytest.raises(ConfigError, match=r"no setting data\.sources\.0\.wieght; .* data\.sources\[\]\.weight\?"):
        build(ColdStartConfig, values)
