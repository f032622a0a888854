"""A handful of rollouts to read: early, middle and late ones, with and without an image, right and wrong."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

PER_ITERATION = 4
MAX_SIDE = 512  # pixels of an embedded image


@dataclass(frozen=True)
class Picture:
    """A PNG of ``width`` pixels."""

    png: bytes
    width: int


@dataclass(frozen=True)
class Moment:
    """Some rollouts of one iteration; ``name`` says where in the run it lies."""

    name: str
    iteration: int
    rollouts: list[dict[str, Any]]


def moments(run: Path) -> list[Moment]:
    """Pick rollouts of the first, the middle and the last iteration of the RL run folder ``run``.

    Only three files are read, whatever the length of the run.
    """
    files = sorted((run / "rollouts").glob("*.jsonl"))
    names = {0: "Early"} | ({len(files) // 2: "Middle"} if len(files) > 2 else {}) | {len(files) - 1: "Late"}
    if len(files) < 2:
        names = dict.fromkeys(range(len(files)), "So far")
    return [Moment(name, int(files[at].stem), pick(_rows(files[at]))) for at, name in names.items()]


def pick(rollouts: list[dict[str, Any]], count: int = PER_ITERATION) -> list[dict[str, Any]]:
    """Choose ``count`` rollouts: each source in turn, right and wrong ones, of other prompts where possible.

    Of a source whose prompts have images only those are taken whose image the run has kept.
    """
    pictured = {rollout["source"] for rollout in rollouts if rollout.get("image")}
    kinds: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for rollout in rollouts:
        if rollout.get("image") or rollout["source"] not in pictured:
            kinds.setdefault((not rollout["reward"], rollout["source"]), []).append(rollout)
    queues = [kinds[kind] for kind in sorted(kinds)]
    chosen: list[dict[str, Any]] = []
    while queues and len(chosen) < count:
        queue = queues.pop(0)
        asked = {_problem(rollout) for rollout in chosen}
        chosen.append(queue.pop(next((i for i, rollout in enumerate(queue) if _problem(rollout) not in asked), 0)))
        queues += [queue] if queue else []
    return chosen


def read_picture(run: Path, name: str) -> Picture | None:
    """Return the image ``name`` of the run folder, at most `MAX_SIDE` pixels wide or high.

    None if it is missing, unreadable, or outside the run folder.
    """
    path = (run / name).resolve()
    if not path.is_relative_to(run.resolve()):
        return None
    try:
        with PIL.Image.open(path) as image:
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return None
    return Picture(buffer.getvalue(), image.width)


def _problem(rollout: dict[str, Any]) -> tuple[str, str | None]:
    return rollout["prompt"], rollout.get("image")


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rollouts of one file; a last line that is still being written is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
