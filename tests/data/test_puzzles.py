"""Generated problems: right answers, held-out ones apart, a function of the index alone."""

import re

import pytest

from ovr_megatron.config import ConfigError, SourceConfig
from ovr_megatron.data.fingerprints import fingerprint
from ovr_megatron.data.puzzles import open_puzzle
from ovr_megatron.data.schema import Row
from ovr_megatron.data.sources import open_source
from ovr_megatron.rewards.latex import last_box

TASKS = ("sum", "caption", "pick", "both")


def grid(row: Row) -> str:
    """The words of a grid, from the text form of a row."""
    return row.messages[0].text.split("\n")[0]


def asked(row: Row) -> str:
    found = re.search(r"Add the (\w+) digits", row.messages[0].text)
    assert found
    return found[1]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sums_are_right_and_the_asked_colour_occurs(split: str) -> None:
    source = open_puzzle(f"puzzle:digits?form=text&task=sum&split={split}")
    for i in range(500):
        row = source[i]
        digits = [int(word[-1]) for word in grid(row).split() if word[:-1] == asked(row)]
        assert digits and row.answer == str(sum(digits))
        assert last_box(row.response or "") == row.answer
        assert (row.response or "").count("</think>") == 1


def test_traces_verify_and_backtrack_sometimes() -> None:
    source = open_puzzle("puzzle:digits?form=text&task=sum")
    traces = [source[i].response or "" for i in range(1000)]
    assert 0.2 < sum("Let me check" in trace for trace in traces) / 1000 < 0.4
    assert 0.02 < sum("Wait" in trace for trace in traces) / 1000 < 0.2


def test_no_train_row_of_any_task_shows_a_held_out_grid() -> None:
    held_out = open_puzzle("puzzle:digits?form=text&task=sum&split=heldout&count=1000")
    grids = {grid(held_out[i]) for i in range(1000)}
    assert len(grids) == 1000
    for task in TASKS:
        train = open_puzzle(f"puzzle:digits?form=text&task={task}")
        assert not grids & {grid(train[i]) for i in range(3000)}


def test_both_forms_of_a_held_out_row_are_the_same_problem() -> None:
    text, image = (open_puzzle(f"puzzle:digits?form={form}&task=sum&split=heldout") for form in ("text", "image"))
    assert [text[i].answer for i in range(200)] == [image[i].answer for i in range(200)]
    assert len({fingerprint(image[i]) for i in range(600)}) == 600


@pytest.mark.parametrize("kind", ["digits?form=image", "shapes?form=image", "ordering", "countdown"])
def test_a_row_is_a_function_of_its_index(kind: str) -> None:
    a, b = open_puzzle(f"puzzle:{kind}"), open_puzzle(f"puzzle:{kind}")
    first = [fingerprint(a[i]) for i in (5, 3, 4)]
    assert first == [fingerprint(b[i]) for i in (5, 3, 4)]
    assert len(set(first)) == 3


@pytest.mark.parametrize("kind", ["shapes?form=text", "ordering", "countdown"])
def test_every_kind_boxes_its_answer(kind: str) -> None:
    source = open_puzzle(f"puzzle:{kind}")
    for i in range(200):
        row = source[i]
        assert row.answer and last_box(row.response or "") == row.answer


def test_prompt_rows_have_the_answer_and_no_response() -> None:
    row = open_puzzle("puzzle:digits?form=image&task=sum&answered=0")[0]
    assert row.is_prompt and row.answer and row.response is None


@pytest.mark.parametrize(
    ("path", "message"),
    [("chess", "no such kind"), ("digits?colour=1", "unknown"), ("digits?task=sing", "choose one of")],
)
def test_bad_names(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_source(SourceConfig(path=f"puzzle:{path}"))
