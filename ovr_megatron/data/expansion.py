"""What the placeholder of an image or a video becomes: ids, and the segments that positions are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.positions import Visual


@dataclass(frozen=True)
class Expansion:
    """The tokens of an image or a video.

    Attributes:
        tokens: Ids, a placeholder for each feature.
        segments: Lengths of stretches of text, and visuals, as `Family.positions` takes them.
    """

    tokens: list[int]
    segments: list[int | Visual]

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Return the patches in time, height and width of each visual, in the order of the tokens."""
        return [segment.grid for segment in self.segments if isinstance(segment, Visual)]


def expand(visual: Visual, shape: ModelShape, encode: Callable[[str], list[int]]) -> Expansion:
    """Return what stands in the place of the one placeholder of ``visual``; ``encode`` returns the ids of a text."""
    placeholder = shape.image_token if visual.seconds is None else shape.video_token
    tokens: list[int] = []
    segments: list[int | Visual] = []
    for piece in family_of(shape).expand(visual, shape, encode):
        if isinstance(piece, Visual):
            tokens += [placeholder] * piece.features(shape.vision.merge)
            segments.append(piece)
        else:
            tokens += piece
            segments.append(len(piece))
    return Expansion(tokens, segments)


def merge_text_lengths(segments: Iterable[int | Visual]) -> list[int | Visual]:
    """Return ``segments`` with a single length for each stretch of text between two visuals."""
    result: list[int | Visual] = []
    for segment in segments:
        before = result[-1] if result else None
        if isinstance(segment, int) and isinstance(before, int):
            result[-1] = before + segment
        else:
            result.append(segment)
    return result
