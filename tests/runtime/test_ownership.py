"""Nothing is removed or overwritten that these tools did not write."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.config import ConfigError, DataConfig, SourceConfig
from ovr_megatron.curation.prepare import prepare
from ovr_megatron.curation.settings import DedupConfig, PrepareConfig
from ovr_megatron.evaluation.response_cache import check_results
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.weights.folder import WeightError
from ovr_megatron.weights.transfer import staged

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZES = TinySizes(hidden=32, layers=1, ffn=48, vision_hidden=32, vision_heads=2, vision_ffn=40)


def tool(name: str, *arguments: object) -> int:
    """Run a tool and return its exit code."""
    try:
        runpy.run_path(str(TOOLS / f"{name}.py"))["main"]([str(argument) for argument in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below ``folder``."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("own") / "hf", seed=1, sizes=SIZES)


@pytest.fixture(scope="module")
def checkpoint(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "ckpt"
    assert tool("convert_from_hf", "--hf", hf, "--out", out) == 0
    return out


def command(name: str, hf: Path, checkpoint: Path, out: Path) -> tuple[object, ...]:
    """Return the command line of a converter that replaces ``out``."""
    match name:
        case "convert_from_hf":
            return (name, "--hf", hf, "--out", out, "--force")
        case "convert_to_hf":
            return (name, "--checkpoint", checkpoint, "--out", out, "--force")
        case _:
            return (name, hf, "--out", out, "--force")


@pytest.mark.parametrize("name", ["convert_from_hf", "convert_to_hf", "average_checkpoints"])
@pytest.mark.parametrize("content", ["config.json", "manifest.json"])
def test_force_keeps_a_folder_that_only_looks_like_a_model(
    hf: Path, checkpoint: Path, tmp_path: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "project"
    out.mkdir()
    (out / content).write_text(json.dumps({"name": "a web application", "files": ["thesis.tex"]}))
    (out / "thesis.tex").write_text("ten years of work")
    before = files(out)
    assert tool(*command(name, hf, checkpoint, out)) == 2
    assert "was not written by these tools" in capsys.readouterr().err
    assert files(out) == before


@pytest.mark.parametrize("name", ["convert_from_hf", "convert_to_hf", "average_checkpoints"])
def test_force_replaces_its_own_folder_and_spares_one_with_a_note(
    hf: Path, checkpoint: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert [tool(*command(name, hf, checkpoint, out)) for _ in range(2)] == [0, 0]
    (out / "notes").mkdir()
    (out / "notes/best.txt").write_text("this one is the best")
    before = files(out)
    assert tool(*command(name, hf, checkpoint, out)) == 2
    assert "holds notes/best.txt, which these tools did not write" in capsys.readouterr().err
    assert files(out) == before


def test_a_downloaded_model_is_not_replaced(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="not written by these tools"), staged(hf, [], replace=True):
        pass


def test_a_checkpoint_of_a_run_may_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "step_000001"
    (out / "policy").mkdir(parents=True)
    (out / "policy/config.json").write_text("{}")
    write_manifest(out, 1)
    with staged(out, [], replace=True) as partial:
        (partial / "config.json").write_text("new")
    assert sorted(files(out)) == [".ovr_megatron.json", "config.json"]


@pytest.fixture
def config(tmp_path: Path) -> PrepareConfig:
    lines = [{"messages": [{"role": "user", "content": f"What is {i}?"}], "answer": str(i)} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [SourceConfig(path=str(tmp_path / "rows.jsonl"))]
    return PrepareConfig(dir=str(tmp_path / "out"), stages=["collect", "dedup"], data=DataConfig(sources=sources))


@pytest.mark.parametrize("name", ["collect/photo.jpg", "dedup/rows.jsonl", "config.yaml", "lock"])
def test_a_preparation_spares_what_it_did_not_write(config: PrepareConfig, name: str) -> None:
    path = Path(config.dir) / name
    path.parent.mkdir(parents=True)
    path.write_text("not a preparation's")
    with pytest.raises(ConfigError, match=r"(was not written by a|no) preparation"):
        prepare(config)
    assert files(Path(config.dir)) == {name: b"not a preparation's"}


def test_a_stage_that_is_done_again_spares_what_was_put_beside_it(config: PrepareConfig) -> None:
    stage = prepare(config)
    (stage / "notes").mkdir()
    (stage / "notes/mine.txt").write_text("look at row 2")
    (stage / "old.csv").write_text("1,2")
    (stage / "report.json").unlink()
    prepare(replace(config, dedup=DedupConfig(threshold=0.9)))
    assert (stage / "report.json").exists()
    assert (stage / "notes/mine.txt").read_text() == "look at row 2"
    assert (stage / "old.csv").read_text() == "1,2"


def test_an_evaluation_does_not_replace_the_problems_it_asks(tmp_path: Path) -> None:
    (tmp_path / "problems.json").write_text('[{"problem": "1+1", "answer": "2"}]')
    with pytest.raises(ConfigError, match=r"problems\.json is no result of an evaluation"):
        check_results(tmp_path, ["problems"])
    (tmp_path / "problems.json").write_text('{"set": "problems", "greedy": {}}')
    check_results(tmp_path, ["problems", "others"])
