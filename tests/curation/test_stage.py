"""The chain of stages: what is done again and what is not, the reports, collection, and two processes."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from ovr_megatron.config import ConfigError, DataConfig, SourceConfig, build
from ovr_megatron.curation.prepare import prepare
from ovr_megatron.curation.settings import CollectConfig, DedupConfig, PatternsConfig, PrepareConfig, StratifyConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data_checks import bad_rows
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime.journal import Journal
from ovr_megatron.runtime.lock import lock_folder

STAGES = ["collect", "dedup", "patterns", "stratify", "weigh", "tokenise"]
THOUGHT = "I think about it for a while.</think>The answer is \\boxed{%s}."


def line(question: str, answer: str, response: str | None = None, **more: Any) -> str:
    messages = [{"role": "user", "content": question}]
    messages.append({"role": "assistant", "content": response or THOUGHT % answer})
    return json.dumps({"messages": messages, "answer": answer, **more}) + "\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), tied=False, seed=1)


@pytest.fixture
def config(tmp_path: Path, model: Path) -> PrepareConfig:
    lines = [line(f"What is {i} plus {i}, and why is that so?", str(2 * i), source="sums") for i in range(40)]
    lines += [lines[3], line("What  is 3 plus 3, and why is that so?", "6", source="sums")]  # twice, exactly
    long = "Tell me of " + " and ".join(f"{chr(97 + i % 26)}{chr(97 + i // 3)}" for i in range(40)) + ". "
    lines += [line(long + "How much?", "1/3", source="tales"), line(long + "How much, then?", "1/3", source="tales")]
    lines += [line("And this?", "7", "It never ends", source="tales")]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return PrepareConfig(
        dir=str(tmp_path / "prepared"),
        stages=STAGES,
        model=str(model),
        data=DataConfig(sources=[SourceConfig(path=str(tmp_path / "rows.jsonl"))]),
    )


def report(config: PrepareConfig, stage: str) -> dict[str, Any]:
    return json.loads((Path(config.dir) / stage / "report.json").read_text())


def rows(config: PrepareConfig, stage: str) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (Path(config.dir) / stage / "rows.jsonl").read_text().splitlines()]


def test_reports_say_what_went_and_why(config: PrepareConfig) -> None:
    last = prepare(config)
    dedup, patterns = report(config, "dedup"), report(config, "patterns")
    assert (dedup["rows_in"], dedup["kept"]) == (45, 42)
    assert dedup["dropped"] == {"exact duplicate": 2, "near duplicate": 1}
    assert [example["of"] for example in dedup["examples"]["exact duplicate"]] == [3, 3]
    assert dedup["by_source"] == {"sums": {"kept": 40, "dropped": 2}, "tales": {"kept": 2, "dropped": 1}}
    assert patterns["dropped"] == {"thought without end": 1}
    assert patterns["examples"]["thought without end"][0]["response"] == "It never ends"
    assert all((Path(config.dir) / stage / "figure.png").stat().st_size > 5000 for stage in STAGES)
    groups = {group["name"]: group for group in json.loads((last / "groups.json").read_text())}
    assert sum(group["share"] for group in groups.values()) == pytest.approx(1)
    assert sum(group["rows"] * group["weight"] for group in groups.values()) / 41 == pytest.approx(1, abs=1e-5)
    assert groups["tales/d0"]["weight"] > groups["sums/d0"]["weight"]
    sources = DataConfig(sources=[SourceConfig(**told) for told in yaml.safe_load((last / "sources.yaml").read_text())])
    opened = [open_source(source) for source in sources.sources]
    assert sum(map(len, opened)) == 41
    assert not [error for rows in opened for error in bad_rows(rows, range(len(rows)), [])]
    drawn = Counter(row.source for row in islice(open_stream(sources, seed=1), 4000))
    assert {name: count / 4000 for name, count in drawn.items()} == pytest.approx(
        {name: group["share"] for name, group in groups.items()}, abs=0.05
    )


def test_only_what_changed_and_what_follows_is_done_again(
    config: PrepareConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    def again(config: PrepareConfig) -> list[str]:
        capsys.readouterr()
        prepare(config)
        told = capsys.readouterr().out.splitlines()
        return [text.partition(":")[0] for text in told if not text.endswith("(done before)")]

    assert again(config) == STAGES
    before = rows(config, "weigh")
    assert again(config) == []
    assert again(replace(config, workers=2)) == []
    changed = replace(config, patterns=PatternsConfig(need_thought=False, need_box=False))
    assert again(changed) == STAGES[2:]
    assert again(replace(changed, stratify=StratifyConfig(max_rows=5))) == STAGES[3:]
    (Path(config.dir) / "patterns" / "manifest.json").unlink()  # as if it had been interrupted
    assert again(config) == STAGES[2:]
    assert rows(config, "weigh") == before
    source = Path(config.data.sources[0].path)
    source.write_text(source.read_text() + line("One more?", "1"))
    assert again(config) == STAGES


def test_two_processes_write_the_same_files(config: PrepareConfig) -> None:
    data = DataConfig(sources=[SourceConfig(path="puzzle:digits?form=text")])
    config = replace(config, stages=["collect", "dedup"], data=data, collect=CollectConfig(limit=700))
    one = prepare(config)
    two = prepare(replace(config, dir=config.dir + "2", workers=2))
    assert (one / "rows.jsonl").read_bytes() == (two / "rows.jsonl").read_bytes()


def test_sources_of_every_form_become_rows_with_stored_images(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "green").save(tmp_path / "a.png")
    picture = (tmp_path / "a.png").read_bytes()
    chat = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "<think>\nGreen.</think>g"}]
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "l1", "image": "a.png", "conversations": chat}]))
    verl = {
        "data_source": ["geo"],
        "prompt": [[{"role": "user", "content": "<image>Name the colour."}]],
        "images": [[{"bytes": picture, "path": None}]],
        "reward_model": [{"style": "rule", "ground_truth": "green"}],
    }
    pq.write_table(pa.table(verl), tmp_path / "verl.parquet")
    orz = [[{"from": "human", "value": "1+1?"}, {"from": "assistant", "ground_truth": {"value": "2"}}]]
    (tmp_path / "orz.json").write_text(json.dumps(orz))
    names = ("llava.json", "verl.parquet", "orz.json")
    sources = [SourceConfig(path=str(tmp_path / name)) for name in names] + [SourceConfig(path="puzzle:shapes")]
    config = PrepareConfig(
        dir=str(tmp_path / "out"),
        stages=["collect", "dedup"],
        collect=CollectConfig(limit=2),
        data=DataConfig(sources=sources),
        dedup=DedupConfig(key="prompt"),
    )
    last = prepare(config)
    (tmp_path / "a.png").unlink()
    source = open_source(SourceConfig(path=str(last / "rows.jsonl"), image_root=config.dir))
    assert len(source) == 5
    assert not list(bad_rows(source, range(5), [lambda row: load_media(row, DataConfig())]))
    assert source[0].response == "Green.</think>g"
    assert (source[1].answer, source[2].answer) == ("green", "2")
    assert source[0].messages[0].parts[0] == source[1].messages[0].parts[0]  # one file for both
    assert len(list((tmp_path / "out/images").glob("*/*"))) == 3


def test_a_bad_row_stops_or_is_counted_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(line("Good?", "1") + "{bad\n" + line("Bad?", "2").replace('"user"', '"tool"'))
    data = DataConfig(sources=[SourceConfig(path=str(tmp_path / "rows.jsonl"), name="mine")])
    config = PrepareConfig(dir=str(tmp_path / "out"), stages=["collect"], data=data)
    with pytest.raises(RowError, match=r"rows.jsonl:2: is not JSON"):
        prepare(config)
    prepare(replace(config, collect=CollectConfig(on_error="skip")))
    told = report(config, "collect")
    assert (told["kept"], sum(told["dropped"].values())) == (1, 2)
    assert "rows.jsonl:3" in str(told["examples"])


CASES = Path(__file__).parents[1] / "data/cases/traces"


def test_the_documented_preparation_of_openthoughts_keeps_its_rows(tmp_path: Path) -> None:
    source = SourceConfig(path=str(CASES / "openthoughts114k.parquet"), format="llava")
    stages = ["collect", "dedup", "patterns"]
    config = PrepareConfig(dir=str(tmp_path / "out"), stages=stages, data=DataConfig(sources=[source]))
    prepare(config)
    kept = rows(config, "patterns")
    assert [row["messages"][-1]["content"] for row in kept] == [
        f"Add {i} and {i}. Wait, check it.\n</think>\n\nIt is \\(\\boxed{{{2 * i}}}\\)." for i in range(4)
    ]
    assert kept[0]["messages"][0]["content"].endswith("Structure: <think> {thought} </think> {solution} ")


def test_a_source_that_ends_up_empty_stops_the_preparation(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text(line("One?", "1") + line("Two, if you please?", "2"))
    (tmp_path / "plain.jsonl").write_text(line("Three?", "3", "3") + line("And what of four?", "4", "4"))
    (tmp_path / "bad.jsonl").write_text(line("Five?", "5").replace('"user"', '"tool"'))
    sources = {name: SourceConfig(path=str(tmp_path / f"{name}.jsonl"), name=name) for name in ("good", "plain", "bad")}
    data = DataConfig(sources=[sources["good"], sources["plain"]])
    config = PrepareConfig(dir=str(tmp_path / "out"), stages=["collect", "patterns"], data=data)
    with pytest.raises(ConfigError, match=r"patterns kept no row of plain \(2 rows, most for: thought without end\)"):
        prepare(config)
    prepare(replace(config, allow_empty=True))
    assert report(config, "patterns")["by_source"]["plain"] == {"kept": 0, "dropped": 2}
    data = DataConfig(sources=[sources["good"], sources["bad"]])
    config = PrepareConfig(
        dir=str(tmp_path / "other"), stages=["collect"], data=data, collect=CollectConfig(on_error="skip")
    )
    with pytest.raises(ConfigError, match=r"collect kept no row of .*bad.jsonl; report.json says why; .*allow_empty"):
        prepare(config)
    prepare(replace(config, allow_empty=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: replace(c, stages=["dedup"]), "must begin with collect"),
        (lambda c: replace(c, stages=["collect", "weigh", "stratify"]), "weigh needs stratify before it"),
        (lambda c: replace(c, stages=["collect", "decontaminate"]), r"decontaminate.sources is empty"),
        (lambda c: replace(c, stages=["collect", "proxy_loss"]), r"give proxy_loss.model="),
        (lambda c: replace(c, stages=["collect", "wash"]), "choose one of collect"),
        (lambda c: prepare(replace(c, patterns=PatternsConfig(min_characters=999))), "patterns kept none of 42 rows"),
    ],
)
def test_settings_that_cannot_work_are_named(
    config: PrepareConfig, change: Callable[[PrepareConfig], Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        change(config)


def test_a_journal_loses_only_the_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for key in (2**64 - 1, 7, 7):
            journal.add(key, {"text": f"\u00e4{len(path.read_bytes())}"})
        journal.reopen()
        assert (len(journal), 7 in journal, 8 in journal) == (3, True, False)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": 9, "te')
    with Journal(path) as journal:
        assert [entry["key"] for entry in journal] == [2**64 - 1, 7, 7]
        assert journal[7]["text"] != "\u00e40"
        journal.add(9, {"text": "new"})
    assert path.read_bytes().startswith(whole)
    with Journal(path) as journal:
        assert journal[9]["text"] == "new"


def test_unknown_settings_are_refused() -> None:
    values = {"dir": "x", "stages": ["collect"], "data": {"sources": [{"path": "a.jsonl"}]}}
    assert build(PrepareConfig, values).stages == ["collect"]
    for key in ("nonsense", "dedup.nonsense", "difficulty.nonsense"):
        changed = OmegaConf.merge(values, OmegaConf.from_dotlist([f"{key}=1"]))
        with pytest.raises(ConfigError, match=f"there is no setting {key}"):
            build(PrepareConfig, changed)


def test_two_preparations_in_one_folder_are_refused(config: PrepareConfig) -> None:
    folder = Path(config.dir)
    with lock_folder(folder):
        code = f"from pathlib import Path; from ovr_megatron.runtime.lock import *; lock_folder(Path({str(folder)!r}))"
        second = [sys.executable, "-c", code]
        refused = subprocess.run(second, capture_output=True, text=True)
        assert f"{folder} is in use by process {os.getpid()} on " in refused.stderr
    subprocess.run(second, check=True)
    subprocess.run(second, check=True)  # the first has ended without a release
