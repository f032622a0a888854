"""The mixture: order from the seed alone, exact resume, weights, epochs, exclusion."""

import json
from collections import Counter
from itertools import islice

import pytest

from ovr_megatron.config import ConfigError, DataConfig, SourceConfig
from ovr_megatron.data.fingerprints import fingerprint, write_fingerprints
from ovr_megatron.data.puzzles import open_puzzle
from ovr_megatron.data.schema import Message, Row, RowError, TextPart
from ovr_megatron.data.stream import RowStream, open_stream


def rows(name: str, count: int) -> list[Row]:
    return [Row((Message("user", (TextPart(f"{name} {i}"),)),), answer=str(i), id=f"{name}{i}") for i in range(count)]


def ids(stream: RowStream, count: int) -> list[str]:
    return [row.id for row in islice(stream, count)]


def mixed(seed: int) -> RowStream:
    return RowStream([(rows("a", 7), 1.0), (rows("b", 100), 3.0), (open_puzzle("puzzle:countdown"), 1.0)], seed)


def test_the_order_is_a_function_of_the_seed() -> None:
    assert ids(mixed(1), 60) == ids(mixed(1), 60) != ids(mixed(2), 60)


def test_resume_is_exact() -> None:
    stream = mixed(3)
    ids(stream, 41)
    state = json.loads(json.dumps(stream.state()))
    resumed = mixed(3)
    resumed.load(state)
    assert ids(resumed, 50) == ids(stream, 50)


def test_an_epoch_shows_every_row_once_in_a_new_order() -> None:
    stream = RowStream([(rows("a", 20), 1.0)], 5)
    first, second = ids(stream, 20), ids(stream, 20)
    assert sorted(first) == sorted(second) == sorted(row.id for row in rows("a", 20))
    assert first != second


def test_weights_are_shares() -> None:
    stream = RowStream([(rows("a", 5), 1.0), (rows("b", 5), 3.0)], 0)
    count = Counter(name[0] for name in ids(stream, 4000))
    assert 0.72 < count["b"] / 4000 < 0.78


def test_excluded_rows_are_skipped_and_counted() -> None:
    all_rows = rows("a", 10)
    stream = RowStream([(all_rows, 1.0)], 1, frozenset(map(fingerprint, all_rows[:4])))
    assert sorted(ids(stream, 6)) == sorted(row.id for row in all_rows[4:])
    next(stream)  # of the second epoch
    assert 4 <= stream.excluded < 8


def test_excluding_everything_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    all_rows = rows("a", 3)
    monkeypatch.setattr("ovr_megatron.data.stream._BARREN", 50)
    with pytest.raises(RowError, match="excluded"):
        next(RowStream([(all_rows, 1.0)], 1, frozenset(map(fingerprint, all_rows))))


def test_the_exclusion_file_of_a_configuration(tmp_path) -> None:
    puzzle = open_puzzle("puzzle:digits?form=image&task=sum&answered=0")
    path = tmp_path / "held_out.txt"
    config = DataConfig(sources=[SourceConfig(path="puzzle:digits?form=image&task=sum&answered=0")])
    first = next(open_stream(config, 1))
    assert write_fingerprints([first], path) == 1
    stream = open_stream(DataConfig(sources=config.sources, exclude=str(path)), 1)
    assert next(stream).id != first.id
    assert stream.excluded == 1
    assert puzzle[0].id


def test_no_source_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        open_stream(DataConfig(), 1)


def test_a_position_of_other_sources_is_refused() -> None:
    with pytest.raises(ConfigError, match="use the same"):
        mixed(1).load(RowStream([(rows("a", 5), 1.0)], 1).state())
