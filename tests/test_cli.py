"""What a person sees who makes a mistake on the command line: one sentence, and no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ovr_megatron.config import ConfigError, DataConfig, RLConfig, build
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError, parse_row
from ovr_megatron.data.stream import RowStream
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.rl import check_lengths

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    make_tiny_model(folder, seed=0)
    return folder


def fails(*arguments: object) -> str:
    command = [sys.executable, "-m", "ovr_megatron.coldstart", "--config-name", "tiny_cold_start", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_world_that_the_layout_does_not_divide(tmp_path: Path, model: Path) -> None:
    message = fails(f"run.dir={tmp_path}", f"model.path={model}", "parallel.tp=2")
    assert "error: 1 processes cannot be cut into tp=2" in message


def test_an_unknown_key(tmp_path: Path) -> None:
    assert "Key 'sed' is not in struct" in fails(f"run.dir={tmp_path}", "run.sed=3")


def test_a_picture_that_is_not_there(tmp_path: Path, model: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "there.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]},
                {"role": "assistant", "content": "A square."},
            ]
        }
        for name in ("there.png", "absent.png")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"data.sources=[{{path: {tmp_path}/rows.jsonl}}]"
    message = fails(f"run.dir={tmp_path}/run", f"model.path={model}", source)
    assert f"error: {tmp_path}/rows.jsonl:2: messages[0].content[0].image" in message


def test_an_answer_that_no_grader_can_verify() -> None:
    raw = {"messages": [{"role": "user", "content": "Why?"}], "answer": "Proof. By induction on n, it holds."}
    row = parse_row(raw, "rows.jsonl:7", Path())
    prompts = PromptStream(RowStream([([row], 1.0)], seed=1), None, {})
    with pytest.raises(RowError, match=r"rows\.jsonl:7: answer: .*remove the row"):
        prompts.draw(1)


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
        "curriculum": [{"until": 1, "max_tokens": 64}, {"until": 900, "max_tokens": longest}],
    }
    config, shape = build(RLConfig, values), ModelShape.from_hf(model)
    if message is None:
        check_lengths(config, shape)
    else:
        with pytest.raises(ConfigError, match=message):
            check_lengths(config, shape)
