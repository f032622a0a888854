"""Read boxes and points from text, in the forms that vision-language models write.

These are JSON with ``bbox_2d`` or ``point_2d``, fenced or not, ``<points x1="..." y1="...">``, ``(x1,y1),(x2,y2)``
between ``<|box_start|>`` and ``<|box_end|>`` or ``<box>`` and ``</box>`` behind the name of the object, and bare lists
of four or two numbers; docs/own_reward.md says which models write which.

The tokens with bars are special ones, which a decoded response does not show, so that the numbers are read without them
as well.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovr_megatron.rewards.distances import Box

MAX_TEXT = 32_768
"""Characters of an answer that is read; a longer one is no answer."""
MAX_COORDINATE = 1e6
"""Largest absolute coordinate; a larger one is none."""
_MAX_VALUES = 300  # brackets at which JSON is looked for: a text of brackets alone would take quadratic time
_BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
_POINT_KEYS = ("point_2d", "point")
_LABEL_KEYS = ("label", "name", "text_content")
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_PAIR = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
# Two corners of a box, four of a quadrilateral, joined by commas: what follows without one is another box.
_CORNERS = re.compile(
    rf"(?:(?:<\|object_ref_start\|>|<ref>)(?P<label>[^<>]*)(?:<\|object_ref_end\|>|</ref>)\s*)?"
    rf"(?:(?P<mark><\|(?:box|quad)_start\|>|<box>|<quad>)\s*)?(?P<pairs>{_PAIR}(?:\s*,\s*{_PAIR})*)"
)
_POINTS = re.compile(r"<points?\s(?P<attributes>[^<>]*)>(?P<label>[^<>]*)</points?>")
_ATTRIBUTE = re.compile(rf"([xy])(\d*)\s*=\s*[\"']?({_NUMBER})[\"']?")
_NUMBERS = re.compile(_NUMBER)
_FLAT = re.compile(rf"\(\s*({_NUMBER}(?:\s*,\s*{_NUMBER}){{3}})\s*\)")
_OPENING = re.compile(r"[\[{]")


@dataclass(frozen=True)
class Region:
    """A box or a point (whose corners are equal) with its label, "" without one."""

    box: Box
    label: str = ""
    is_point: bool = False

    @property
    def centre(self) -> tuple[float, float]:
        """Return the middle of the box, or the point itself."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2

    def scaled(self, horizontal: float, vertical: float) -> Region:
        """Return the region with its coordinates multiplied."""
        x0, y0, x1, y1 = self.box
        box = (x0 * horizontal, y0 * vertical, x1 * horizontal, y1 * vertical)
        return Region(box, self.label, self.is_point)


def read_regions(text: str, bare: bool = True) -> list[Region]:
    """Return all boxes and points of ``text`` in order; those with a coordinate that is no usable number are left out.

    The most explicit form that the text has is read and no other: JSON with keys, then marks, then bare numbers, which
    without ``bare`` are no regions.
    """
    if len(text) > MAX_TEXT:
        return []
    values = list(_json_values(text))
    keyed = [region for value in values for region in _keyed_regions(value)]
    if keyed:
        return keyed
    marked = [*_marked_points(text), *_corner_regions(text, marked=True)]
    if marked or not bare:
        return marked
    listed = [region for value in values for region in _listed_regions(value)]
    if listed:
        return listed
    flat = [_region(match[1].split(",")) for match in _FLAT.finditer(text)]
    regions = [region for region in flat if region is not None]
    return regions or list(_corner_regions(text, marked=False))


def _json_values(text: str) -> Iterator[Any]:
    """Yield the JSON lists and objects of a text, those inside of others not again."""
    decoder = json.JSONDecoder()
    end = 0
    for _ in range(_MAX_VALUES):
        opening = _OPENING.search(text, end)
        if opening is None:
            return
        try:
            value, end = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            end = opening.end()
            continue
        yield value


def _keyed_regions(value: Any) -> Iterator[Region]:
    """Yield the regions of the objects in a JSON value that have one of the known keys."""
    if isinstance(value, Mapping):
        label = next((value[key] for key in _LABEL_KEYS if isinstance(value.get(key), str)), "")
        keys = [key for key in (*_BOX_KEYS, *_POINT_KEYS) if key in value]
        for key in keys[:1]:
            for region in _listed_regions(value[key]):
                yield Region(region.box, label, region.is_point)
        if not keys:
            for inner in value.values():
                yield from _keyed_regions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keyed_regions(inner)


def _listed_regions(value: Any) -> Iterator[Region]:
    """Yield the regions of a list of numbers, or of lists of them."""
    if not isinstance(value, list):
        return
    if value and all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        region = _region(value)
        if region is not None:
            yield region
        return
    for inner in value:
        yield from _listed_regions(inner)


def _marked_points(text: str) -> Iterator[Region]:
    """Yield the points of ``<points x1="10" y1="20" x2="30" y2="40" alt="cat">cat</points>``."""
    for match in _POINTS.finditer(text):
        coordinates: dict[str, dict[str, str]] = {}
        for axis, index, number in _ATTRIBUTE.findall(match["attributes"]):
            coordinates.setdefault(index, {})[axis] = number
        for point in coordinates.values():
            if len(point) < 2:
                continue
            region = _region([point["x"], point["y"]], match["label"])
            if region is not None:
                yield region


def _corner_regions(text: str, marked: bool) -> Iterator[Region]:
    """Yield the regions of ``(x1,y1),(x2,y2)``, with ``marked`` only those behind a mark or a name."""
    for match in _CORNERS.finditer(text):
        if marked and match["mark"] is None and match["label"] is None:
            continue
        label = (match["label"] or "").strip()
        numbers = _NUMBERS.findall(match["pairs"])
        if len(numbers) in (4, 8):
            horizontal = [float(number) for number in numbers[::2]]
            vertical = [float(number) for number in numbers[1::2]]
            corners = [min(horizontal), min(vertical), max(horizontal), max(vertical)]
            region = _region(corners, label)
            if region is not None:
                yield region
            continue
        for start in range(0, len(numbers), 2):
            point = _region(numbers[start : start + 2], label)
            if point is not None:
                yield point


def _region(values: Sequence[Any], label: str = "") -> Region | None:
    """Return the box of four numbers, in any order of its corners, or the point of two; None for anything else."""
    if len(values) not in (2, 4):
        return None
    try:
        numbers = [float(value) for value in values]
    except OverflowError:  # an integer of hundreds of digits
        return None
    if not all(math.isfinite(number) and abs(number) <= MAX_COORDINATE for number in numbers):
        return None
    if len(numbers) == 2:
        horizontal, vertical = numbers
        return Region((horizontal, vertical, horizontal, vertical), label, is_point=True)
    x0, x1 = sorted((numbers[0], numbers[2]))
    y0, y1 = sorted((numbers[1], numbers[3]))
    return Region((x0, y0, x1, y1), label)
