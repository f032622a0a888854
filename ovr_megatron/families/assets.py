"""The files beside the weights of a model, as far as they differ between families: special tokens and processors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The names of a tokenizer's special tokens.

    Attributes:
        start_of_turn: Opens a message of a chat.
        end_of_turn: Closes a message; a response ends with it.
        end_of_text: Ends a text of the pre-training, and pads.
        image: Placeholder of an image's features.
        video: Placeholder of a video's features.
        vision_start: Stands before a placeholder.
        vision_end: Stands behind a placeholder.
    """

    start_of_turn: str
    end_of_turn: str
    end_of_text: str
    image: str
    video: str
    vision_start: str
    vision_end: str

    @property
    def chat(self) -> tuple[str, str, str]:
        """Return the tokens that chats and texts are made with."""
        return self.start_of_turn, self.end_of_turn, self.end_of_text

    @property
    def ends(self) -> tuple[str, str]:
        """Return the tokens that end a response."""
        return self.end_of_turn, self.end_of_text


@dataclass(frozen=True, kw_only=True)
class ProcessorFiles:
    """Transformers' processor of a family, and what its folders say of it.

    Attributes:
        load_class: Imports and returns the class that ``AutoProcessor`` gives for a folder.
        image_class_prefix: The name of the image processor's class begins with it.
        video_class_prefix: That of the video processor's class.
        image_processor: ``preprocessor_config.json`` of every published model, as far as they agree.
        renamed_types: Early values of ``image_processor_type`` that Transformers no longer knows.
        think_template: Jinja file of the chat template that opens a thought.
    """

    load_class: Callable[[], type[Any]]
    image_class_prefix: str
    video_class_prefix: str
    image_processor: Mapping[str, Any]
    renamed_types: tuple[str, ...]
    think_template: Path
