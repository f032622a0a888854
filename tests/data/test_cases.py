"""Rows in the forms that people have them, each read whole or refused by name; the inputs lie in ``cases/``."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pytest

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import ImagePart, Row, RowError, TextPart, VideoPart
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.stream import RowStream, open_stream
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.ppo.prompts import PromptStream

CASES = Path(__file__).with_name("cases")
SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=32, vision_ffn=32)
BOX = "\nPut your final answer in \\boxed{}."
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), sizes=SIZES)


def read(name: str, **settings: str) -> list[Row]:
    source = open_source(SourceConfig(path=str(CASES / name), **settings))
    return [source[i] for i in range(len(source))]


def shape(row: Row) -> list[str]:
    """The parts of the user's messages; a medium by its kind."""
    parts = [part for message in row.messages if message.role == "user" for part in message.parts]
    names = {ImagePart: "IMAGE", VideoPart: "VIDEO"}
    return [part.text if isinstance(part, TextPart) else names[type(part)] for part in parts]


LETTERS = "\n(A) left\n(B) right\nPut the letter of the right option in \\boxed{}."


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("easyr1-geo3k/train.parquet", ["IMAGE", f"Find the width of bar 0.{BOX}"]),
        ("swift-messages-images/sft.jsonl", ["IMAGE", "What is red in picture 0?"]),
        ("swift-messages-images/grpo_answer.jsonl", ["IMAGE", "What is red in picture 0? \\boxed{}"]),
        ("swift-messages-images/grpo_solution.jsonl", ["IMAGE", "What is red in picture 0?"]),
        ("lost-columns/messages_image.jsonl", ["IMAGE", "What is red?"]),
        ("lost-columns/verl_image_singular.jsonl", ["IMAGE", "What is red?"]),
        ("lost-columns/orz_image.jsonl", ["IMAGE", f"What is red?{BOX}"]),
        ("lost-columns/scienceqa.parquet", ["IMAGE", f"Which part of the picture is red?{LETTERS}"]),
        ("lost-columns/automodel.json", ["IMAGE", "\nDescribe first. ", "IMAGE", "\nNow second."]),
    ],
)
def test_the_pictures_of_a_column_stand_where_their_marks_are(name: str, first: list[str]) -> None:
    rows = read(name)
    assert shape(rows[0]) == first
    assert not any("<image>" in text for row in rows for text in shape(row))
    colours = [load_media(row, DataConfig())[0][0].tobytes() for row in rows]
    if name.startswith(("easyr1", "swift")):  # each row has the picture of its own number
        pictures = [load_media(row, DataConfig())[0][0].tobytes() for row in read("swift-messages-images/sft.jsonl")]
        assert colours == pictures and len(set(pictures)) == 3
        assert len({row.answer for row in rows}) == (3 if name.startswith("easyr1") else 1)


def test_paths_of_pictures_are_bounded_by_the_root() -> None:
    rows = read("easyr1-geo3k/jsonl/rows.jsonl")
    assert shape(rows[0]) == ["IMAGE", f"Find the width of bar 0.{BOX}"]
    with pytest.raises(RowError, match=r"rows.jsonl:1: images\[0\]: .* outside the image root .*set image_root"):
        load_media(rows[0], DataConfig())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost-columns/messages_videos.jsonl", r"messages_videos.jsonl:1: videos\[0\]: video '.*a.mp4' does not exist"),
        ("lost-columns/llava_video_mark.json", r"mark.json\[0\]: video\[0\]: video '.*a.mp4' does not exist"),
        ("lost-columns/llava_video_image_mark.json", r"mark.json\[0\]: video\[0\]: video '.*a.mp4' does not exist"),
        ("lost-columns/messages_audios.jsonl", r"messages_audios.jsonl:1: audios: holds .*'a.wav'"),
        ("lost-columns/problem_image_path.jsonl", r"problem_image_path.jsonl:1: image_path: holds .*column 'images'"),
        ("traces/s1k.jsonl", r"s1k.jsonl:1: row: has only the fields answer, attempt, question, thinking_traj"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read(name)


ADD = "Add</think>\\boxed{6}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("traces/alpaca.jsonl", ADD),
        ("traces/query_response.jsonl", ADD),
        ("traces/prompt_response.jsonl", ADD),
        ("traces/answer_tags.jsonl", ADD),
        ("traces/leading_newline.jsonl", "\n</think>\n\n\\boxed{6}"),
        ("traces/reasoning_content.jsonl", "Add 3 and 3.\n</think>\n\n\\boxed{6}"),
        ("traces/openr1.parquet", "Add.\n</think>\n\n\\boxed{0}"),
        (
            "traces/openthoughts114k.parquet",
            "Add 0 and 0. Wait, check it.\n</think>\n\nIt is \\(\\boxed{0}\\).",
        ),
    ],
)
def test_a_trace_is_learned_after_the_one_opened_thought(model: Path, name: str, expected: str) -> None:
    processor = Processor(model, DataConfig())
    sample = processor.encode([read(name)[0]], generation=False)[0]
    text = processor.decode(sample.tokens, skip_special_tokens=False)
    prompt, _, response = text.rpartition("<|im_start|>assistant\n<think>\n")
    assert response == f"{expected}<|im_end|>"
    assert processor.decode(sample.tokens[sample.loss_mask], skip_special_tokens=False) == response
    assert (text.count("<think>"), text.count("</think>")) == ((2, 2) if "openthoughts" in name else (1, 1))
    assert ("<|begin_of_thought|>" in text, "What is" in prompt) == (False, True)


def test_a_system_message_asks_for_the_marks_that_the_trace_has(model: Path) -> None:
    processor = Processor(model, DataConfig())
    row = read("traces/openthoughts114k.parquet")[0]
    text = processor.decode(processor.encode([row], generation=True)[0].tokens, skip_special_tokens=False)
    asked = "Your role is to explore questions. Structure: <think> {thought} </think> {solution} "
    assert text.startswith(f"<|im_start|>system\n{asked}<|im_end|>\n")


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("traces/trl_prompt_answer.jsonl", ["6"]),
        ("traces/problem_answer_number.jsonl", ["6", "6.5"]),
        ("traces/eval.json", ["81"]),
        ("swift-messages-images/grpo_solution.jsonl", ["3", "3", "3"]),
    ],
)
def test_prompts_of_other_forms_have_their_answers(name: str, answers: list[str]) -> None:
    rows = read(name)
    assert [row.answer for row in rows] == answers
    assert all(row.is_prompt for row in rows)


@pytest.mark.parametrize(
    ("name", "limits", "problem", "used"),
    [
        ("three_images.jsonl", {"max_images": 2}, "3 images, more than data.max_images=2", {2}),
        ("video.jsonl", {"max_frames": 2}, "3 frames in a video, more than data.max_frames=2", {2}),
        ("half_long.jsonl", {"max_prompt_tokens": 100}, "tokens, more than data.max_prompt_tokens=100", {2}),
    ],
)
def test_rl_leaves_out_and_lists_what_it_cannot_use(
    model: Path, tmp_path: Path, name: str, limits: dict[str, int], problem: str, used: set[int]
) -> None:
    path = CASES / "rl-rows" / name
    config = DataConfig(sources=[SourceConfig(path=str(path))], on_error="skip", **limits)
    processor, listed = Processor(model, config), SkippedRows(tmp_path / "data" / "skipped.jsonl")
    prompts = PromptStream(open_stream(config, 1, listed), processor, {}, listed)
    rows = prompts.draw(8)
    lines = [json.loads(line) for line in (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()]
    bad = {line["where"] for line in lines}
    assert {row.where for row in rows}.isdisjoint(bad) and len(rows) == 8
    assert all(problem in line["problem"] for line in lines)
    assert listed.count == len(lines) == len(open_source(config.sources[0])) - len({row.where for row in rows})
    assert prompts.dropped >= len(lines) > 0


def test_rl_stops_at_a_row_that_it_cannot_use_by_default(model: Path) -> None:
    config = DataConfig(sources=[SourceConfig(path=str(CASES / "rl-rows/three_images.jsonl"))], max_images=2)
    prompts = PromptStream(open_stream(config, 1), Processor(model, config), {})
    with pytest.raises(RowError, match=r"three_images.jsonl:1: messages: 3 images, more than data.max_images=2"):
        prompts.draw(4)


def test_rl_says_what_all_of_its_prompts_lack(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovr_megatron.ppo.prompts.MOST_DROPPED", 8)
    config = DataConfig(
        sources=[SourceConfig(path=str(CASES / "rl-rows/long.jsonl"))], max_prompt_tokens=100, on_error="skip"
    )
    prompts = PromptStream(open_stream(config, 1, SkippedRows()), Processor(model, config), {}, SkippedRows())
    with pytest.raises(RowError, match=r"more than data.max_prompt_tokens=100; so it is with 8 prompts in a row"):
        prompts.draw(8)


def test_rl_leaves_out_damaged_pictures_answers_and_lines(model: Path, tmp_path: Path) -> None:
    picture = (CASES / "rl-rows/img/0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(picture[: len(picture) // 2])  # sound up to its pixels
    asked = {"role": "user", "content": "1?"}
    rows = [
        {"messages": [{**asked, "content": [{"type": "image", "image": "cut.png"}]}], "answer": "1"},
        {"messages": [asked], "answer": "Proof. It holds by induction."},
        {"messages": [asked], "answer": "1"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("{not JSON\n" + "".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(sources=[SourceConfig(path=str(path))], on_error="skip")
    listed = SkippedRows(tmp_path / "skipped.jsonl")
    prompts = PromptStream(open_stream(config, 1, listed), Processor(model, config), {}, listed)
    assert Counter(row.where for row in prompts.draw(4)) == {f"{path}:4": 4}
    fields = {json.loads(line)["where"]: json.loads(line)["field"] for line in (tmp_path / "skipped.jsonl").open()}
    assert fields == {f"{path}:1": "", f"{path}:2": "messages[0].content[0].image", f"{path}:3": "answer"}


def test_prompts_that_mix_pictures_and_texts_are_all_drawn(model: Path) -> None:
    config = DataConfig(sources=[SourceConfig(path=str(CASES / "rl-rows/mixed.jsonl"))])
    prompts = PromptStream(open_stream(config, 1), Processor(model, config), {})
    assert Counter(next(iter(shape(row))) for row in prompts.draw(4))["IMAGE"] == 2
    single = DataConfig(sources=[SourceConfig(path=str(CASES / "rl-rows/one_row.jsonl"))])
    assert len(list(islice(RowStream([(open_source(single.sources[0]), 1.0)], 1), 3))) == 3
