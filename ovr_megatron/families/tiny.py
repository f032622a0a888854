"""Small random models, which `ovr_megatron.model.tiny` writes: their sizes, and what differs by family.  No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a small model; the defaults are the miniature's.  ``window`` is in pixels."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 384
    vision_hidden: int = 96
    vision_depth: int = 2
    vision_heads: int = 4
    vision_ffn: int = 192
    window: int = 56
    max_positions: int = 4096
    bpe_vocab: int = 512

    def __post_init__(self) -> None:
        # A head of the tower has pairs for height and as many for width.
        for name, size, heads, step in (
            ("hidden", self.hidden, self.heads, 2),
            ("vision_hidden", self.vision_hidden, self.vision_heads, 4),
        ):
            multiple = heads * step
            if size % multiple:
                raise ValueError(f"{name}={size} must be a multiple of its {heads} heads times {step} (rotary pairs)")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.window < 28 or self.window % 28:
            raise ValueError(f"window={self.window} must be a multiple of 28 pixels (one merged visual token)")

    @property
    def mrope_section(self) -> list[int]:
        """Return the rotary pairs of the time, height and width rows, in the published ratio of 2 : 3 : 3."""
        pairs = self.hidden // self.heads // 2
        side = 3 * pairs // 8
        return [pairs - 2 * side, side, side]


TensorShapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """The files of a family's small random models.

    Attributes:
        config: ``config.json``, of the sizes, the ids of the added tokens, whether the output layer is the embedding,
            the standard deviation of the matrices, and the dtype's name.
        tensors: Hugging Face names with their shapes, in the order in which they are drawn, of the sizes, the
            vocabulary, and whether the output layer is the embedding.
        preprocessor: ``preprocessor_config.json``.
        video_preprocessor: ``video_preprocessor_config.json``; None where Transformers makes the video processor of the
            file of the image processor.
        tokenizer_class: Transformers' class of the tokenizer.
        special_tokens: In the order of their ids, which follow the learned vocabulary.
        added_tokens: Those after the special ones, which are not special.
        chat_template: Jinja source of a base model's template, without a thinking prefix.
    """

    config: Callable[[TinySizes, Mapping[str, int], bool, float, str], dict[str, object]]
    tensors: Callable[[TinySizes, int, bool], TensorShapes]
    preprocessor: Mapping[str, Any]
    tokenizer_class: str
    special_tokens: tuple[str, ...]
    added_tokens: tuple[str, ...]
    chat_template: str
    video_preprocessor: Mapping[str, Any] | None = None
