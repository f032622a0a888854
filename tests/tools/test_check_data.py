"""`ovr check-data` and the pre-flight's sample over good and bad rows."""

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ovr_megatron.config import ColdStartConfig, DataConfig, ModelConfig, RLConfig, RunConfig, SourceConfig, build
from ovr_megatron.data.processing import Processor
from ovr_megatron.data_checks import check_sample, spread
from ovr_megatron.errors import UserError
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

TOOL = Path(__file__).resolve().parents[2] / "tools/check_data.py"
SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), sizes=SIZES)


@pytest.fixture(scope="module")
def check() -> Callable[..., int]:
    main = runpy.run_path(str(TOOL))["main"]

    def run(*arguments: object) -> int:
        try:
            code: int = main([str(argument) for argument in arguments])
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        return code

    return run


def chat(question: str, reply: str | None = None, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages + ([{"role": "assistant", "content": reply}] if reply else []), **more}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_bad_row_of_a_cold_start_is_listed(
    check: Callable[..., int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reply = "So</think>1"
    good = chat("1?", reply)
    rows = [{"messages": 3}, good, chat("1?", "1"), chat("word " * 3000, reply), chat("<image>1?", reply)]
    path = write(tmp_path / "rows.jsonl", *rows)
    command = ("tiny_cold_start", f"model.path={model}", f"data.sources=[{{path: {path}}}]")
    assert check(*command) == 2
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.removeprefix(f"{path}:").partition(":")[0] for line in lines] == ["1", "3", "4", "5"]
    for line, part in zip(lines, ("is int", "has no </think>", "max_prompt_tokens", "<image>"), strict=True):
        assert part in line and "; " in line
    assert summary == f"{path}: 5 of 5 rows looked at, 4 cannot be used"
    write(path, good, good)
    assert check(*command) == 0
    assert check(*command, "--rows", "1") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": 1 of 2 rows looked at, 0 cannot be used")


def test_prompts_need_answers_that_can_be_verified(
    check: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", chat("1?", answer="1"), chat("Why?", answer="Proof. By induction."))
    assert check("tiny_rl", "model.path=absent", f"data.sources=[{{path: {path}}}]") == 2
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{path}:2: answer: it is a proof; ")
    assert "lengths are not looked at" in shown.err
    assert check("tiny_rl", "model.path=absent", "data.sources=[]") == 2
    assert check("tiny_rl", "model.path=absent", "data.sources=[{path: absent.jsonl}]") == 2
    assert "there is no such file or folder" in capsys.readouterr().err
    assert check("tiny_rl", "model.path=absent", "--rows", "20") == 0  # generated prompts
    assert "20 of an endless number rows looked at" in capsys.readouterr().out


def test_a_sample_is_spread_over_the_rows() -> None:
    assert list(spread(10, 3)) == [0, 4, 8]
    assert list(spread(3, 10)) == [0, 1, 2]
    assert len(spread(2**31, 32)) == 32


@pytest.mark.parametrize(("on_error", "stops"), [("stop", True), ("skip", False)])
def test_the_sample_tells_what_would_stop_a_run(model: Path, tmp_path: Path, on_error: str, stops: bool) -> None:
    path = write(tmp_path / "rows.jsonl", chat("1?", answer="1"), chat("Why?", answer="Proof. By induction."))
    data = DataConfig(sources=[SourceConfig(path=str(path))], on_error=on_error)
    known = {"run": {"dir": "x"}, "model": {"path": str(model)}, "curriculum": [{"until": 900, "max_tokens": 9000}]}
    rl: RLConfig = replace(build(RLConfig, known), data=data)
    problems = check_sample(rl, Processor(model, data), 8)
    assert bool(problems) == stops
    assert not stops or problems[0].startswith("1 of 2 rows looked at cannot be used (ovr check-data lists all)")
    cold = ColdStartConfig(run=RunConfig(dir="x"), model=ModelConfig(path=str(model)), data=data)
    (problem,) = check_sample(cold, Processor(model, data), 8)  # prompts are nothing to learn from
    assert "2 of 2 rows looked at cannot be used" in problem
