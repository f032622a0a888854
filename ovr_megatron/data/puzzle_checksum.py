"""Generate rows of digits with their sum, of which one digit can be read in two ways.

The digit is a misprint: its yellow and its blue plate show different digits, where those of the others agree (white).
As a text it is ``3/4``.  The yellow one is more often right, and the row alone does not say when.  The sum does: a
reader who compares notices a wrong first reading and reads again.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ovr_megatron.data.puzzle_grids import Cells, render
from ovr_megatron.data.puzzle_kind import Kind, Number, Params, Puzzle, box
from ovr_megatron.data.schema import ImagePart, Part, TextPart

DIGIT_COLOUR = "white"
SUM_COLOUR = "green"
VERBS = {"image": "look", "text": "read"}
TEXT_TASKS = ("arith", "compare", "box")  # without a row to look at or to read

Digits = tuple[int, ...]
Misprint = tuple[Digits, int, int]  # (likelier reading of the row, index of the misprinted digit, its other reading)


def draw_checksum(rng: Random, params: Params) -> Misprint:
    """Draw a row of digits 1 to ``high`` and a second reading of one of them."""
    # The order of the draws decides which rows a seed gives.
    high = params["high"]
    digits = tuple(rng.randint(1, high) for _ in range(params["cols"]))
    index = rng.randrange(len(digits))
    others = [digit for digit in range(1, high + 1) if digit != digits[index]]
    return digits, index, rng.choice(others)


def pose_checksum(problem: Misprint, rng: Random, params: Params) -> Puzzle:
    """Pose a task on a row with a misprinted digit.

    ``number`` is the puzzle: name the digits that have the sum.  ``guess`` answers it at first sight.  The other tasks
    teach single steps, and ``pair`` and ``twice`` two of them on request; none teaches a check.
    """
    first, index, other = problem
    second = (*first[:index], other, *first[index + 1 :])
    # Drawn first, and not part of the problem: a held-out row is held out with either sum.
    is_misread = rng.random() < params["misread"]
    right = second if is_misread else first
    verb = VERBS[params["form"]]
    question, response, answer = _state_task(first, second, right, verb, params)
    if params["task"] in TEXT_TASKS:
        return Puzzle((TextPart(question),), response, answer)
    # A picture and its text twin show the same figures.
    figures = [str(digit) for digit in first]
    figures[index] = f"{first[index]}/{other}"
    parts = _show(figures, sum(right), question, rng, params)
    return Puzzle(parts, response, answer)


def _state_task(first: Digits, second: Digits, right: Digits, verb: str, params: Params) -> tuple[str, str, str]:
    """Return question, response and verifiable answer of ``task``."""
    task = params["task"]
    number = int("".join(map(str, right)))
    if task == "number":
        thinking = _think(first, second, right, verb, params)
        return "Which digits?", box(thinking, number), str(number)
    if task == "guess":
        guess = int("".join(map(str, first)))
        return "Which digits?", box(f"I {verb}: {_add(first)}. ", guess), str(number)
    if task == "box":
        return f"Box {number}.", box("", number), str(number)
    terms = _join(first)
    if task == "compare":
        question = f"Compare {sum(first)} and {sum(right)}."
        response = _compare(first, right)
    elif task == "pair":
        question = "Describe. Name the sum."
        response = f"I {verb}: {_add(first)}. I {verb}: sum {sum(right)}."
    elif task == "twice":
        question = "Read twice."
        response = f"I {verb}: {_add(first)}. I {verb} again: {_add(second)}."
    elif task == "caption":
        question = "Describe."
        response = f"I {verb}: {terms}."
    elif task == "again":
        question = f"Not {terms}."
        response = f"I {verb} again: {_join(second)}."
    elif task == "total":
        question = "Name the sum."
        response = f"I {verb}: sum {sum(right)}."
    else:
        question = f"Add {terms}."
        response = f"{_add(first)}."
    # The entire response of a single step is verified.
    return question, response, response


def _think(first: Digits, second: Digits, right: Digits, verb: str, params: Params) -> str:
    """Reason to the right reading: by a check of the likelier one, or at once (``trace=direct``)."""
    if params["trace"] == "direct":
        return f"I {verb}: {_add(right)}. "
    reading = f"I {verb}: {_add(first)}."
    check = f"Let me check. I {verb}: sum {sum(right)}. {_compare(first, right)}"
    if right == first:
        return f"{reading} {check} "
    return f"{reading} {check} Wait, I {verb} again: {_add(second)}. {_compare(second, right)} "


def _compare(digits: Digits, right: Digits) -> str:
    difference = sum(right) - sum(digits)
    return f"{sum(right)}-{sum(digits)}={difference}. {'No match' if difference else 'Match'}."


def _join(digits: Digits) -> str:
    return "+".join(map(str, digits))


def _add(digits: Digits) -> str:
    return f"{_join(digits)}={sum(digits)}"


def _show(figures: Sequence[str], total: int, question: str, rng: Random, params: Params) -> tuple[Part, ...]:
    """Show the row and its sum as one row of cells, or as a line of text."""
    if params["form"] == "text":
        return (TextPart(f"{' '.join(figures)} = {total}\n{question}"),)
    cells: Cells = tuple((DIGIT_COLOUR, figure) for figure in figures)
    figures_of_sum = str(total).rjust(len(str(params["cols"] * params["high"])))
    cells += tuple((SUM_COLOUR, figure) for figure in figures_of_sum)
    image = render(cells, len(cells), rng)
    return ImagePart(image=image), TextPart(f"\n{question}")


CHECKSUM = Kind(
    draw_checksum,
    pose_checksum,
    {
        "form": tuple(VERBS),
        "task": ("number", "guess", "caption", "again", "total", "pair", "twice", *TEXT_TASKS),
        "trace": ("check", "direct"),
        "cols": Number(3, 1, 11),  # the sum has two digits at most
        "high": Number(9, 2, 9),
        "misread": Number(0.3, 0, 1),
    },
)
