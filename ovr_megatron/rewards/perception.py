"""Rules for perception: boxes, points, counts and read text, compared with a reference that needs no judge.

Reference and response must have the same coordinates.  Many models write pixels of the image as they see it, after
resizing; a rule scales references that are in another frame (`FRAMES`).
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ovr_megatron.rewards.distances import edit_distance, overlap
from ovr_megatron.rewards.grounding import MAX_TEXT, Region, read_regions
from ovr_megatron.rewards.latex import BOX, final_part, last_box
from ovr_megatron.rewards.verdict import GradeRequest, Reason, RuleError, Verdict

if TYPE_CHECKING:  # a program that only grades loads neither images nor NumPy
    from ovr_megatron.data.schema import ImageSize

MAX_BOXES = 200
"""Boxes of an answer at most; more are no answer."""
Frame = Callable[["ImageSize"], tuple[float, float]]
FRAMES: dict[str, Frame] = {
    "original": lambda size: (size.resized_width / size.width, size.resized_height / size.height),
    "unit": lambda size: (size.resized_width, size.resized_height),
    "thousandths": lambda size: (size.resized_width / 1000, size.resized_height / 1000),
}
"""By the name of a reference's coordinates, the factors to pixels of the resized image."""
_FENCE = re.compile(r"\s*```[\w-]*\n(.*?)\n?```\s*", re.DOTALL)
# No part of a decimal, a negative number, a word or a range (3-5).
_INTEGER = re.compile(r"(?<![\w.,-])(?:\d{1,3}(?:,\d{3}){1,2}|\d{1,9})(?:\.0+)?(?!\w|[.,]\d|\s*[-\u2013]\s*\d)")
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
_WORD = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)


@dataclass(frozen=True)
class RuleParameters:
    """Parameters of a rule, behind its name and separated by colons.

    Attributes:
        number: The threshold or distance; None without one.
        flags: The words beside it.
        frame: The coordinates of the reference; None for those of the response.
    """

    number: float | None
    flags: frozenset[str]
    frame: str | None

    def reference(self, request: GradeRequest) -> list[Region]:
        """Return the regions of the reference in the coordinates of the response.

        Raises:
            ValueError: the coordinates are to be scaled, and the size of the image is not known.
        """
        regions = read_regions(request.answer)
        if self.frame is None:
            return regions
        if request.image is None:
            raise ValueError(f"the size of the image, by which coordinates {self.frame} are scaled, is not known")
        factors = FRAMES[self.frame](request.image)
        return [region.scaled(*factors) for region in regions]


def read_parameters(
    name: str,
    parameters: str,
    words: Collection[str],
    largest: float,
    has_frame: bool,
) -> RuleParameters:
    """Read the ``parameters`` of the rule called ``name``.

    Args:
        name: Name of the rule, for errors.
        parameters: Text behind the name and a colon, "" without one.
        words: Words that the rule knows.
        largest: Largest number; 0: the rule has none.
        has_frame: Whether references have coordinates.

    Raises:
        RuleError: a parameter is not known, comes twice, or lies out of its range.
    """
    number: float | None = None
    flags = set()
    frame: str | None = None
    allowed = [*words, *(FRAMES if has_frame else ())]
    for parameter in filter(None, parameters.split(":")):
        if has_frame and parameter in FRAMES and frame is None:
            frame = parameter
        elif parameter in words and parameter not in flags:
            flags.add(parameter)
        else:
            number = _read_number(name, parameter, allowed, largest, number)
    return RuleParameters(number, frozenset(flags), frame)


def _read_number(name: str, text: str, words: Sequence[str], largest: float, previous: float | None) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if previous is not None or not 0 < number <= largest:
        bound = f"a number above 0{'' if math.isinf(largest) else f' and at most {largest:g}'}"
        choices = [*([bound] if largest else []), *words]
        raise RuleError(f"{name}: {text!r} is no parameter of this rule; it takes {' or '.join(choices) or 'none'}")
    return number


def answer_of(request: GradeRequest) -> str | None:
    r"""Return the final answer of a response: the last box, else the last ``<answer>``, else all after the thought.

    None without an end of the thought, where a box is never closed, and where the answer is longer than `MAX_TEXT`.
    """
    part = final_part(request.response, request.thinking)
    if part is None:
        return None
    if BOX.search(part):
        box = last_box(part)
        if box is None:
            return None
        # In mathematics braces and underscores are escaped.
        part = re.sub(r"\\([{}_])", r"\1", box)
    elif "</answer>" in part:
        part = part.rpartition("</answer>")[0].rpartition("<answer>")[2]
    part = part.strip()
    return part if 0 < len(part) <= MAX_TEXT else None


def box_rule(parameters: str) -> Callable[[GradeRequest], Verdict]:
    """Return the rule of one box: its overlap with the reference, or with a threshold whether it reaches that."""
    settings = read_parameters("box", parameters, (), 1.0, has_frame=True)

    def grade(request: GradeRequest) -> Verdict:
        regions = _response_regions(request)
        boxes = list(dict.fromkeys(region.box for region in regions if not region.is_point))
        if not boxes:
            return Verdict(Reason.UNREADABLE)
        if len(boxes) > 1:
            return Verdict(Reason.SEVERAL_ANSWERS, _shown(boxes))
        [reference] = settings.reference(request)
        share = overlap(boxes[0], reference.box)
        return _score(share, settings.number, f"IoU {share:.4f}")

    return grade


def boxes_rule(parameters: str) -> Callable[[GradeRequest], Verdict]:
    """Return the rule of several boxes, matched with those of the reference by the Hungarian method.

    The score is twice the sum of the overlaps of matched boxes over the number of boxes of both; with a threshold,
    pairs that reach it count 1 and others 0 (F1).  With ``labels`` boxes of different labels do not match.
    """
    settings = read_parameters("boxes", parameters, ("labels",), 1.0, has_frame=True)

    def grade(request: GradeRequest) -> Verdict:
        boxes = [region for region in _response_regions(request) if not region.is_point]
        if not boxes:
            return Verdict(Reason.UNREADABLE)
        if len(boxes) > MAX_BOXES:
            return Verdict(Reason.SEVERAL_ANSWERS, f"{len(boxes)} boxes")
        references = settings.reference(request)
        # Only graders import SciPy, and of them only those that match boxes.
        from scipy.optimize import linear_sum_assignment  # noqa: PLC0415

        gains = [[0.0] * len(references) for _ in boxes]
        for i, box in enumerate(boxes):
            for j, reference in enumerate(references):
                if "labels" in settings.flags and _label(box) != _label(reference):
                    continue
                share = overlap(box.box, reference.box)
                gains[i][j] = share if settings.number is None else float(share >= settings.number)
        rows, columns = linear_sum_assignment(gains, maximize=True)
        total = sum(gains[i][j] for i, j in zip(rows, columns, strict=True))
        score = 2 * total / (len(boxes) + len(references))
        return Verdict(Reason.SCORE, f"{len(boxes)} boxes, {len(references)} in the reference", min(score, 1.0))

    return grade


def point_rule(parameters: str) -> Callable[[GradeRequest], Verdict]:
    """Return the rule of a point: right inside a box of the reference, or within a distance in pixels of it."""
    settings = read_parameters("point", parameters, (), math.inf, has_frame=True)

    def grade(request: GradeRequest) -> Verdict:
        points = list(dict.fromkeys(region.centre for region in _response_regions(request)))
        if not points:
            return Verdict(Reason.UNREADABLE)
        if len(points) > 1:
            return Verdict(Reason.SEVERAL_ANSWERS, _shown(points))
        distance = min(_distance(points[0], region) for region in settings.reference(request))
        is_right = distance <= (settings.number or 0.0)
        return Verdict(Reason.SCORE, f"{distance:.1f} pixels off", float(is_right))

    return grade


def count_rule(parameters: str) -> Callable[[GradeRequest], Verdict]:
    """Return the rule of a count: the same whole number, or with ``graded`` 1 less the relative error.

    A list of boxes or points counts as its length.
    """
    settings = read_parameters("count", parameters, ("graded",), 0.0, has_frame=False)

    def grade(request: GradeRequest) -> Verdict:
        answer = answer_of(request)
        counts = _counts(answer) if answer is not None else set()
        if not counts:
            return Verdict(Reason.UNREADABLE)
        if len(counts) > 1:
            return Verdict(Reason.SEVERAL_ANSWERS, _shown(sorted(counts)))
        [count] = counts
        [reference] = _counts(request.answer)
        score = float(count == reference)
        if "graded" in settings.flags:
            score = max(0.0, 1.0 - abs(count - reference) / max(reference, 1))
        return Verdict(Reason.SCORE, str(count), score)

    return grade


def ocr_rule(parameters: str) -> Callable[[GradeRequest], Verdict]:
    """Return the rule of read text: 1 less the edit distance over the longer text, or whether that reaches a threshold.

    Runs of white space count as one space; with ``nocase`` capitals count as small letters.
    """
    settings = read_parameters("ocr", parameters, ("nocase",), 1.0, has_frame=False)

    def grade(request: GradeRequest) -> Verdict:
        answer = answer_of(request)
        if answer is None:
            return Verdict(Reason.UNREADABLE)
        texts = [_plain_text(text, "nocase" in settings.flags) for text in (answer, _reference_text(request.answer))]
        longest = max(map(len, texts))
        similarity = 1.0 - edit_distance(*texts) / longest if longest else 1.0
        return _score(similarity, settings.number, f"similarity {similarity:.4f}")

    return grade


def reference_problem(kind: str, parameters: str, answer: str) -> str | None:
    """Return why ``answer`` is no reference of the perception rule ``kind``, None if it is one."""
    if not answer.strip():
        return "it is empty"
    if len(answer) > MAX_TEXT:
        return f"it has {len(answer)} characters and a reference at most {MAX_TEXT}"
    if kind == "count":
        return None if len(_counts(answer)) == 1 else "it is not one whole number"
    if kind == "ocr":
        return None
    regions = read_regions(answer)
    boxes = [region for region in regions if not region.is_point]
    if kind == "point":
        if not regions:
            return "it has no box and no point"
        if len(boxes) < len(regions) and read_parameters(kind, parameters, (), math.inf, has_frame=True).number is None:
            return "it is a point, which needs a distance in pixels, as in point:20"
        return None
    if not boxes or len(boxes) < len(regions):
        return "it is no box"
    if kind == "box" and len(boxes) > 1:
        return f"it has {len(boxes)} boxes, which the rule boxes compares"
    if len(boxes) > MAX_BOXES:
        return f"it has {len(boxes)} boxes and a reference at most {MAX_BOXES}"
    return None


def needs_image(parameters: str) -> bool:
    """Return whether a rule with these parameters scales coordinates by the size of the row's image."""
    return not FRAMES.keys().isdisjoint(parameters.split(":"))


def _response_regions(request: GradeRequest) -> list[Region]:
    answer = answer_of(request)
    return [] if answer is None else read_regions(answer)


def _score(share: float, threshold: float | None, text: str) -> Verdict:
    score = share if threshold is None else float(share >= threshold)
    return Verdict(Reason.SCORE, text, score)


def _shown(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))[:200]


def _label(region: Region) -> str:
    return " ".join(region.label.casefold().split())


def _distance(point: tuple[float, float], region: Region) -> float:
    """Return the distance in pixels of a point from the nearest point of a region, 0 inside."""
    x0, y0, x1, y1 = region.box
    horizontal = max(x0 - point[0], 0.0, point[0] - x1)
    vertical = max(y0 - point[1], 0.0, point[1] - y1)
    return math.hypot(horizontal, vertical)


def _counts(answer: str) -> set[int]:
    """Return the distinct whole numbers of an answer, in digits or as English words; of regions their number."""
    regions = read_regions(answer, bare=False)
    if regions:
        return {len(regions)}
    counts = {int(number.partition(".")[0].replace(",", "")) for number in _INTEGER.findall(answer)[:100]}
    return counts | {_WORDS.index(word.lower()) for word in _WORD.findall(answer)}


def _reference_text(answer: str) -> str:
    """Return a reference text; one that is written as a JSON string is decoded."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return answer
    return value if isinstance(value, str) else answer


def _plain_text(text: str, ignore_case: bool) -> str:
    fenced = _FENCE.fullmatch(text)
    if fenced:
        text = fenced[1]
    text = unicodedata.normalize("NFC", text)
    if ignore_case:
        text = text.casefold()
    return " ".join(text.split())


PERCEPTION = {"box": box_rule, "boxes": boxes_rule, "point": point_rule, "count": count_rule, "ocr": ocr_rule}
"""By name, functions from the parameters of a rule to the rule."""
