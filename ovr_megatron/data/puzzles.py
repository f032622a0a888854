"""Generated problems with reasoning traces and verifiable answers: ``puzzle:KIND?parameter=value&...``.

Row ``i`` is a function of the kind, its parameters and ``i`` alone.  A kind draws a problem and then poses
it, as a text or as a picture.  One problem in sixteen, chosen by its hash, is held out: the train split of
no task and no form ever shows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from random import Random
from typing import Any
from urllib.parse import parse_qsl

from ovr_megatron.config import ConfigError
from ovr_megatron.data.puzzle_checksum import CHECKSUM
from ovr_megatron.data.puzzle_grids import DIGITS, SHAPES_COUNT
from ovr_megatron.data.puzzle_kind import Kind, Number, Params
from ovr_megatron.data.puzzle_logic import COUNTDOWN, ORDERING
from ovr_megatron.data.schema import ENDLESS, Message, Row, TextPart

HELD_OUT_SHARE = 16

KINDS: dict[str, Kind] = {
    "digits": DIGITS,
    "shapes": SHAPES_COUNT,
    "checksum": CHECKSUM,
    "ordering": ORDERING,
    "countdown": COUNTDOWN,
}

GENERAL: dict[str, Number | tuple[str, ...]] = {
    "seed": Number(1, 0, 2**31),
    "split": ("train", "heldout"),
    "answered": Number(1, 0, 1),
    "count": Number(1000, 1, 10**6),
}


class PuzzleSource:
    """Rows of one kind: endless in the train split, ``count`` distinct problems in the held-out one."""

    def __init__(
        self,
        path: str,
        kind: str,
        params: Params,
        name: str | None = None,
    ) -> None:
        """Use `open_puzzle`, which checks ``params``; ``name`` labels the rows."""
        self._path = path
        self._kind = KINDS[kind]
        self._params = params
        # Each task and each form is a source of its own in the metrics.
        label = [f"puzzle:{kind}"]
        for key in ("task", "form"):
            if key in params:
                label.append(params[key])
        self._label = name or "/".join(label)
        # The form, the response, its trace and the size of the held-out set do not change which problems are drawn.
        seeding = dict(params)
        for key in ("form", "answered", "trace", "count"):
            seeding.pop(key, None)
        self._seed = f"{kind}{sorted(seeding.items())}"
        self._held_out: Sequence[Hashable] | None = None
        if params["split"] == "heldout":
            self._held_out = self._draw_held_out(kind)

    def __len__(self) -> int:
        """Return `ENDLESS` or the size of the held-out set."""
        if self._held_out is None:
            return ENDLESS
        return len(self._held_out)

    def __getitem__(self, index: int) -> Row:
        """Return row ``index``; a prompt row if ``answered=0``."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        rng = Random(f"{self._seed}#{index}")
        if self._held_out is None:
            problem = self._draw(rng, held_out=False)
        else:
            problem = self._held_out[index]
        puzzle = self._kind.pose(problem, rng, self._params)
        messages = [Message("user", puzzle.parts)]
        if self._params["answered"]:
            reply = TextPart(puzzle.response)
            messages.append(Message("assistant", (reply,)))
        return Row(
            tuple(messages),
            puzzle.answer,
            source=self._label,
            id=f"{self._label}#{index}",
            where=f"{self._path}#{index}",
        )

    def _draw(self, rng: Random, held_out: bool) -> Hashable:
        # Narrow parameters may leave one split without a problem.
        for _ in range(10_000):
            problem = self._kind.draw(rng, self._params)
            if is_held_out(problem) == held_out:
                return problem
        raise ConfigError(f"{self._path}: too few problems for this split; widen the parameters")

    def _draw_held_out(self, kind: str) -> Sequence[Hashable]:
        """Draw ``count`` distinct held-out problems; every task and form of a kind sees the same ones."""
        seed = self._params["seed"]
        rng = Random(f"{kind}#{seed}")
        count = self._params["count"]
        problems: dict[Hashable, None] = {}  # a set that keeps the order of drawing
        # Most draws repeat a problem where there are few more than `count`.
        for _ in range(20 * count):
            problem = self._draw(rng, held_out=True)
            problems[problem] = None
            if len(problems) == count:
                return tuple(problems)
        problem_count = len(problems)
        remedy = f"set count={problem_count} or less, or widen the other parameters"
        raise ConfigError(f"{self._path}: only {problem_count} held-out problems found; {remedy}")


def open_puzzle(path: str, name: str | None = None) -> PuzzleSource:
    """Open ``puzzle:KIND?parameter=value&...``.

    Raises:
        ConfigError: the kind or a parameter is unknown, or a value is out of bounds.
    """
    name_and_query = path.removeprefix("puzzle:")
    kind, _, query = name_and_query.partition("?")
    if kind not in KINDS:
        raise ConfigError(f"{path}: no such kind of puzzle; choose one of {', '.join(KINDS)}")
    specs = GENERAL | dict(KINDS[kind].parameters)
    params: dict[str, Any] = {}
    for key, spec in specs.items():
        params[key] = _default(spec)
    try:
        settings = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise ConfigError(f"{path}: {error}; write puzzle:KIND?parameter=value&parameter=value") from error
    for key, text in settings:
        if key not in specs:
            names = ", ".join(specs)
            raise ConfigError(f"{path}: parameter {key!r} is unknown; {kind} takes {names}")
        params[key] = _parse_value(path, key, text, specs[key])
    return PuzzleSource(path, kind, params, name)


def _default(spec: Number | tuple[str, ...]) -> float | str:
    if isinstance(spec, tuple):
        return spec[0]
    return spec.default


def is_held_out(problem: Hashable) -> bool:
    """Return whether a problem is the one in `HELD_OUT_SHARE` that no train split shows."""
    # SHA-256 and not `hash`, which Python salts anew in each process.
    text = repr(problem)
    digest = hashlib.sha256(text.encode()).digest()
    number = int.from_bytes(digest[:8], "big")
    return number % HELD_OUT_SHARE == 0


def _parse_value(
    path: str,
    key: str,
    text: str,
    spec: Number | tuple[str, ...],
) -> float | str:
    if isinstance(spec, tuple):
        if text not in spec:
            choices = ", ".join(spec)
            raise ConfigError(f"{path}: {key}={text!r} is unknown; choose one of {choices}")
        return text
    try:
        # By the type of its default, a size must be an integer and a share may have decimals.
        value = type(spec.default)(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {key}={text!r} is not a number") from error
    if not spec.low <= value <= spec.high:
        bounds = f"{spec.low}..{spec.high}"
        raise ConfigError(f"{path}: {key}={text} must lie in {bounds}")
    return value
