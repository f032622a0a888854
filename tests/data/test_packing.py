import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.data.best_fit import PackError
from ovr_megatron.data.pack_stream import CHUNK, PackStream
from ovr_megatron.data.packing import pack
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import ImagePart, Message, Row, RowError, TextPart
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime.balance import balance

PACK_TOKENS = 400


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    sizes = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)
    return Processor(make_tiny_model(tmp_path_factory.mktemp("model"), sizes=sizes), DataConfig(max_prompt_tokens=300))


def sample(tokens, targets, features=0):
    """A document whose last ``targets`` tokens are learnt and whose first ``features`` ones are an image's."""
    length = len(tokens)
    return Sample(
        tokens=np.array(tokens),
        loss_mask=np.arange(length) >= length - targets,
        position_ids=np.tile(np.arange(length), (3, 1)),
        patches=np.full((4 * features, 5), tokens[0], np.float32),
        grid_thw=np.array([[1, 2, 2 * features]] if features else [], np.int64).reshape(-1, 3),
        placement=np.arange(features),
        images=[],
        videos=[],
        prompt_tokens=[],
        row=Row(()),
    )


def test_a_pack_by_hand():
    found = pack(
        [
            sample([1, 2, 3, 4], targets=2),
            sample([5, 6], targets=2, features=1),
            sample([7, 8, 9], targets=1, features=2),
        ]
    )
    assert found.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    # 5 would be a target, but nothing in its document stands before it; nothing predicts across documents.
    assert found.labels.tolist() == [-100, 3, 4, -100, 6, -100, -100, 9, -100]
    assert found.cu_seqlens.tolist() == [0, 4, 6, 9]
    assert found.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]] * 3
    assert found.placement.tolist() == [4, 6, 7]
    assert found.patches[:, 0].tolist() == [5] * 4 + [7] * 8
    assert found.grid_thw.tolist() == [[1, 2, 2], [1, 2, 4]]
    kinds = (found.tokens, found.labels, found.position_ids, found.grid_thw, found.placement)
    assert all(tensor.dtype == torch.int64 for tensor in kinds)
    assert (found.cu_seqlens.dtype, found.patches.dtype) == (torch.int32, torch.float32)


def test_a_text_is_a_pack_without_images():
    found = pack([sample([1, 2, 3], targets=1)])
    assert found.patches.shape == (0, 5)
    assert found.grid_thw.shape == (0, 3)
    assert found.placement.shape == (0,)


def test_extras_stand_where_their_target_is_predicted():
    samples = [sample([1, 2, 3, 4], targets=2), sample([5, 6, 7], targets=1)]
    per_target = [{"returns": np.array([0.5, 0.25], np.float32)}, {"returns": np.array([2.0], np.float32)}]
    found = pack(samples, per_target)
    assert found.extras["returns"].tolist() == [0, 0.5, 0.25, 0, 0, 2.0, 0]
    assert found.extras["returns"].dtype == torch.float32
    assert (found.extras["returns"] != 0).tolist() == (found.labels != -100).tolist()
    per_token = [{"returns": np.arange(4.0)}, {"returns": np.arange(3.0)}]
    assert pack(samples, per_token).extras["returns"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    with pytest.raises(PackError, match="'returns' has 3 numbers for a sample of 4 tokens and 2 targets"):
        pack(samples, [{"returns": np.zeros(3)}, {"returns": np.zeros(1)}])


def test_no_sample_is_no_pack():
    with pytest.raises(PackError, match="at least one sample"):
        pack([])


class Rows:
    """An endless stream of short rows, some with an image, every ninth too long for a prompt."""

    def __init__(self, text="red3 "):
        self.next, self.text = 0, text

    def __next__(self):
        number, self.next = self.next, self.next + 1
        draw = np.random.default_rng(number)
        text = TextPart(f"{number} " + self.text * (900 if number % 9 == 8 else int(draw.integers(1, 40))))
        image = ImagePart(image=PIL.Image.fromarray(draw.integers(0, 256, (56, 56, 3), np.uint8)))
        parts = (image, text) if number % 3 == 0 else (text,)
        reply = Message("assistant", (TextPart(f"So</think>{number}"),))
        return Row((Message("user", parts), reply), where=f"rows:{number}")

    def state(self):
        return {"next": self.next}

    def load(self, state):
        self.next = state["next"]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(first, second, strict=True)
        for name in ("tokens", "labels", "position_ids", "cu_seqlens", "patches", "grid_thw", "placement")
    )


def test_a_stream_packs_every_row_that_fits_once(processor):
    stream = PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=3)
    steps = [next(stream) for _ in range(12)]
    texts = [
        processor.decode(tokens)
        for step in steps
        for p in step
        for tokens in torch.tensor_split(p.tokens, p.cu_seqlens[1:-1].long())
    ]
    found = sorted(int(text.rpartition("</think>")[2]) for text in texts)
    assert len(found) == len(set(found))
    complete = [number for number in range(found[-1]) if number % 9 != 8]
    assert len(set(complete) - set(found)) < 60  # what still waits
    assert complete[: len(found) // 2] == found[: len(found) // 2]  # nothing waits for long
    assert all(len(p.tokens) <= PACK_TOKENS for step in steps for p in step)
    assert stream.fill > 0.9
    assert stream.dropped > 0


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_stream_resumes_exactly(processor, steps):
    stream = PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=2)
    for _ in range(steps):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    resumed = PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=2)
    resumed.load(state)
    assert resumed.state() == state
    for _ in range(6):
        assert same(next(stream), next(resumed))
    assert (stream.dropped, stream.state()) == (resumed.dropped, resumed.state())


def test_a_state_stays_small_however_long_the_run(processor):
    stream = PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=2)
    for _ in range(40):
        next(stream)
    state = stream.state()
    assert state["drawn"] <= 4 * CHUNK
    assert state["rows"]["next"] > 4 * CHUNK


def test_replicas_share_the_packs_of_one_plan(processor):
    whole = PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=4)
    replicas = [PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=4, dp_rank=r, dp_size=2) for r in range(2)]
    for _ in range(3):
        packs, shares = next(whole), [next(replica) for replica in replicas]
        costs = [int(np.square(np.diff(p.cu_seqlens)).sum()) for p in packs]
        for replica, numbers in enumerate(balance(costs, 2, equal_counts=True)):
            assert same([packs[number] for number in numbers], shares[replica])
    assert replicas[0].state() == replicas[1].state() == whole.state()


def test_only_the_own_rows_pixels_are_processed(processor, monkeypatch):
    encoded = []
    encode = processor.encode
    monkeypatch.setattr(processor, "encode", lambda rows, generation: encoded.extend(rows) or encode(rows, generation))
    share = next(PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=4, dp_rank=1, dp_size=4))
    assert len(encoded) == sum(len(p.cu_seqlens) - 1 for p in share)


def test_a_stream_in_which_nothing_fits_stops(processor, monkeypatch):
    monkeypatch.setattr("ovr_megatron.data.pack_stream.BARREN", 2)
    stream = PackStream(Rows(), processor, pack_tokens=20, packs_per_step=1)
    with pytest.raises(
        TooLongError,
        match=rf"rows:127: messages: has \d+ tokens, more than data.pack_tokens=20; .* with {2 * CHUNK} rows in a row",
    ):
        next(stream)


def test_packs_that_cannot_be_shared_are_refused(processor):
    with pytest.raises(ConfigError, match="packs_per_step=6 cannot be shared by 4 data-parallel replicas"):
        PackStream(Rows(), processor, PACK_TOKENS, packs_per_step=6, dp_size=4)


class BadRows(Rows):
    """Every fifth row names an image that is not there."""

    def __next__(self):
        row = super().__next__()
        if self.next % 5:
            return row
        absent = ImagePart(path=Path("/nowhere/absent.png"), where=row.where, root=Path("/nowhere"))
        return replace(row, messages=(Message("user", (absent,)), row.messages[-1]))


def test_bad_and_long_rows_are_left_out_and_listed_where_there_is_a_list(processor, tmp_path):
    with pytest.raises(RowError, match=r"rows:4: image: .*absent.png"):
        next(PackStream(BadRows(), processor, PACK_TOKENS, packs_per_step=2))
    listed = SkippedRows(tmp_path / "skipped.jsonl")
    stream = PackStream(BadRows(), processor, PACK_TOKENS, packs_per_step=2, skipped=listed)
    next(stream)
    state = stream.state()
    following = [next(stream) for _ in range(4)]
    bad = [number for number in range(stream._stream.next) if number % 5 == 4 or number % 9 == 8]
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(int(line["where"].removeprefix("rows:")) for line in lines) == bad
    assert stream.dropped == listed.count == len(bad)
    resumed = PackStream(BadRows(), processor, PACK_TOKENS, packs_per_step=2, skipped=SkippedRows())
    resumed.load(state)
    assert all(same(next(resumed), step) for step in following)
    assert resumed.dropped == stream.dropped
