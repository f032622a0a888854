"""Rows with a misprinted digit and their sum: solved again from what they show."""

import itertools
import re
from random import Random

import numpy as np
import pytest
from PIL import Image

from ovr_megatron.data.puzzle_grids import CELL, render
from ovr_megatron.data.puzzles import open_puzzle
from ovr_megatron.data.schema import ImagePart, Row

GREY = 118


def rows(query: str, count: int) -> list[Row]:
    source = open_puzzle(f"puzzle:checksum?{query}")
    return [source[index] for index in range(count)]


def readings(row: Row) -> tuple[list[tuple[int, ...]], int]:
    """Every reading of the row of a textual puzzle, the likeliest first, and the sum that it shows."""
    line = row.messages[0].text.splitlines()[0]
    words, total = line.split(" = ")
    digits = [[int(digit) for digit in word.split("/")] for word in words.split()]
    return list(itertools.product(*digits)), int(total)


def join(digits: tuple[int, ...]) -> str:
    return "+".join(map(str, digits))


@pytest.mark.parametrize("parameters", ["", "&cols=5", "&cols=2&high=3", "&trace=direct"])
def test_the_sum_fits_one_of_the_two_readings(parameters: str) -> None:
    for row in rows(f"form=text{parameters}", 300):
        both, total = readings(row)
        (right,) = [reading for reading in both if sum(reading) == total]
        assert len(both) == 2
        assert row.answer == "".join(map(str, right))
        assert row.response is not None and row.response.endswith(f"So</think>\\boxed{{{row.answer}}}")


def test_a_trace_reads_adds_compares_and_reads_again_where_the_sums_differ() -> None:
    for row in rows("form=text", 400):
        (first, second), total = readings(row)
        steps = f"I read: {join(first)}={sum(first)}. Let me check. I read: sum {total}. {total}-{sum(first)}="
        if sum(first) == total:
            steps += "0. Match. "
        else:
            steps += f"{total - sum(first)}. No match. "
            steps += f"Wait, I read again: {join(second)}={total}. {total}-{total}=0. Match. "
        assert row.response == f"{steps}So</think>\\boxed{{{row.answer}}}"


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_direct_traces_are_of_the_same_rows_and_answers_without_a_check(split: str) -> None:
    direct = rows(f"form=text&trace=direct&split={split}", 300)
    checked = rows(f"form=text&trace=check&split={split}", 300)
    for row, twin in zip(direct, checked, strict=True):
        both, total = readings(row)
        (right,) = [reading for reading in both if sum(reading) == total]
        assert row.response == f"I read: {join(right)}={total}. So</think>\\boxed{{{row.answer}}}"
        assert row.messages[0] == twin.messages[0] and row.answer == twin.answer


@pytest.mark.parametrize("misread", [0.0, 0.3, 1.0])
def test_the_likelier_reading_is_wrong_as_often_as_it_should_be(misread: float) -> None:
    wrong = []
    for row in rows(f"form=text&misread={misread}", 2000):
        (first, _), total = readings(row)
        wrong.append(sum(first) != total)
    assert abs(np.mean(wrong) - misread) < 0.035
    held_out = []
    for row in rows(f"form=text&misread={misread}&split=heldout", 1000):
        (first, _), total = readings(row)
        held_out.append(sum(first) != total)
    assert abs(np.mean(held_out) - misread) < 0.05, "distinct problems are not more often misread"


def test_teaching_tasks_say_steps_and_check_nothing() -> None:
    for row in rows("form=text&task=caption", 100):
        assert row.response == f"I read: {join(readings(row)[0][0])}."
    for row in rows("form=text&task=again", 100):
        (first, second), _ = readings(row)
        assert row.messages[0].text.endswith(f"\nNot {join(first)}.")
        assert row.response == f"I read again: {join(second)}."
    for row in rows("form=text&task=total", 100):
        assert row.response == f"I read: sum {readings(row)[1]}."
    for row in rows("form=text&task=pair", 100):
        (first, _), total = readings(row)
        assert row.response == f"I read: {join(first)}={sum(first)}. I read: sum {total}."
    for row in rows("form=text&task=twice", 100):
        first, second = (f"{join(reading)}={sum(reading)}" for reading in readings(row)[0])
        assert row.response == f"I read: {first}. I read again: {second}."
    for row in rows("form=text&task=guess", 100):
        first = readings(row)[0][0]
        boxed = "".join(map(str, first))
        assert row.response == f"I read: {join(first)}={sum(first)}. So</think>\\boxed{{{boxed}}}"
    verdicts = []
    for row in rows("task=compare&misread=0.5", 400):
        both = re.fullmatch(r"Compare (\d+) and (\d+)\.", row.messages[0].text)
        assert both is not None
        difference = int(both[2]) - int(both[1])
        verdicts.append("No match." if difference else "Match.")
        assert row.response == f"{both[2]}-{both[1]}={difference}. {verdicts[-1]}"
    assert 150 < verdicts.count("Match.") < 250
    for row in rows("task=arith", 100):
        terms = row.messages[0].text.removeprefix("Add ").removesuffix(".")
        assert row.response == f"{terms}={sum(map(int, terms.split('+')))}."
    for row in rows("task=box", 100):
        assert row.messages[0].text == f"Box {row.answer}."
        assert row.response == f"So</think>\\boxed{{{row.answer}}}"


@pytest.mark.parametrize("task", ["number", "guess", "caption", "again", "total", "pair", "twice"])
def test_picture_and_text_are_twins_that_differ_in_the_verb(task: str) -> None:
    shown = rows(f"task={task}&split=heldout", 200)
    written = rows(f"form=text&task={task}&split=heldout", 200)
    for image, text in zip(shown, written, strict=True):
        assert image.answer is not None and text.answer is not None and text.response is not None
        assert image.answer == text.answer.replace("read", "look")
        assert image.response == re.sub(r"\bread\b", "look", text.response)
        assert image.messages[0].text == "\n" + text.messages[0].text.splitlines()[1]


def picture(row: Row) -> Image.Image:
    part = row.messages[0].parts[0]
    assert isinstance(part, ImagePart) and part.image is not None
    return part.image


@pytest.mark.parametrize(("high", "sum_cells"), [(9, 2), (5, 2), (3, 1)])
def test_a_picture_has_white_digits_and_a_green_sum(high: int, sum_cells: int) -> None:
    for image, text in zip(rows(f"high={high}", 100), rows(f"form=text&high={high}", 100), strict=True):
        pixels = np.asarray(picture(image), dtype=int)
        words = text.messages[0].text.splitlines()[0].split(" = ")
        figures = [*words[0].split(), *words[1].rjust(sum_cells)]
        assert pixels.shape == (CELL, len(figures) * CELL, 3)
        for index, figure in enumerate(figures):
            # Jitter is 2 pixels at most, and figures have no ink within 2 pixels of their cell's edges.
            cell = pixels[:, index * CELL : (index + 1) * CELL].reshape(-1, 3)
            contrast = np.abs(cell - GREY).max(1)
            if figure == " ":
                assert contrast.max() == 0
                continue
            brightest = cell[contrast > 0.9 * contrast.max()].mean(0)
            assert (brightest[1] > brightest[0] + 80) == (index >= len(figures) - sum_cells)


def test_a_misprint_shows_one_digit_in_yellow_and_the_other_in_blue() -> None:
    for first, second in itertools.permutations("123456789", 2):
        single = {}
        for figure in (first, second, f"{first}/{second}"):
            single[figure] = np.asarray(render((("white", figure),), 1, Random(1)))
        misprint = single[f"{first}/{second}"]
        assert (misprint[..., :2] == single[first][..., :2]).all()
        assert (misprint[..., 2] == single[second][..., 2]).all()
        assert (misprint[..., 2] != single[first][..., 2]).sum() > 20


def test_a_misprint_leaves_its_neighbours_as_they_are() -> None:
    for seed in range(20):
        row = np.asarray(render((("white", "8"), ("white", "3/4"), ("white", "8")), 3, Random(seed)))
        clean = np.asarray(render((("white", "8"), ("white", "3"), ("white", "8")), 3, Random(seed)))
        changed = np.argwhere((row != clean).any(-1))
        assert changed[:, 1].min() >= CELL and changed[:, 1].max() < 2 * CELL
