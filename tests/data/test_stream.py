"""The mixture: order, shares, epochs, exclusion, and a position that can be saved."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from ovr_megatron.config import ConfigError, DataConfig, SourceConfig
from ovr_megatron.data.fingerprints import fingerprint
from ovr_megatron.data.schema import ENDLESS, Message, Row, RowError, TextPart
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.stream import RowStream, open_stream


class Numbers:
    """Rows that only say their number."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        assert 0 <= index < self.size
        return Row((Message("user", (TextPart(f"{self.name}{index}"),)),), "1", source=self.name, id=str(index))


def stream(seed: int = 1, exclude: frozenset[str] = frozenset(), size: int = 10) -> RowStream:
    return RowStream([(Numbers("a", size), 3.0), (Numbers("b", 7), 1.0), (Numbers("c", ENDLESS), 1.0)], seed, exclude)


def names(rows: RowStream, count: int) -> list[str]:
    return [row.messages[0].text for row in islice(rows, count)]


def test_the_order_is_a_function_of_the_seed() -> None:
    assert names(stream(1), 100) == names(stream(1), 100)
    assert len({tuple(names(stream(seed), 30)) for seed in range(20)}) == 20


def test_each_source_has_its_share() -> None:
    counts = Counter(row.source for row in islice(stream(), 5000))
    assert abs(counts["a"] / 5000 - 0.6) < 0.03
    assert abs(counts["b"] / 5000 - 0.2) < 0.03


def test_a_finite_source_gives_every_row_once_an_epoch_in_a_new_order() -> None:
    seen = [row.id for row in islice(stream(), 300) if row.source == "a"]
    epochs = [tuple(seen[i : i + 10]) for i in range(0, len(seen) // 10 * 10, 10)]
    assert len(epochs) > 10
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_an_endless_source_is_walked_from_a_place_of_the_seed() -> None:
    first = [[int(row.id) for row in islice(stream(seed), 200) if row.source == "c"] for seed in range(5)]
    for numbers in first:
        assert [(number - numbers[0]) % ENDLESS for number in numbers] == list(range(len(numbers)))
    assert len({numbers[0] for numbers in first}) == 5


@pytest.mark.parametrize("at", [0, 1, 9, 10, 57, 200])
def test_a_saved_position_continues_exactly(at: int) -> None:
    excluded = frozenset({fingerprint(Numbers("a", 10)[3])})
    whole = stream(exclude=excluded)
    expected = names(whole, at + 100)[at:]
    first = stream(exclude=excluded)
    names(first, at)
    state = first.state()
    written = json.dumps(state)
    assert names(first, 100) == expected
    assert json.dumps(state) == written  # going on does not change what was saved
    second = stream(exclude=excluded)
    names(second, 33)
    second.load(json.loads(written))
    second.load(state)
    assert names(second, 100) == expected
    assert json.dumps(state) == written  # nor does the stream that took it over
    assert second.excluded == whole.excluded
    assert second.state() == whole.state()


def test_the_position_is_small() -> None:
    rows = stream(size=5000)
    names(rows, 2000)
    assert len(json.dumps(rows.state())) < 300


def test_a_position_of_another_stream_is_refused() -> None:
    state = stream().state()
    with pytest.raises(ConfigError, match=r"run\.seed 1, this run has 2"):
        stream(seed=2).load(state)
    with pytest.raises(ConfigError, match=r"rows to train on, by source, .* validation\.share"):
        stream(size=11).load(state)
    with pytest.raises(ConfigError, match=r"rows to train on, by source, .* validation\.share"):
        RowStream([(Numbers("a", 10), 1.0)], 1).load(state)


def test_excluded_prompts_never_come_and_are_counted() -> None:
    held = {f"a{i}" for i in range(4)}
    exclude = frozenset(fingerprint(Numbers("a", 10)[i]) for i in range(4))
    rows = stream(exclude=exclude)
    seen = names(rows, 400)
    assert not held & set(seen)
    assert {f"a{i}" for i in range(4, 10)} <= set(seen)
    open_rows = stream()
    walked = names(open_rows, 400 + rows.excluded)
    assert [name for name in walked if name not in held] == seen
    assert sum(name in held for name in walked) == rows.excluded > 20


def test_no_fingerprint_is_computed_without_exclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise AssertionError("fingerprint was computed")

    monkeypatch.setattr("ovr_megatron.data.stream.fingerprint", refuse)
    assert len(names(stream(), 50)) == 50


def test_a_stream_that_excludes_everything_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovr_megatron.data.stream._BARREN", 50)
    exclude = frozenset(fingerprint(Numbers("b", 7)[i]) for i in range(7))
    with pytest.raises(RowError, match=r"excluded or cannot be used; remove data\.exclude"):
        next(RowStream([(Numbers("b", 7), 1.0)], 1, exclude))


def test_a_stream_opens_from_the_configuration(tmp_path: Path) -> None:
    heldout = SourceConfig(path="puzzle:digits?split=heldout&answered=0&count=8")
    everything = [row.id for row in islice(open_stream(DataConfig(sources=[heldout]), 1), 8)]
    assert len(set(everything)) == 8
    (tmp_path / "exclude.txt").write_text(fingerprint(next(open_stream(DataConfig(sources=[heldout]), 1))) + "\n")
    rest = open_stream(DataConfig(sources=[heldout], exclude=str(tmp_path / "exclude.txt")), 1)
    assert [row.id for row in islice(rest, 7)] == everything[1:]
    assert rest.excluded == 1
    with pytest.raises(ConfigError, match=r"data.sources is empty"):
        open_stream(DataConfig(), 1)


def test_rows_that_cannot_be_used_are_listed_and_the_stream_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps({"messages": [{"role": "user", "content": f"{i}?"}], "answer": str(i)}) for i in range(6)]
    path.write_text("\n".join([*good[:3], '{"messages": []}', *good[3:], "{"]))
    config = DataConfig(sources=[SourceConfig(path=str(path))])
    with pytest.raises(RowError, match=r"rows.jsonl:(4|8): "):
        list(islice(open_stream(config, 1), 8))
    listed = SkippedRows(tmp_path / "data" / "skipped.jsonl")
    stream = open_stream(config, 1, listed)
    assert sorted(row.answer for row in islice(stream, 6)) == list("012345")
    next(stream)
    lines = [json.loads(line)["where"] for line in (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(lines) == [f"{path}:4", f"{path}:8"]
    with (tmp_path / "data" / "skipped.jsonl").open("a") as file:
        file.write('{"where": "rows.jso')  # a crash
    assert SkippedRows(tmp_path / "data" / "skipped.jsonl").count == 2


def test_names_that_no_row_has_as_its_source() -> None:
    rows = [Row((), answer="1", source="rare" if i == 77 else "common") for i in range(100)]
    mixture = RowStream([(rows, 1.0), (Numbers("endless", ENDLESS), 1.0)], seed=1)
    assert mixture.absent_sources([]) == []
    assert mixture.absent_sources(["rare", "common", "endless"]) == []
    assert mixture.absent_sources(["rarer", "common", "b"]) == ["b", "rarer"]
