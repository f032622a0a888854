"""From rows to samples: tokens, training targets, patches and positions.

One `Processor` serves every use: supervised samples, prompts for the rollout engine, and what the engine
answered.  It is the only place where an image becomes tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from transformers import AutoProcessor

from ovr_megatron.config import DataConfig
from ovr_megatron.data.images import load_media
from ovr_megatron.data.pixels import PixelProcessor, Video, stack_frames
from ovr_megatron.data.positions import AFTER_VIDEO, Visual, continue_positions, mrope_positions
from ovr_megatron.data.rendering import ChatTemplate
from ovr_megatron.data.schema import ImagePart, Row, RowError, TextPart, VideoPart
from ovr_megatron.errors import UserError
from ovr_megatron.model.shape import ModelShape

THINK_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
THINK = "<think>"


class TemplateError(UserError, ValueError):
    """A chat template that is missing, or that does not place each image and video once and in order."""


class TooLongError(RowError):
    """A sound row that is longer than a limit: to be dropped and counted, never cut."""


@dataclass
class Sample:
    """One document, ready to be packed or sent to the rollout engine.  S tokens, P patches, F features.

    Attributes:
        tokens: int64[S]; each image and video takes one token per feature.
        loss_mask: bool[S]; True where the token itself is a training target.
        position_ids: int64[3, S].
        patches: float32[P, patch_dim], of images and videos in the order of the tokens.
        grid_thw: int64[n, 3], patches in time, height and width of each image or video.
        placement: int64[F], index in ``tokens`` of each feature; F = P / merge^2.
        images: Pictures for the engine.
        videos: Videos for the engine.
        prompt_tokens: The engine's prompt: one placeholder for each image or video, no response.
        row: Where it comes from.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    position_ids: np.ndarray
    patches: np.ndarray
    grid_thw: np.ndarray
    placement: np.ndarray
    images: list[PIL.Image.Image]
    videos: list[Video]
    prompt_tokens: list[int]
    row: Row

    def __len__(self) -> int:
        """Return S."""
        return len(self.tokens)


@dataclass
class _Draft:
    """A row that is tokenised and whose media are opened; ``visuals`` are in the order of the tokens."""

    row: Row
    prompt: list[int]
    response: list[int]
    images: list[PIL.Image.Image]
    videos: list[Video]
    visuals: list[Visual]


class Processor:
    """Tokenizer, chat template and image processor of one model folder under one image budget.

    Attributes:
        tokenizer: The folder's Hugging Face tokenizer.
        shape: The folder's model shape.
        chat_template: Jinja source in use.
        end_token: Id of ``<|im_end|>``, which closes a response.
        mm_processor_kwargs: The image budget in the form that vLLM's argument of this name takes.
    """

    def __init__(self, model_dir: str | Path, config: DataConfig, after_video: str = "grid") -> None:
        """Load the processor of a local folder.

        Args:
            model_dir: Hugging Face Qwen2.5-VL folder.
            config: Template, image budget and limits.
            after_video: How `mrope_positions` goes on after a video: ``grid`` as Transformers 5.3 and later
                do, ``extent`` as vLLM does.

        Raises:
            TemplateError: the ``model`` template is asked for and the folder has none.
            ShapeError: the folder is not a Qwen2.5-VL model.
        """
        assert after_video in AFTER_VIDEO, after_video
        self.config, self.after_video = config, after_video
        self.shape = ModelShape.from_hf(model_dir)
        folder = AutoProcessor.from_pretrained(str(model_dir), local_files_only=True)
        self.tokenizer = folder.tokenizer
        self.chat_template = _template(config.template, folder)
        if not self.chat_template:
            raise TemplateError(f"{model_dir} has no chat template; set data.template=think or add one to the folder")
        self._chat = ChatTemplate(self.tokenizer, self.chat_template)
        if "<|im_end|>" not in self._chat.special:
            raise TemplateError(f"the tokenizer of {model_dir} lacks <|im_end|>; it is not Qwen2.5-VL's")
        self.end_token = self._chat.special["<|im_end|>"]
        self._pixels = PixelProcessor(folder.image_processor, folder.video_processor, self.shape.vision, config)
        self.mm_processor_kwargs = self._pixels.mm_processor_kwargs

    def encode(self, rows: Sequence[Row], generation: bool) -> list[Sample]:
        """Turn rows into samples; the images of all rows are processed in one call.

        Args:
            rows: Rows to learn from, or to answer.
            generation: Whether the sample ends after the generation prompt (a final assistant message is left
                out).  If not, the final assistant message and the end token follow and are the target.

        Raises:
            TooLongError: a prompt is over ``data.max_prompt_tokens``, or a row is longer than the model's positions.
            RowError: an image cannot be used, ``data.max_images`` or ``data.max_frames`` is passed, or a row to
                learn from has no assistant message.
        """
        drafts = self._drafts(rows, generation)
        for draft in drafts:
            if error := self._too_long(draft):
                raise error
        return [self._sample(draft, parts) for draft, parts in zip(drafts, self._patches(drafts), strict=True)]

    def lengths(self, rows: Sequence[Row], generation: bool) -> list[int | TooLongError]:
        """Return the tokens of each row's sample, exactly; pixels are opened but not processed.

        A row that is too long for `encode` gives its error in place of a number, to be counted.

        Raises:
            RowError: as `encode`.
        """
        drafts = self._drafts(rows, generation)
        return [self._too_long(draft) or self._prompt_length(draft) + len(draft.response) for draft in drafts]

    def response_sample(self, sample: Sample, response_tokens: Sequence[int] | np.ndarray) -> Sample:
        """Append the engine's tokens to a prompt's sample, as they are; they are its target."""
        response = np.asarray(response_tokens, np.int64)
        positions = continue_positions(sample.position_ids, len(response))
        return replace(
            sample,
            tokens=np.concatenate([sample.tokens, response]),
            loss_mask=np.concatenate([sample.loss_mask, np.ones(len(response), bool)]),
            position_ids=np.concatenate([sample.position_ids, positions], axis=1),
        )

    def decode(self, tokens: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Return the text of ``tokens``."""
        return self.tokenizer.decode([int(token) for token in tokens], skip_special_tokens=skip_special_tokens)

    def _drafts(self, rows: Sequence[Row], generation: bool) -> list[_Draft]:
        for row in rows:
            if row.is_prompt and not generation:
                remedy = "a row to learn from ends with an assistant message; add it or remove the row"
                raise RowError(row.where, "messages", "the last message is the user's", remedy)
        responses = [] if generation else [self._response(row) for row in rows]
        prompts, answers = self._chat.tokenise([row.prompt for row in rows], responses)
        tails = [[] for _ in rows] if generation else [[*answer, self.end_token] for answer in answers]
        return [self._draft(*item) for item in zip(rows, prompts, tails, strict=True)]

    def _response(self, row: Row) -> str:
        """The assistant's text from where the generation prompt ends."""
        text = row.response or ""
        opened = self.config.template == "think" and text.startswith(THINK)
        return text.removeprefix(THINK).removeprefix("\n") if opened else text

    def _draft(self, row: Row, prompt: list[int], response: list[int]) -> _Draft:
        parts = [part for message in row.prompt for part in message.parts if not isinstance(part, TextPart)]
        kinds = {self.shape.image_token: ImagePart, self.shape.video_token: VideoPart}
        placed = [kinds[token] for token in prompt if token in kinds]
        if placed != [type(part) for part in parts]:
            raise TemplateError(
                f"{row.where}: the chat template places {len(placed)} images and videos where the row has "
                f"{len(parts)}, or another order; use data.template=think or correct the folder's template"
            )
        images, frames = load_media(row, self.config)
        moving = [part for part in parts if isinstance(part, VideoPart)]
        videos = [stack_frames(pictures, part, row) for pictures, part in zip(frames, moving, strict=True)]
        stills, movings = map(self._pixels.still, images), map(self._pixels.moving, videos)
        visuals = [next(stills if isinstance(part, ImagePart) else movings) for part in parts]
        return _Draft(row, prompt, response, images, videos, visuals)

    def _prompt_length(self, draft: _Draft) -> int:
        merge = self.shape.vision.merge
        return len(draft.prompt) + sum(visual.features(merge) - 1 for visual in draft.visuals)

    def _too_long(self, draft: _Draft) -> TooLongError | None:
        prompt, positions = self._prompt_length(draft), self.shape.max_positions
        length, limit = prompt + len(draft.response), self.config.max_prompt_tokens
        if prompt > limit:
            problem = f"the prompt takes {prompt} tokens, more than data.max_prompt_tokens={limit}"
            remedy = "shorten the row, shrink its images or raise the limit"
        elif length > positions:
            problem = f"the row takes {length} tokens, more than the model's {positions} positions"
            remedy = "shorten the row, or give the model more with tools/convert_from_hf.py --yarn"
        else:
            return None
        return TooLongError(draft.row.where, "messages", problem, remedy)

    def _patches(self, drafts: list[_Draft]) -> list[list[np.ndarray]]:
        """Patches of each image and video of each draft, in the order of its tokens."""
        images = [image for draft in drafts for image in draft.images]
        videos = [video for draft in drafts for video in draft.videos]
        still, moving = self._pixels.patches(images, videos)
        return [[next(still if v.seconds is None else moving) for v in draft.visuals] for draft in drafts]

    def _sample(self, draft: _Draft, patches: list[np.ndarray]) -> Sample:
        vision = self.shape.vision
        features = [visual.features(vision.merge) for visual in draft.visuals]
        assert [len(part) for part in patches] == [count * vision.merge**2 for count in features], "grid and pixels"
        prompt = np.array(draft.prompt, np.int64)
        is_visual = (prompt == self.shape.image_token) | (prompt == self.shape.video_token)
        repeats = np.ones(len(prompt), np.int64)
        repeats[is_visual] = features
        tokens = np.concatenate([np.repeat(prompt, repeats), np.array(draft.response, np.int64)])

        segments: list[int | Visual] = []
        start = 0
        for index, visual in zip(np.flatnonzero(is_visual), draft.visuals, strict=True):
            segments += [int(index) - start, visual]
            start = int(index) + 1
        segments.append(len(prompt) - start + len(draft.response))
        return Sample(
            tokens=tokens,
            loss_mask=np.arange(len(tokens)) >= len(tokens) - len(draft.response),
            position_ids=mrope_positions(segments, vision.merge, vision.tokens_per_second, self.after_video),
            patches=np.concatenate([np.zeros((0, vision.patch_dim), np.float32), *patches]),
            grid_thw=np.array([visual.grid for visual in draft.visuals], np.int64).reshape(-1, 3),
            placement=np.flatnonzero(np.repeat(is_visual, repeats)),
            images=draft.images,
            videos=draft.videos,
            prompt_tokens=draft.prompt,
            row=draft.row,
        )


def _template(name: str, folder: Any) -> str | None:
    if name == "think":
        return THINK_TEMPLATE.read_text(encoding="utf-8")
    return folder.chat_template or folder.tokenizer.chat_template
