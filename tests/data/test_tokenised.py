import dataclasses
import hashlib
import json
import shutil
import zlib

import numpy as np
import pytest
import torch

from ovr_megatron.config import ConfigError, DataConfig, SourceConfig
from ovr_megatron.data.packing import pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.tokenised import (
    MANIFEST,
    RECORD,
    SAMPLES,
    TOKENS,
    TokenisedSet,
    read_tokenised_manifest,
    verify_tokenised,
)
from ovr_megatron.data.tokenised_writer import Texts, TokenisedWriter
from ovr_megatron.data.tokenising import tokenise
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)
BAD = '{"messages": "none"}'


def row(number, words):
    answer = f"So {number}</think>\\boxed{{{number}}}"
    return json.dumps(
        {"messages": [{"role": "user", "content": "red3 " * words}, {"role": "assistant", "content": answer}]}
    )


def image_row():
    parts = [{"type": "image", "image": "absent.png"}, {"type": "text", "text": "How many?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "3"}]})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), sizes=SIZES)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    (folder / "a.jsonl").write_text("\n".join(row(i, 1 + i % 9) for i in range(600)))
    (folder / "b.jsonl").write_text("\n".join(row(i, 3) for i in range(5)))
    sources = [SourceConfig(path=str(folder / "a.jsonl"), weight=0.5), SourceConfig(path=str(folder / "b.jsonl"))]
    return DataConfig(sources=sources, pack_tokens=200)


@pytest.fixture(scope="module")
def processor(model, config):
    return Processor(model, config)


@pytest.fixture(scope="module")
def written(model, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenised") / "set"
    tokenise(config, model, folder)
    return folder


def changed(written, tmp_path, name, change):
    folder = shutil.copytree(written, tmp_path / "changed")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return folder


def test_token_past_the_vocabulary_is_named_before_it_is_trained(written, processor, model, config, tmp_path):
    copy = shutil.copytree(written, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    vocab = processor.shape.vocab
    (copy / "manifest.json").write_text(json.dumps({**manifest, "largest_token": vocab}))
    with pytest.raises(ConfigError, match=f"holds token {vocab}, and the model's vocabulary ends at {vocab}"):
        TokenisedSet(copy, processor)
    # a set of the time before, whose manifest does not say it
    manifest.pop("largest_token")
    tokens = np.fromfile(copy / "tokens.bin", "<u4")
    records = np.fromfile(copy / "samples.bin", RECORD)
    tokens[0] = vocab + 7
    tokens.tofile(copy / "tokens.bin")
    records["crc32"][0] = zlib.crc32(tokens[: records["length"][0]].data)
    records.tofile(copy / "samples.bin")
    manifest["files"]["samples.bin"]["sha256"] = hashlib.sha256(records.tobytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=f"holds token {vocab + 7}"):
        TokenisedSet(copy, processor)[0]


def test_samples_are_those_of_the_rows(written, processor, config):
    tokenised = TokenisedSet(written, processor)
    rows = [source[i] for source in map(open_source, config.sources) for i in range(len(source))]
    assert len(tokenised) == len(rows) == 605
    picked = [0, 1, 255, 256, 599, 600, 604]
    samples = processor.encode([rows[i] for i in picked], generation=False)
    for index, expected in zip(picked, samples, strict=True):
        found = tokenised[index]
        for item in dataclasses.fields(expected):
            one, two = getattr(found, item.name), getattr(expected, item.name)
            if isinstance(two, np.ndarray):
                assert one.dtype == two.dtype and one.shape == two.shape and (one == two).all(), item.name
            elif item.name != "row":
                assert one == two, item.name
    packs = [pack([tokenised[i] for i in picked]), pack(samples)]
    assert all(
        torch.equal(getattr(packs[0], item.name), getattr(packs[1], item.name))
        for item in dataclasses.fields(packs[0])
        if isinstance(getattr(packs[0], item.name), torch.Tensor)
    )
    path = config.sources[1].path
    assert (tokenised[604].row.where, tokenised[604].row.source) == (f"{path}[4]", "b")
    with pytest.raises(IndexError):
        tokenised[605]


def test_the_manifest_says_what_is_in_the_set(written, processor):
    manifest, tokenised = verify_tokenised(written), TokenisedSet(written, processor)
    assert [(s.name, s.weight, s.samples) for s in manifest.sources] == [("a", 0.5, 600), ("b", 1.0, 5)]
    assert [s.tokens for s in manifest.sources] == [
        int(tokenised.lengths[tokenised.sources == k].sum()) for k in (0, 1)
    ]
    assert (manifest.tokenisation.end_token, manifest.tokenisation.template) == (processor.end_token, "think")
    assert manifest == tokenised.manifest


def test_what_stands_between_replies_is_no_target_in_a_set_either(model, processor, tmp_path):
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "red3"), ("assistant", "So</think>3"), ("user", "red4"), ("assistant", "So</think>4"),
    )]  # fmt: skip
    rows = [turns, turns[:2], [*turns[:2], turns[2], {**turns[3], "weight": 0}], [{**t, "weight": 1} for t in turns]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    config = DataConfig(sources=[SourceConfig(path=str(path))], pack_tokens=200)
    manifest = tokenise(config, model, tmp_path / "set")
    assert (manifest.sources[0].replies, manifest.sources[0].learned) == (7, 6)
    tokenised, source = TokenisedSet(tmp_path / "set", processor), open_source(config.sources[0])
    for i in range(4):
        [sample] = processor.encode([source[i]], generation=False)
        assert tokenised[i].tokens.tolist() == sample.tokens.tolist()
        assert tokenised[i].loss_mask.tolist() == sample.loss_mask.tolist()
    edges = [int((np.diff(tokenised[i].loss_mask.astype(int)) == 1).sum()) for i in range(4)]
    assert edges == [2, 1, 1, 2]
    last = tokenise(dataclasses.replace(config, learn="last"), model, tmp_path / "last")
    assert (last.sources[0].replies, last.sources[0].learned) == (7, 4)


DAMAGE = [
    (TOKENS, lambda data: data[:-4], r"tokens.bin: has \d+ bytes instead of \d+; copy the set again"),
    (SAMPLES, lambda data: data[:-32], r"samples.bin: has \d+ bytes instead of \d+"),
    (SAMPLES, lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], r"samples.bin: was changed"),
    (MANIFEST, lambda data: data[:-20], r"manifest.json: is not JSON"),
    (MANIFEST, lambda data: data.replace(b'"format": 1', b'"format": 2'), r"manifest.json: format: is not 1"),
    (
        MANIFEST,
        lambda data: data.replace(b'"weight"', b'"weihgt"'),
        r"manifest.json: lacks a field or has one too many",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE)
def test_a_damaged_set_is_refused_when_it_is_opened(written, processor, tmp_path, name, change, message):
    with pytest.raises(RowError, match=message):
        TokenisedSet(changed(written, tmp_path, name, change), processor)


def test_a_changed_token_is_found_where_it_is_read(written, processor, tmp_path):
    at = 4 * int(TokenisedSet(written, processor).lengths[:7].sum())
    folder = changed(written, tmp_path, TOKENS, lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    tokenised = TokenisedSet(folder, processor)
    assert len(tokenised[6]) and len(tokenised[8])
    with pytest.raises(RowError, match=r"tokens.bin: the tokens of sample 7 \(.*a.jsonl\[7\]\) were changed"):
        tokenised[7]
    with pytest.raises(RowError, match=r"tokens.bin: was changed"):
        verify_tokenised(folder)


def test_another_tokenizer_or_template_is_refused(written, model, config, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    merge = tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert merge
    with pytest.raises(ConfigError, match=r"was written with tokenizer .*; choose the model and template"):
        TokenisedSet(written, Processor(other, config))
    with pytest.raises(ConfigError, match=r"was written with template think, model\.path and data.template give model"):
        TokenisedSet(written, Processor(model, dataclasses.replace(config, template="model")))
    TokenisedSet(written, Processor(shutil.copytree(model, tmp_path / "moved"), config))


def test_a_folder_that_is_no_set_is_refused(model, processor, config, written, tmp_path):
    with pytest.raises(RowError, match=r"manifest.json: does not exist; name a folder that ovr tokenise wrote"):
        TokenisedSet(tmp_path, processor)
    with pytest.raises(ConfigError, match="exists already"):
        tokenise(config, model, written)


def bad_config(tmp_path, on_error, *lines):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([row(0, 1), *lines, row(1, 1)]))
    return DataConfig(sources=[SourceConfig(path=str(path))], pack_tokens=100, on_error=on_error)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (BAD, r"bad.jsonl:2: messages: "),
        ("{", r"bad.jsonl:2: is not JSON"),
        (image_row(), r"bad.jsonl:2: messages\[0\].content: has an image or a video"),
        (row(2, 200), r"bad.jsonl:2: messages: the row takes \d+ tokens, more than data.pack_tokens=100"),
    ],
)
def test_a_bad_row_stops_the_writing_and_leaves_nothing(model, tmp_path, line, message):
    with pytest.raises(RowError, match=message):
        tokenise(bad_config(tmp_path, "stop", line), model, tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_bad_rows_are_skipped_counted_and_listed(model, tmp_path):
    config = bad_config(tmp_path, "skip", BAD, row(2, 200), image_row())
    manifest = tokenise(config, model, tmp_path / "set")
    assert (manifest.sources[0].samples, manifest.sources[0].skipped) == (2, 3)
    lines = [json.loads(line) for line in (tmp_path / "set/skipped.jsonl").read_text().splitlines()]
    assert sorted(line["where"].rpartition(":")[2] for line in lines) == ["2", "3", "4"]
    tokenised = TokenisedSet(tmp_path / "set", Processor(model, config))
    assert [tokenised.where(i).rpartition("[")[2] for i in range(2)] == ["0]", "4]"]


def test_nothing_usable_and_endless_sources_are_refused(model, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(BAD)
    config = DataConfig(sources=[SourceConfig(path=str(path))], on_error="skip")
    with pytest.raises(ConfigError, match="no row of 1 sources can be used"):
        tokenise(config, model, tmp_path / "set")
    assert not (tmp_path / "set").exists()
    with pytest.raises(ConfigError, match="puzzle:digits is endless"):
        tokenise(DataConfig(sources=[SourceConfig(path="puzzle:digits")]), model, tmp_path / "set")
    with pytest.raises(ConfigError, match=r"data.sources is empty"):
        tokenise(DataConfig(), model, tmp_path / "set")


def test_an_interrupted_writing_looks_like_nothing_and_is_begun_anew(processor, tmp_path):
    texts = Texts(np.arange(6), np.array([4, 2]), np.array([1, 1]), np.array([0, 1]))
    interrupted = TokenisedWriter(tmp_path / "set", processor)  # as after kill -9: neither finished nor closed
    interrupted.begin_source("a", "a.jsonl", 1.0)
    interrupted.add(texts)
    assert not (tmp_path / "set").exists()
    with pytest.raises(RowError, match="does not exist"):
        read_tokenised_manifest(tmp_path / ".set.partial")
    with TokenisedWriter(tmp_path / "set", processor) as writer:
        writer.begin_source("a", "a.jsonl", 1.0)
        writer.add(texts)
    assert TokenisedSet(tmp_path / "set", processor)[1].tokens.tolist() == [4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
