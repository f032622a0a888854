"""Epochs over rows of sources, and the rows that are held out of them."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovr_megatron.config import (
    ColdStartConfig,
    ConfigError,
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    ValidationConfig,
)
from ovr_megatron.data.epochs import EpochStream
from ovr_megatron.data.held_out import SelectedRows, choose_held_out, open_validation_sources
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_set import RowSet
from ovr_megatron.data.schema import Message, Row, RowError, TextPart
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.supervised import open_packs
from ovr_megatron.launch import compose
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.plan.report import Options, plan

SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)
WORLD = SimpleNamespace(rank=0, size=1, dp_rank=0, dp_size=1, is_main=True)
DATA = DataConfig(pack_tokens=60, max_prompt_tokens=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), sizes=SIZES)


@pytest.fixture(scope="module")
def processor(model):
    return Processor(model, DATA)


@dataclass
class Numbers:
    """Rows that are called by source and index, of unlike lengths."""

    name: str
    count: int

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        question = Message("user", (TextPart("red" + "3" * (index * 7 % 11)),))
        reply = Message("assistant", (TextPart("So</think>" + "4" * (index * 5 % 13 + 1)),))
        return Row((question, reply), source=self.name, id=f"{self.name}{index}", where=f"{self.name}:{index}")


def sources_of(sizes, weights):
    rows = [Numbers(f"s{i}-", size) for i, size in enumerate(sizes)]
    return [(SourceConfig(path=r.name, weight=w), r) for r, w in zip(rows, weights, strict=True)]


def ids(step):
    return [origin.id for pack in step for origin in pack.origins]


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1.0, 1.0, 2.0, 0.5])), min_size=1, max_size=4),
    st.integers(0, 99),
    st.integers(0, 4),
)
@settings(max_examples=12, deadline=None)
def test_an_epoch_has_each_row_as_often_as_its_weight_says(processor, sources, seed, stop):
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    rows = RowSet(sources_of(sizes, weights), processor, WORLD)
    packs = EpochStream(rows, DATA, 1, seed)
    seen, steps = [Counter(), Counter()], packs.steps(2)
    for step in range(steps):
        if step == stop:  # as a run that goes on, of which another process measures the rows
            state = json.loads(json.dumps(packs.state()))
            packs = EpochStream(RowSet(sources_of(sizes, weights), processor, WORLD), DATA, 1, seed)
            packs.load(state)
        step_ids = ids(next(packs))
        seen[packs.epoch].update(step_ids)
    for source, (size, weight) in enumerate(sources):
        names = [f"s{source}-{index}" for index in range(size)]
        if weight == 0.5:  # half in the first epoch, the others in the second
            assert sum(seen[0][name] for name in names) == size // 2
            assert {seen[0][name] + seen[1][name] for name in names} == {1}
        else:
            assert {(seen[0][name], seen[1][name]) for name in names} == {(weight, weight)}


@pytest.mark.parametrize("dp_size", [2, 3])
def test_replicas_share_the_packs_of_one_plan(processor, dp_size):
    rows = RowSet(sources_of([30, 11], [1.0, 1.0]), processor, WORLD)
    alone = EpochStream(rows, DATA, 6, 5)
    replicas = [EpochStream(rows, DATA, 6, 5, rank, dp_size) for rank in range(dp_size)]
    for _ in range(alone.steps(2)):
        expected = sorted(ids(next(alone)))
        assert sorted(itertools.chain(*(ids(next(replica)) for replica in replicas))) == expected
        assert {replica.replies for replica in replicas} == {(len(expected), len(expected))}


def test_what_cannot_be_used_is_left_out_and_counted_or_stops_the_run(processor, tmp_path):
    class Damaged(Numbers):
        def __getitem__(self, index):
            if index in (3, 9):
                raise RowError(f"d:{index}", "messages", "is missing", "correct it")
            row = super().__getitem__(index)
            if index == 5:
                row = Row((Message("user", (TextPart("3" * 50),)), row.messages[1]), where="d:5")
            return row

    source = (SourceConfig(path="d"), Damaged("d", 12))
    with pytest.raises(RowError, match="d:3: messages: is missing"):
        RowSet([source], processor, WORLD)
    skipped = SkippedRows(tmp_path / "skipped.jsonl")
    rows = RowSet([source], processor, WORLD, skipped=skipped)
    assert (len(rows), rows.dropped) == (9, 3)
    listed = [json.loads(line)["where"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert listed == ["d:3", "d:5", "d:9"]
    with pytest.raises(ConfigError, match=r"puzzle:digits has no end, and steps=0 trains for epochs"):
        endless = Numbers("p", 2**31)
        RowSet([(SourceConfig(path="puzzle:digits"), endless)], processor, WORLD)
    with pytest.raises(ConfigError, match="none of the 3 rows can be used: the first the prompt takes"):
        long = SelectedRows(Damaged("d", 12), np.array([5, 5, 5]))
        RowSet([(SourceConfig(path="d"), long)], processor, WORLD)


def test_a_position_of_other_rows_is_refused(processor):
    state = EpochStream(RowSet(sources_of([9], [1.0]), processor, WORLD), DATA, 1, 1).state()
    other = EpochStream(RowSet(sources_of([8], [1.0]), processor, WORLD), DATA, 1, 1)
    with pytest.raises(ConfigError, match=r"data\.sources: the checkpoint was written with set "):
        other.load(state)


@given(st.integers(2, 3000), st.floats(0.001, 0.999), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_the_rows_held_out_depend_on_their_index_alone(count, share, rows):
    by_share = choose_held_out(count, ValidationConfig(share=share))
    appended = choose_held_out(count + 100, ValidationConfig(share=share))
    assert (appended[:count] == by_share).all()
    assert abs(by_share.mean() - share) < 4 * (share * (1 - share) / count) ** 0.5 + 1 / count
    bounded = choose_held_out(count, ValidationConfig(share=share, rows=rows))
    assert bounded.sum() == (min(rows, by_share.sum()) if rows else by_share.sum())
    assert not (bounded & ~by_share).any()


def test_the_choice_of_rows_stays():
    # Raw bits of PCG64 are promised to stay: a later version resumes with the same rows held out.
    assert np.flatnonzero(choose_held_out(40, ValidationConfig(rows=5))).tolist() == [9, 15, 22, 30, 35]


def write_rows(path, count):
    lines = []
    for index in range(count):
        messages = [{"role": "user", "content": f"red{index}"}, {"role": "assistant", "content": "So</think>3"}]
        lines.append(json.dumps({"messages": messages, "id": f"{path.stem}{index}"}))
    path.write_text("\n".join(lines) + "\n")
    return SourceConfig(path=str(path))


def test_epochs_of_files_with_rows_held_out(model, tmp_path):
    sources = [write_rows(tmp_path / "a.jsonl", 30), write_rows(tmp_path / "b.jsonl", 13)]
    data = DataConfig(sources=sources, pack_tokens=60, max_prompt_tokens=40)
    validation = ValidationConfig(share=0.2)
    config = ColdStartConfig(
        run=RunConfig(dir=str(tmp_path / "run")),
        model=ModelConfig(path=str(model)),
        data=data,
        validation=validation,
        steps=0,
        epochs=3,
        packs_per_step=2,
    )
    packs, steps = open_packs(config, Processor(model, data), WORLD)
    held_out = {rows[index].id for _, rows in open_validation_sources(data, validation) for index in range(len(rows))}
    everything = {f"a{index}" for index in range(30)} | {f"b{index}" for index in range(13)}
    trained = Counter(itertools.chain(*(ids(next(packs)) for _ in range(steps))))
    assert 2 < len(held_out) < 20 and trained.keys() == everything - held_out
    assert set(trained.values()) <= {3, 4}  # the last step is filled up from the epoch after
    assert packs.trained_rows == len(trained) and steps == -(-3 * packs.epoch_steps // 1)
    stream, _ = open_packs(replace(config, steps=9), Processor(model, data), WORLD)
    drawn = set(itertools.chain(*(ids(next(stream)) for _ in range(9))))
    assert drawn and not drawn & held_out
    with pytest.raises(ConfigError, match=r"hold 30 of the 30 rows of .*a.jsonl out"):
        open_packs(replace(config, validation=ValidationConfig(rows=30)), Processor(model, data), WORLD)


def test_the_plan_knows_the_steps_of_epochs(model, tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 40)
    words = [f"run.dir={tmp_path / 'run'}", f"model.path={model}", "steps=0", "epochs=4", "packs_per_step=2"]
    words += [f"data.sources=[{{path: {source.path}, weight: 2}}]", "data.pack_tokens=60", "data.max_prompt_tokens=40"]
    options = Options(world=1, search=False)
    whole = plan(compose("tiny_cold_start", words), options)
    mean_tokens = whole["spans"][0]["mean_tokens"]
    assert whole["steps"] == -(-4 * 2 * 40 * mean_tokens // 120)
    assert whole["sources"][0]["epochs"] == pytest.approx(8, rel=0.05)
    part = plan(compose("tiny_cold_start", [*words, "validation.rows=20"]), options)
    assert part["steps"] == pytest.approx(whole["steps"] / 2, abs=1)
