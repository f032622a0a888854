"""Generate problems on grids of coloured digits or shapes, posed as a picture or as words."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from random import Random

from PIL import Image, ImageDraw, ImageFont

from ovr_megatron.data.puzzle_kind import Kind, Number, Params, Puzzle, box
from ovr_megatron.data.schema import ImagePart, Part, TextPart

CELL = 28  # pixels: one merged visual token of 14-pixel patches
JITTER = 2  # pixels
SHADE = 25  # of 255, per channel
GREY = (118, 118, 118)
COLOURS = {
    "red": (240, 45, 35),
    "green": (40, 225, 55),
    "blue": (40, 55, 240),
    "white": (245, 245, 245),
}
BOX_SLIP = 0.3  # share of the box task that corrects itself
SHAPES = ("circle", "square", "triangle")

Cells = tuple[tuple[str, str], ...]  # (colour, figure) of each cell, row by row


@functools.cache
def _stamp(figure: str) -> Image.Image:
    """Draw the figure as a mask of one cell."""
    mask = Image.new("L", (CELL, CELL))
    draw = ImageDraw.Draw(mask)
    if figure == "circle":
        draw.ellipse((6, 6, 22, 22), fill=255)
    elif figure == "square":
        draw.rectangle((7, 7, 21, 21), fill=255)
    elif figure == "triangle":
        draw.polygon((14, 5, 23, 22, 5, 22), fill=255)
    else:
        centre = (CELL / 2, CELL / 2)
        font = ImageFont.load_default(20)
        draw.text(centre, figure, font=font, fill=255, anchor="mm")
    return mask


def render(cells: Cells, columns: int, rng: Random) -> Image.Image:
    """Paint ``cells`` on grey, 28 x 28 pixels each, with jitter of position and colour.

    A figure ``3/4`` is a misprint: the red and the green channel show a 3, the blue channel shows a 4.
    """
    rows = len(cells) // columns
    size = (columns * CELL, rows * CELL)
    image = Image.new("RGB", size, GREY)
    for i, (colour, figure) in enumerate(cells):
        row, column = divmod(i, columns)
        # The order of the draws (x, y, red, green, blue) is part of the problem: another gives another picture.
        x = column * CELL + rng.randint(-JITTER, JITTER)
        y = row * CELL + rng.randint(-JITTER, JITTER)
        shade = []
        for value in COLOURS[colour]:
            shift = rng.randint(-SHADE, SHADE)
            shade.append(_clamp(value + shift))
        # The figure is a mask: the grey stays around it.
        figures = figure.split("/")
        if len(figures) == 1:
            image.paste(tuple(shade), (x, y), _stamp(figure))
        else:
            _paste_misprint(image, (x, y), shade, figures)
    return image


def _paste_misprint(image: Image.Image, corner: tuple[int, int], shade: Sequence[int], figures: Sequence[str]) -> None:
    """Paint the first of two figures in the red and the green channel, and the second in the blue one."""
    x, y = corner
    first, second = map(_stamp, figures)
    channels = image.crop((x, y, x + CELL, y + CELL)).split()
    for channel, value, mask in zip(channels, shade, (first, first, second), strict=True):
        channel.paste(value, (0, 0), mask)
    image.paste(Image.merge("RGB", channels), corner)


def _clamp(value: int) -> int:
    return min(255, max(0, value))


def _ask(
    cells: Cells,
    words: str,
    question: str,
    rng: Random,
    params: Params,
) -> tuple[Part, ...]:
    if params["form"] == "text":
        return (TextPart(f"{words}\n{question}"),)
    image = render(cells, params["cols"], rng)
    return ImagePart(image=image), TextPart(f"\n{question}")


def _draw_cells(figures: Sequence[str], rng: Random, params: Params) -> Cells:
    colours = list(COLOURS)[: params["colours"]]
    size = params["rows"] * params["cols"]
    cells = []
    for _ in range(size):
        colour = rng.choice(colours)
        figure = rng.choice(figures)
        cells.append((colour, figure))
    return tuple(cells)


def _add(numbers: Sequence[int], rng: Random, slip: float) -> str:
    """Write ``Add 3+5=8, 8+2=10. ``: empty for one number.

    With probability ``slip`` one step is wrong and corrected at once.
    """
    totals = list(itertools.accumulate(numbers))
    steps = []
    for i, number in enumerate(numbers[1:]):
        before = totals[i]
        after = totals[i + 1]
        steps.append(f"{before}+{number}={after}")
    if not steps:
        return ""
    if rng.random() < slip:
        i = rng.randrange(len(steps))
        terms = steps[i].split("=")[0]
        wrong_total = _off_by_one(totals[i + 1], rng)
        steps[i] = f"{terms}={wrong_total}. Wait, {steps[i]}"
    return f"Add {', '.join(steps)}. "


def _off_by_one(total: int, rng: Random) -> int:
    # Drawn for 0 as well, where only 1 is a wrong answer: the stream of random numbers stays the same.
    offsets = (-1, 1) if total else (1,)
    return total + rng.choice(offsets)


def _check(answer: int, rng: Random, share: float) -> str:
    if rng.random() < share:
        return f"Let me check: {answer}. "
    return ""


def draw_digits(rng: Random, params: Params) -> Cells:
    """Draw a grid of coloured digits 1 to ``high``."""
    high = params["high"]
    digits = [str(digit) for digit in range(1, high + 1)]
    return _draw_cells(digits, rng, params)


def pose_digits(cells: Cells, rng: Random, params: Params) -> Puzzle:
    """Pose a task on a grid of digits.

    ``sum`` is the puzzle: add the digits of a colour that occurs.  The other tasks teach its steps separately.
    """
    if params["task"] in ("arith", "box"):
        return _pose_arithmetic(rng, params)
    # In the order of `COLOURS`, which the draw depends on.
    grid_colours = dict(cells)
    colours = [colour for colour in COLOURS if colour in grid_colours]
    target = rng.choice(colours)
    numbers = []
    names = []
    for colour, digit in cells:
        names.append(f"{colour}{digit}")
        if colour == target:
            numbers.append(int(digit))
    words = " ".join(names)
    listing = f"List: {words}."
    terms = ",".join(map(str, numbers))
    selection = f"Take {target}:{terms}."
    answer = sum(numbers)
    # Drawn for the tasks that do not show it as well: the jitter of the picture comes from the same stream after it.
    addition = _add(numbers, rng, params["slip"])
    check = _check(answer, rng, params["check"])
    steps = f"{listing} {selection}"
    thinking = f"{steps} {addition}{check}"
    question, response, verifiable = {
        "sum": (f"Add the {target} digits.", box(thinking, answer), str(answer)),
        "caption": ("Describe.", listing, listing),
        "pick": (f"Name the {target} digits.", selection, selection),
        "both": (f"Describe. Name the {target} digits.", steps, steps),
    }[params["task"]]
    parts = _ask(cells, words, question, rng, params)
    return Puzzle(parts, response, verifiable)


def _pose_arithmetic(rng: Random, params: Params) -> Puzzle:
    """Pose a bare addition (``arith``), or a number to put in a box, at times after a wrong number (``box``)."""
    size = params["rows"] * params["cols"]
    high = params["high"]
    thinking = ""
    if params["task"] == "box":
        answer = rng.randint(0, high * size)
        question = f"Box {answer}"
        if rng.random() < BOX_SLIP:
            wrong_answer = _off_by_one(answer, rng)
            thinking = f"So {wrong_answer}. Wait, "
    else:
        count = rng.randint(1, size)
        numbers = [rng.randint(1, high) for _ in range(count)]
        answer = sum(numbers)
        terms = ",".join(map(str, numbers))
        question = f"Sum {terms}"
        addition = _add(numbers, rng, slip=0)
        check = _check(answer, rng, params["check"])
        thinking = addition + check
    parts = (TextPart(question),)
    return Puzzle(parts, box(thinking, answer), str(answer))


def draw_shapes(rng: Random, params: Params) -> Cells:
    """Draw a grid of coloured shapes."""
    return _draw_cells(SHAPES, rng, params)


def pose_shapes(cells: Cells, rng: Random, params: Params) -> Puzzle:
    """Ask for the number of shapes of one colour and form, counted row by row."""
    target = rng.choice(cells)
    columns = params["cols"]
    lines = []
    counts = []
    goals = ""
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        line = ", ".join(" ".join(cell) for cell in row)
        count = row.count(target)
        lines.append(line)
        counts.append(count)
        goals += f"Row {len(lines)}: {line}, so {count}. "
    answer = sum(counts)
    addition = _add(counts, rng, params["slip"])
    check = _check(answer, rng, params["check"])
    thinking = goals + addition + check
    shape = " ".join(target)
    question = f"How many {shape}s?"
    words = "\n".join(lines)
    parts = _ask(cells, words, question, rng, params)
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

DIGITS = Kind(
    draw_digits,
    pose_digits,
    _PARAMETERS | {"task": _TASKS, "high": Number(5, 1, 9)},
)
SHAPES_COUNT = Kind(
    draw_shapes,
    pose_shapes,
    _PARAMETERS | {"cols": Number(3, 1, 16)},
)
