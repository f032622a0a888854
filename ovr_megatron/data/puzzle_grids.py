"""Grids of coloured digits or shapes, told as a picture or as words."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw, ImageFont

from ovr_megatron.data.puzzle_kind import Kind, Number, Params, Puzzle, box
from ovr_megatron.data.schema import ImagePart, Part, TextPart

CELL = 28  # pixels: one merged visual token of Qwen2.5-VL
JITTER = 2  # pixels
SHADE = 25  # of 255, per channel
GREY = (118, 118, 118)
COLOURS = {"red": (240, 45, 35), "green": (40, 225, 55), "blue": (40, 55, 240), "white": (245, 245, 245)}
BOX_SLIP = 0.3  # share of the box task that corrects itself
SHAPES = ("circle", "square", "triangle")

Cells = tuple[tuple[str, str], ...]  # (colour, figure) of each cell, row by row


@functools.cache
def _stamp(figure: str) -> Image.Image:
    """The figure as a mask of one cell."""
    mask = Image.new("L", (CELL, CELL))
    draw = ImageDraw.Draw(mask)
    if figure == "circle":
        draw.ellipse((6, 6, 22, 22), fill=255)
    elif figure == "square":
        draw.rectangle((7, 7, 21, 21), fill=255)
    elif figure == "triangle":
        draw.polygon((14, 5, 23, 22, 5, 22), fill=255)
    else:
        draw.text((CELL / 2, CELL / 2), figure, font=ImageFont.load_default(20), fill=255, anchor="mm")
    return mask


def render(cells: Cells, columns: int, rng: Random) -> Image.Image:
    """Paint ``cells`` on grey, 28 x 28 pixels each, with jitter of place and colour."""
    image = Image.new("RGB", (columns * CELL, len(cells) // columns * CELL), GREY)
    for i, (colour, figure) in enumerate(cells):
        row, column = divmod(i, columns)
        corner = (column * CELL + rng.randint(-JITTER, JITTER), row * CELL + rng.randint(-JITTER, JITTER))
        shade = tuple(min(255, max(0, value + rng.randint(-SHADE, SHADE))) for value in COLOURS[colour])
        image.paste(shade, corner, _stamp(figure))
    return image


def _ask(cells: Cells, words: str, question: str, rng: Random, params: Params) -> tuple[Part, ...]:
    if params["form"] == "text":
        return (TextPart(f"{words}\n{question}"),)
    return ImagePart(image=render(cells, params["cols"], rng)), TextPart(f"\n{question}")


def _draw_cells(figures: Sequence[str], rng: Random, params: Params) -> Cells:
    colours = list(COLOURS)[: params["colours"]]
    return tuple((rng.choice(colours), rng.choice(figures)) for _ in range(params["rows"] * params["cols"]))


def _add(numbers: Sequence[int], rng: Random, slip: float) -> str:
    """``Add 3+5=8, 8+2=10.``, with probability ``slip`` one step wrong and corrected; empty for one number."""
    totals = list(itertools.accumulate(numbers))
    steps = [f"{a}+{b}={total}" for a, b, total in zip(totals, numbers[1:], totals[1:], strict=False)]
    if steps and rng.random() < slip:
        i = rng.randrange(len(steps))
        sides = steps[i].split("=")[0]
        steps[i] = f"{sides}={_wrong(totals[i + 1], rng)}. Wait, {steps[i]}"
    return f"Add {', '.join(steps)}. " if steps else ""


def _wrong(number: int, rng: Random) -> int:
    return number + rng.choice((-1, 1) if number else (1,))


def _check(answer: int, rng: Random, share: float) -> str:
    return f"Let me check: {answer}. " if rng.random() < share else ""


def draw_digits(rng: Random, params: Params) -> Cells:
    """A grid of coloured digits 1 to ``high``."""
    return _draw_cells([str(digit) for digit in range(1, params["high"] + 1)], rng, params)


def tell_digits(cells: Cells, rng: Random, params: Params) -> Puzzle:
    """``sum`` is the puzzle: add the digits of a colour that occurs.  The other tasks teach its steps one by one."""
    if params["task"] in ("arith", "box"):
        return _tell_arithmetic(rng, params)
    colour = rng.choice([name for name in COLOURS if name in dict(cells)])
    numbers = [int(digit) for name, digit in cells if name == colour]
    words = " ".join(name + digit for name, digit in cells)
    listing, taking = f"List: {words}.", f"Take {colour}:{','.join(map(str, numbers))}."
    name = f"Name the {colour} digits."
    answer = sum(numbers)
    thinking = f"{listing} {taking} {_add(numbers, rng, params['slip'])}{_check(answer, rng, params['check'])}"
    question, response, verifiable = {
        "sum": (f"Add the {colour} digits.", box(thinking, answer), str(answer)),
        "caption": ("Describe.", listing, listing),
        "pick": (name, taking, taking),
        "both": (f"Describe. {name}", f"{listing} {taking}", f"{listing} {taking}"),
    }[params["task"]]
    return Puzzle(_ask(cells, words, question, rng, params), response, verifiable)


def _tell_arithmetic(rng: Random, params: Params) -> Puzzle:
    """Bare addition (``arith``), or a number to put in a box, at times after a wrong one (``box``)."""
    size, high = params["rows"] * params["cols"], params["high"]
    if params["task"] == "box":
        answer = rng.randint(0, high * size)
        question, thinking = f"Box {answer}", f"So {_wrong(answer, rng)}. Wait, " if rng.random() < BOX_SLIP else ""
    else:
        numbers = [rng.randint(1, high) for _ in range(rng.randint(1, size))]
        answer = sum(numbers)
        question, thinking = f"Sum {','.join(map(str, numbers))}", _add(numbers, rng, slip=0)
        thinking += _check(answer, rng, params["check"])
    return Puzzle((TextPart(question),), box(thinking, answer), str(answer))


def draw_shapes(rng: Random, params: Params) -> Cells:
    """A grid of coloured shapes."""
    return _draw_cells(SHAPES, rng, params)


def tell_shapes(cells: Cells, rng: Random, params: Params) -> Puzzle:
    """Count the shapes of one colour and form, row by row."""
    wanted = rng.choice(cells)
    size = params["cols"]
    rows = [cells[i : i + size] for i in range(0, len(cells), size)]
    lines = [", ".join(" ".join(cell) for cell in row) for row in rows]
    counts = [row.count(wanted) for row in rows]
    goals = "".join(f"Row {i}: {line}, so {n}. " for i, (line, n) in enumerate(zip(lines, counts, strict=True), 1))
    answer = sum(counts)
    thinking = goals + _add(counts, rng, params["slip"]) + _check(answer, rng, params["check"])
    parts = _ask(cells, "\n".join(lines), f"How many {' '.join(wanted)}s?", rng, params)
    return Puzzle(parts, box(thinking, answer), str(answer))


_PARAMETERS: dict[str, Number | tuple[str, ...]] = {
    "form": ("image", "text"),
    "rows": Number(2, 1, 16),
    "cols": Number(2, 1, 16),
    "colours": Number(3, 1, len(COLOURS)),
    "check": Number(0.3, 0, 1),
    "slip": Number(0.1, 0, 1),
}
_TASKS = ("sum", "caption", "pick", "both", "arith", "box")

DIGITS = Kind(draw_digits, tell_digits, _PARAMETERS | {"task": _TASKS, "high": Number(5, 1, 9)})
SHAPES_COUNT = Kind(draw_shapes, tell_shapes, _PARAMETERS | {"cols": Number(3, 1, 16)})
