"""Generated problems: solved again from what they say, split, repeatable, fast."""

import itertools
import re
import subprocess
import sys
import time
from collections import Counter
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovr_megatron.config import ConfigError
from ovr_megatron.data.fingerprints import fingerprint
from ovr_megatron.data.puzzle_grids import COLOURS, render
from ovr_megatron.data.puzzle_kind import Kind, Puzzle
from ovr_megatron.data.puzzles import KINDS, PuzzleSource, is_held_out, open_puzzle
from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import ENDLESS, ImagePart, Row

TASKS = ("sum", "caption", "pick", "both", "arith", "box")
SOURCES = [f"digits?task={task}" for task in TASKS] + ["shapes", "shapes?rows=3", "ordering", "countdown"]
CHECKSUM_TASKS = ("number", "guess", "caption", "again", "total", "pair", "twice", "arith", "compare", "box")
CHECKSUMS = [f"checksum?task={task}" for task in CHECKSUM_TASKS]
PAINTED = [*SOURCES[:8], *CHECKSUMS]
FORMS = [f"{kind}{'&' if '?' in kind else '?'}form={form}" for kind in PAINTED for form in ("text", "image")]
EVERY = FORMS + SOURCES[8:]


def puzzle(query: str) -> PuzzleSource:
    return open_puzzle(f"puzzle:{query}")


def rows(query: str, count: int, start: int = 0) -> list[Row]:
    source = puzzle(query)
    return [source[i] for i in range(start, start + count)]


def said(row: Row) -> str:
    return row.messages[0].text


def grid(text: str) -> list[tuple[str, int]]:
    return [(colour, int(digit)) for colour, digit in re.findall(r"(red|green|blue|white)(\d)", text)]


def picture(row: Row) -> Image.Image:
    part = row.messages[0].parts[0]
    assert isinstance(part, ImagePart) and part.image is not None
    return part.image


def response(row: Row) -> str:
    assert row.response is not None
    return row.response


@pytest.mark.parametrize("query", EVERY)
def test_a_row_is_a_function_of_its_number(query: str) -> None:
    source = puzzle(query)
    assert len(source) == ENDLESS
    forward = [source[i] for i in range(20)]
    assert [puzzle(query)[i] for i in reversed(range(20))] == forward[::-1]
    assert len({(said(row), response(row), row_to_json(row)["messages"].__repr__()) for row in forward}) > 10
    assert source[ENDLESS - 1] == puzzle(query)[ENDLESS - 1]
    with pytest.raises(IndexError):
        source[ENDLESS]
    for row in forward[:5]:
        again = parse_row(row_to_json(row), row.where, None)  # type: ignore[arg-type]
        assert (again.answer, again.response, again.id, said(again)) == (row.answer, row.response, row.id, said(row))


def test_rows_do_not_change_between_processes_and_versions() -> None:
    row = puzzle("digits?form=text")[0]
    assert said(row) == "green1 red1 red3 blue4\nAdd the green digits."
    assert response(row) == "List: green1 red1 red3 blue4. Take green:1. So</think>\\boxed{1}"
    code = "from ovr_megatron.data.puzzles import open_puzzle as o; r = o('puzzle:digits')[7]; "
    code += "print(r.response, r.messages[0].parts[0].image.tobytes().hex())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize("form", ["text", "image"])
def test_sum_adds_a_colour_that_occurs(form: str) -> None:
    for row, twin in zip(rows(f"digits?form={form}", 500), rows("digits?form=text", 500), strict=True):
        cells = grid(said(twin))
        (colour,) = re.findall(r"\nAdd the (\w+) digits\.$", said(row))
        chosen = [digit for name, digit in cells if name == colour]
        assert len(cells) == 4 and chosen
        assert row.answer == str(sum(chosen))
        assert response(row) == response(twin)
        assert response(row).endswith(f"So</think>\\boxed{{{row.answer}}}")
        assert response(row).startswith(
            f"List: {said(twin).splitlines()[0]}. Take {colour}:{','.join(map(str, chosen))}. "
        )
        for a, b, total in re.findall(r"(\d+)\+(\d+)=(\d+)(?!\d|\. Wait)", response(row)):
            assert int(a) + int(b) == int(total)


def test_traces_verify_and_go_back_as_often_as_they_should() -> None:
    found = [response(row) for row in rows("digits?form=text", 3000)]
    adding = [text for text in found if "Add " in text]
    wrong = [re.search(r"(\d+)\+(\d+)=(\d+)\. Wait, \1\+\2=(\d+)", text) for text in adding]
    slips = [match for match in wrong if match]
    assert abs(sum("Let me check: " in text for text in found) / len(found) - 0.3) < 0.03
    assert abs(len(slips) / len(adding) - 0.1) < 0.02
    assert all(int(match[3]) != int(match[4]) == int(match[1]) + int(match[2]) for match in slips)
    assert sum("Wait" in text for text in found) == len(slips)
    assert not any("Wait" in response(row) or "Let" in response(row) for row in rows("digits?check=0&slip=0", 300))


def test_teaching_tasks_say_the_words_of_the_trace() -> None:
    for task, pattern in {
        "caption": r"List: ((red|green|blue)\d ?){4}\.",
        "pick": r"Take (red|green|blue):\d(,\d)*\.",
        "both": r"List: ((red|green|blue)\d ?){4}\. Take (red|green|blue):\d(,\d)*\.",
    }.items():
        for row in rows(f"digits?form=text&task={task}", 200):
            assert re.fullmatch(pattern, response(row)) and row.answer == response(row)
            listed, _, taken = response(row).rpartition("Take ")
            assert not listed or grid(listed) == grid(said(row).splitlines()[0])
            if task != "caption":
                colour, digits = taken.rstrip(".").split(":")
                assert colour in said(row).splitlines()[1]
                assert [int(d) for d in digits.split(",")] == [d for c, d in grid(said(row)) if c == colour]
    for row in rows("digits?task=arith", 200):
        assert row.answer == str(sum(map(int, said(row).removeprefix("Sum ").split(","))))
    boxes = rows("digits?task=box", 1000)
    corrected = [re.fullmatch(r"So (\d+)\. Wait, So</think>\\boxed\{(\d+)\}", response(row)) for row in boxes]
    assert all(said(row) == f"Box {row.answer}" for row in boxes)
    assert all(match is None or match[1] != match[2] for match in corrected)
    assert abs(sum(match is not None for match in corrected) / 1000 - 0.3) < 0.05
    for row in boxes + rows("digits?task=arith", 200):
        assert response(row).endswith(f"So</think>\\boxed{{{row.answer}}}")


def test_a_digit_stands_in_its_cell_in_its_colour() -> None:
    for row, twin in zip(rows("digits", 100), rows("digits?form=text", 100), strict=True):
        pixels = np.asarray(picture(row), dtype=int)
        assert pixels.shape == (56, 56, 3)
        for i, (colour, _) in enumerate(grid(said(twin).splitlines()[0])):
            y, x = divmod(i, 2)
            cell = pixels[y * 28 : y * 28 + 28, x * 28 : x * 28 + 28].reshape(-1, 3)
            ink = cell[np.abs(cell - 118).sum(1) > 150]
            assert 20 < len(ink) < 200
            distance = {name: np.abs(np.median(ink, 0) - value).sum() for name, value in COLOURS.items()}
            assert min(distance, key=lambda name: distance[name]) == colour
            assert distance[colour] <= 3 * 40


def test_digits_and_shapes_look_different_and_jitter() -> None:
    shown = [np.asarray(render((("white", figure),), 1, Random(1)), dtype=int) for figure in "123456789"]
    shown += [np.asarray(render((("white", f),), 1, Random(1)), dtype=int) for f in ("circle", "square", "triangle")]
    for a, b in itertools.combinations(shown, 2):
        assert np.abs(a - b).max(-1).clip(0, 1).sum() > 20
    places = {
        np.argwhere(np.asarray(render((("white", "square"),), 1, Random(i)))[..., 2] > 200).min(0)[0] for i in range(99)
    }
    assert places == {5, 6, 7, 8, 9}


def test_shapes_are_counted() -> None:
    for row in rows("shapes?form=text", 300):
        *lines, question = said(row).splitlines()
        match = re.fullmatch(r"How many (\w+ \w+)s\?", question)
        assert match and len(lines) == 2
        count = Counter(cell for line in lines for cell in line.split(", "))[match[1]]
        assert count > 0 and row.answer == str(count)
        assert response(row).endswith(f"So</think>\\boxed{{{count}}}")
    assert picture(puzzle("shapes?rows=3&cols=4")[0]).size == (112, 84)


BEHAVIOURS = {
    "backward chaining": r"I want .* work back",
    "subgoal": r"First goal: .*Next goal: ",
    "backtracking": r"Wait, go back\.",
    "verification": r"Let me check: ",
}


@pytest.mark.parametrize(
    "query", ["ordering", "ordering?people=4", "ordering?people=6", "countdown", "countdown?steps=4"]
)
def test_every_logic_trace_has_the_four_behaviours(query: str) -> None:
    for row in rows(query, 200):
        assert [name for name, sign in BEHAVIOURS.items() if not re.search(sign, response(row))] == []
        assert response(row).endswith(f"So</think>\\boxed{{{row.answer}}}")
        assert "\\boxed{}" in said(row)


CLUES = {
    r"(\w+) stands somewhere left of (\w+)": lambda a, b: a < b,
    r"(\w+) stands beside (\w+)": lambda a, b: abs(a - b) == 1,
    r"(\w+) does not stand beside (\w+)": lambda a, b: abs(a - b) != 1,
}


def fits(order: tuple[str, ...], clues: list[str]) -> list[bool]:
    found = []
    for clue in clues:
        ((match, rule),) = [(m, rule) for sign, rule in CLUES.items() if (m := re.fullmatch(sign, clue))]
        found.append(rule(order.index(match[1]), order.index(match[2])))
    return found


@pytest.mark.parametrize("people", [4, 5])
def test_ordering_has_one_solution_and_its_trace_is_true(people: int) -> None:
    for row in rows(f"ordering?people={people}", 60):
        names = said(row).split(" stand in a row")[0].split(", ")
        clues = re.findall(r"\(\d\) ([^.]+)\.", said(row))
        orders = list(itertools.permutations(names))
        (order,) = [order for order in orders if all(fits(order, clues))]
        wanted = re.findall(r"does (\w+) stand\?", said(row))
        assert len(names) == people and wanted
        assert row.answer == str(order.index(wanted[-1]) + 1)
        tried = re.findall(r"Try ([\w, ]+): \(\d\) (holds|fails)", response(row))
        assert len(tried) > 1
        for names_tried, verdict in tried:
            checks = fits(tuple(names_tried.split(", ")), clues)
            assert all(checks[:-1]) and checks[-1] == (verdict == "holds")
        for i in range(len(clues)):  # no clue is idle
            assert sum(all(fits(order, clues[:i] + clues[i + 1 :])) for order in orders) > 1


def apply(value: int, step: str) -> int:
    number = int(step[1:])
    return {"+": value + number, "-": value - number, "*": value * number}[step[0]]


@pytest.mark.parametrize("steps", [3, 4])
def test_countdown_has_one_answer_and_its_check_is_true(steps: int) -> None:
    for row in rows(f"countdown?steps={steps}", 100):
        match = re.match(
            r"Start at (\d+)\. Use each of the steps (.*) once, in some order, to reach (\d+)\.", said(row)
        )
        assert match
        start, listed, target = int(match[1]), match[2].split(", "), int(match[3])
        befores = set()
        for order in itertools.permutations(listed):
            walk = list(itertools.accumulate(order, apply, initial=start))
            if walk[-1] == target and min(walk) > 0:
                befores.add(walk[-2])
        assert "Every number on the way must be positive." in said(row)
        assert befores == {int(row.answer or "")}
        checked = re.findall(r"(\d+)([-+*]\d+)=(\d+)", response(row).split("Let me check: ")[1])
        assert len(checked) == steps == len(listed)
        assert all(apply(int(a), step) == int(b) for a, step, b in checked)
        assert (int(checked[0][0]), int(checked[-1][2])) == (start, target)


@pytest.mark.parametrize("query", EVERY)
def test_a_prompt_row_is_the_same_row_without_its_response(query: str) -> None:
    joint = "&" if "?" in query else "?"
    for told, asked in zip(rows(query, 5), rows(f"{query}{joint}answered=0", 5), strict=True):
        assert asked.is_prompt and asked.answer == told.answer
        assert asked.messages == told.prompt


def drawn(query: str, numbers: range, monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """The problems behind the rows, as the function that poses the kind gets them."""
    kind = KINDS[query.split("?")[0]]
    seen = []

    def pose(problem: Any, rng: Random, params: Any) -> Puzzle:
        seen.append(problem)
        return kind.pose(problem, rng, params)

    source = puzzle(query)
    with monkeypatch.context() as patch:
        patch.setattr(source, "_kind", Kind(kind.draw, pose, kind.parameters))
        for i in numbers:
            source[i]
    return set(seen)


@pytest.mark.parametrize("query", EVERY)
def test_no_train_row_shows_a_held_out_problem(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joint = "&" if "?" in query else "?"
    count = 2000 if query.startswith("digits") else 300
    assert not any(map(is_held_out, drawn(query, range(count), monkeypatch)))
    held = drawn(f"{query}{joint}split=heldout&count=100", range(100), monkeypatch)
    assert len(held) == 100 and all(map(is_held_out, held))


def test_no_train_text_names_a_held_out_grid() -> None:
    """The same through the words alone: every task, 24,000 rows, against all held-out grids of 2 x 2."""
    figures = [(colour, digit) for colour in ("red", "green", "blue") for digit in range(1, 6)]
    held = {
        " ".join(f"{colour}{digit}" for colour, digit in cells)
        for cells in itertools.product(figures, repeat=4)
        if is_held_out(tuple((colour, str(digit)) for colour, digit in cells))
    }
    assert abs(len(held) / 15**4 - 1 / 16) < 0.005
    for task in ("sum", "caption", "pick", "both"):
        texts = [said(row).splitlines()[0] for row in rows(f"digits?form=text&task={task}", 6000)]
        assert not held & set(texts)
        assert len(set(texts)) > 5000
    evaluated = [said(row).splitlines()[0] for row in rows("digits?form=text&split=heldout", 600)]
    assert set(evaluated) <= held and len(set(evaluated)) == 600


def test_the_split_is_the_one_that_earlier_checkpoints_were_trained_on() -> None:
    grids = [puzzle("digits?form=text&split=heldout&count=3")[i] for i in range(3)]
    assert [said(row).splitlines()[0] for row in grids] == [
        "blue4 red1 blue4 green1",
        "blue2 blue4 green4 green5",
        "blue1 green3 blue5 red2",
    ]


def test_held_out_problems_are_the_same_for_every_task_and_form(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [drawn(f"{query}&split=heldout&count=50", range(50), monkeypatch) for query in EVERY if "digits" in query]
    assert all(each == sets[0] for each in sets)
    more = drawn("digits?split=heldout&count=80", range(80), monkeypatch)
    assert sets[0] < more
    assert sets[0] != drawn("digits?split=heldout&count=50&seed=2", range(50), monkeypatch)


def test_no_train_prompt_has_the_fingerprint_of_a_held_out_one() -> None:
    """As text, over tasks and seeds; pictures of one grid differ by their jitter, so there the grid decides."""
    evaluated = rows("digits?form=text&split=heldout&count=600", 600)
    held = {fingerprint(row) for row in evaluated + rows("digits?form=text&split=heldout&task=pick&count=600", 600)}
    assert len({fingerprint(row) for row in evaluated}) == 600
    for query in ("task=sum", "task=sum&seed=7", "task=pick", "task=sum&answered=0"):
        train = {fingerprint(row) for row in rows(f"digits?form=text&{query}", 2000)}
        assert len(train) > 1500 and not train & held


def test_a_clue_does_not_return_with_its_names_swapped() -> None:
    for row in rows("ordering", 200):
        for a, b in re.findall(r"(\w+) (?:stands|does not stand) beside (\w+)\.", said(row)):
            assert a < b


def test_600_evaluated_pictures_differ() -> None:
    assert len({picture(row).tobytes() for row in rows("digits?split=heldout&answered=0", 600)}) == 600


def test_the_held_out_set_ends() -> None:
    source = puzzle("digits?split=heldout&count=700")
    assert len(source) == 700 and source[699].is_prompt is False
    with pytest.raises(IndexError):
        source[700]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("puzzle:chess", "choose one of digits, shapes, checksum, ordering, countdown"),
        ("puzzle:digits?colour=3", "'colour' is unknown; digits takes seed, split"),
        ("puzzle:digits?form=sound", "form='sound' is unknown; choose one of image, text"),
        ("puzzle:digits?rows=two", "rows='two' is not a number"),
        ("puzzle:digits?rows=0", r"rows=0 must lie in 1..16"),
        ("puzzle:digits?slip=nan", r"slip=nan must lie in 0..1"),
        ("puzzle:digits?form", "puzzle:KIND"),
        ("puzzle:shapes?rows=1&cols=1&split=heldout", "held-out|too few"),
        ("puzzle:digits?rows=1&cols=2&split=heldout", r"only \d+ held-out problems found; set count=\d+ or less"),
    ],
)
def test_bad_parameters_are_named(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_puzzle(path)
    assert path in str(caught.value)


def test_a_batch_is_drawn_and_painted_in_60_ms() -> None:
    source = puzzle("digits")
    source[0]
    spent = []
    for start in range(0, 640, 64):
        began = time.process_time()
        for i in range(start, start + 64):
            source[i]
        spent.append(time.process_time() - began)
    assert min(spent) < 0.06
