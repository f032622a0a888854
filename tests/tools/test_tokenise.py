"""`ovr tokenise` with two processes beside a set that one process writes."""

import json
import runpy
from pathlib import Path

import pytest

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.data.tokenised import MANIFEST, SAMPLES, TOKENS
from ovr_megatron.data.tokenising import tokenise
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime.command import run_command

TOOL = Path(__file__).resolve().parents[2] / "tools/tokenise.py"
SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)


def run(*arguments):
    """Exit code of the command line."""
    try:
        run_command(lambda: runpy.run_path(str(TOOL))["main"]([str(argument) for argument in arguments]))
    except SystemExit as end:
        return end.code


@pytest.fixture
def model(tmp_path):
    return make_tiny_model(tmp_path / "model", sizes=SIZES)


def write_rows(path, count):
    chats = [[("user", "red3 " * (1 + i % 9)), ("assistant", f"So</think>{i}")] for i in range(count)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_any_number_of_processes_writes_the_same(model, tmp_path, capsys):
    a, b = write_rows(tmp_path / "a.jsonl", 700), write_rows(tmp_path / "b.jsonl", 3)
    sources = [SourceConfig(path=str(a), weight=0.5), SourceConfig(path=str(b))]
    tokenise(DataConfig(sources=sources), model, tmp_path / "one")
    given = f"data.sources=[{{path: {a}, weight: 0.5}}, {{path: {b}}}]"
    assert run(tmp_path / "two", "--model", model, "--workers", 2, given) == 0
    for name in (TOKENS, SAMPLES, MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:3] for line in table] == [["a", "0.5", "700"], ["b", "1", "3"]]


def test_errors_end_with_one_sentence(model, tmp_path, capsys):
    path = write_rows(tmp_path / "a.jsonl", 3)
    assert run(tmp_path / "set", "--model", model, f"data.sources=[{{path: {tmp_path}/absent.jsonl}}]") == 2
    assert "absent.jsonl: there is no such file or folder" in capsys.readouterr().err
    assert run(tmp_path / "set", "--model", model, "packs=3") == 2
    assert "'packs=3' is not known" in capsys.readouterr().err
    assert run(tmp_path / "set", "--model", model, "data.packs=3") == 2
    assert run(tmp_path / "set", "--model", model, f"data.sources=[{{path: {path}}}]") == 0
    assert run(tmp_path / "set", "--verify") == 0
    (tmp_path / "set" / TOKENS).write_bytes(b"")
    capsys.readouterr()
    assert run(tmp_path / "set", "--verify") == 2
    assert "tokens.bin: has 0 bytes instead of" in capsys.readouterr().err
