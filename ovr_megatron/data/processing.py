"""Turn rows into samples: tokens, training targets, patches and positions.

One `Processor` serves every use: supervised samples, prompts for the rollout engine, and the engine's responses.
It is the only place where an image becomes tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image

from ovr_megatron.config import DataConfig
from ovr_megatron.data.hf_assets import check_template, complete_folder, load_assets
from ovr_megatron.data.images import check_counts, image_size, load_media
from ovr_megatron.data.pixels import PixelProcessor, Video, frame_size, stack_frames
from ovr_megatron.data.rendering import Chat, ChatTemplate, TemplateError, TokenisedChat
from ovr_megatron.data.schema import ImagePart, Message, Row, RowError, TextPart, VideoPart
from ovr_megatron.data.traces import END_OF_THOUGHT, continuation, convert, convert_instruction, problem_of
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.positions import Visual

TEMPLATE_NOTICE = (
    "data.template=think: chats are written with this project's template in place of the model folder's own, and "
    "replies begin after an opened <think>; data.template=model takes the folder's"
)
NO_THOUGHT = f"\n{END_OF_THOUGHT}\n\n"  # closes an opened thought at once


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
        row: The row that the sample was made of.
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
    """A row that is tokenised and whose media are measured; ``visuals`` are in the order of the tokens."""

    row: Row
    chat: TokenisedChat
    visuals: list[Visual]


class Processor:
    """Tokenizer, chat template and image processor of one model folder under one image budget.

    Attributes:
        folder: The model folder, or what `complete_folder` puts in its place.
        tokenizer: The folder's Hugging Face tokenizer.
        shape: The folder's model shape.
        chat_template: Jinja source in use.
        template_notice: One sentence where ``chat_template`` is not the folder's own, else empty.
        end_token: Id of the token that closes a response.
        mm_processor_kwargs: The image budget in the form that vLLM's argument of this name takes.
        after_video: How positions go on after a video, see `Family.positions`: ``data.after_video``, else what the
            folder says that its model was trained with, else as vLLM serves it.
    """

    def __init__(self, model_dir: str | Path, config: DataConfig) -> None:
        """Load the processor of a local folder.

        Args:
            model_dir: Hugging Face folder of a model.
            config: Template, image budget and limits.

        Raises:
            TemplateError: the ``model`` template is asked for and the folder has none.
            AssetError: tokenizer, processor or template is missing, broken, or does not fit the model.
            ShapeError: the folder is not a model of a known family.
        """
        self.config = config
        self.shape = ModelShape.from_hf(model_dir)
        self._family = family_of(self.shape)
        self.after_video = config.after_video or self.shape.after_video or self._family.served_after_video
        self.folder = complete_folder(Path(model_dir))
        assets = load_assets(self.folder, self.shape)
        self.tokenizer = assets.tokenizer
        folder_template = assets.chat_template
        self.chat_template = folder_template
        if config.template == "think":
            self.chat_template = self._family.processor.think_template.read_text(encoding="utf-8")
        self.template_notice = TEMPLATE_NOTICE if folder_template and folder_template != self.chat_template else ""
        if not self.chat_template:
            raise TemplateError(f"{model_dir} has no chat template; set data.template=think or add one to the folder")
        self._chat = ChatTemplate(self.tokenizer, self.chat_template, self._family)
        check_template(self.chat_template, self._chat.special, model_dir)
        self._chat.check_text(model_dir)
        self.end_token = self._chat.end_token
        self._pixels = PixelProcessor(assets.image_processor, assets.video_processor, self.shape, config)
        self.mm_processor_kwargs = self._pixels.mm_processor_kwargs

    def encode(self, rows: Sequence[Row], generation: bool) -> list[Sample]:
        """Turn rows into samples; the images of all rows are processed in one call.

        Args:
            rows: Rows to learn from, or to answer.
            generation: Whether the sample ends after the generation prompt (a final assistant message is left
                out).  If not, the final assistant message and the end token follow.  They are the target, and with
                ``data.learn=all`` so are the assistant messages before.

        Raises:
            TooLongError: a prompt is over ``data.max_prompt_tokens``, or a row is longer than the model's positions.
            RowError: an image cannot be used, ``data.max_images`` or ``data.max_frames`` is passed, or a row to
                learn from has no assistant message, or one that does not fit the template's opened thought.
        """
        drafts = self._build_drafts(rows, generation)
        # All lengths before any pixel: a row that is too long costs no decoding.
        for draft in drafts:
            if error := self._length_error(draft):
                raise error
        media = [load_media(draft.row, self.config) for draft in drafts]
        images = [pictures for pictures, _ in media]
        videos = [_stack_videos(frames, draft.row) for (_, frames), draft in zip(media, drafts, strict=True)]
        patches = self._process_pixels(drafts, images, videos)
        return [self._build_sample(*item) for item in zip(drafts, images, videos, patches, strict=True)]

    def lengths(self, rows: Sequence[Row], generation: bool, decode: bool = False) -> list[int | TooLongError]:
        """Return the tokens of each row's sample, exactly; of an image only the header is read.

        A row that is too long for `encode` gives its error in place of a number, to be counted.

        Args:
            rows: As for `encode`.
            generation: As for `encode`.
            decode: Whether to decode every image, so that a damaged one is an error here and not in `encode`.

        Raises:
            RowError: as `encode`.
        """
        drafts = self._build_drafts(rows, generation)
        if decode:
            for draft in drafts:
                load_media(draft.row, self.config)
        return [self._length_error(draft) or self._sample_length(draft) for draft in drafts]

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

    def _build_drafts(self, rows: Sequence[Row], generation: bool) -> list[_Draft]:
        """Tokenise the texts of ``rows`` in one batch and measure their media."""
        rows = [self._convert_traces(row) for row in rows]
        if generation:
            chats = [Chat(row.prompt) for row in rows]
        else:
            rows = [self._cut_after_learned(row) for row in rows]
            chats = [self._supervised_chat(row) for row in rows]
        tokenised = self._chat.tokenise(chats)
        return [self._build_draft(row, chat) for row, chat in zip(rows, tokenised, strict=True)]

    def _convert_traces(self, row: Row) -> Row:
        """Return the row with its reasoning traces in the form that an opened thought continues."""
        if not self._chat.opens_thought:
            return row
        return replace(row, messages=tuple(converted_message(message) for message in row.messages))

    def _cut_after_learned(self, row: Row) -> Row:
        """Return the row up to the last message that is learned.

        Raises:
            RowError: there is none.
        """
        if row.is_prompt:
            remedy = "a row to learn from ends with an assistant message; add it or remove the row"
            raise RowError(row.where, "messages", "the last message is the user's", remedy)
        learned = _learned_messages(row)
        if not learned:
            raise RowError(row.where, "messages", "has no message of weight 1 to learn from", "remove the row")
        return replace(row, messages=row.messages[: learned[-1] + 1])

    def _supervised_chat(self, row: Row) -> Chat:
        """Return the chat of a row to learn from, each learned reply as it follows the generation prompt."""
        last = len(row.messages) - 1
        replies = {}
        if self.config.learn == "all":
            earlier = [index for index in _learned_messages(row) if index < last]
            replies = {index: self._reply_text(row, index) for index in earlier}
        return Chat(row.prompt, replies, self._reply_text(row, last))

    def _reply_text(self, row: Row, index: int) -> str:
        """Return the text of an assistant message from where the generation prompt ends.

        Raises:
            RowError: the generation prompt opens a thought, and the text does not close it, or opens another.
        """
        reply = row.messages[index].text
        policy = self.config.without_thought
        if not self._chat.opens_thought:
            return reply
        text = continuation(reply)
        if policy == "open" or not (problem := problem_of(text)):
            return text
        if policy == "close" and text == reply and END_OF_THOUGHT not in text:
            return NO_THOUGHT + text
        remedy = "correct the row; for chats without thoughts set data.without_thought=close or data.template=model"
        if index < len(row.messages) - 1:
            remedy += ", or data.learn=last to learn the last reply alone"
        raise RowError(row.where, f"messages[{index}]", problem, remedy)

    def _build_draft(self, row: Row, chat: TokenisedChat) -> _Draft:
        """Measure the media of ``row`` and check that the template has a placeholder for each, in order."""
        prompt_parts = itertools.chain.from_iterable(message.parts for message in row.prompt)
        media = [part for part in prompt_parts if not isinstance(part, TextPart)]
        part_types = {self.shape.image_token: ImagePart, self.shape.video_token: VideoPart}
        placeholders = [part_types[token] for token in chat.prompt if token in part_types]
        if placeholders != [type(part) for part in media]:
            raise TemplateError(
                f"{row.where}: the chat template places {len(placeholders)} images and videos where the row has "
                f"{len(media)}, or another order; use data.template=think or correct the folder's template"
            )
        check_counts(row, self.config)
        return _Draft(row, chat, [self._measure_visual(part, row) for part in media])

    def _measure_visual(self, part: ImagePart | VideoPart, row: Row) -> Visual:
        """Return the grid that an image or a video will have."""
        if isinstance(part, ImagePart):
            return self._pixels.still(*image_size(part, self.config))
        sizes = [image_size(frame, self.config) for frame in part.frames]
        return self._pixels.moving(len(sizes), *frame_size(sizes, row), part.fps)

    def _prompt_length(self, draft: _Draft) -> int:
        """Count the tokens before the first that is learned; of a prompt that is to be answered, all of them."""
        learned = draft.chat.learned
        count = learned.index(True) if any(learned) else len(learned)
        visuals = sum(self._is_visual(token) for token in draft.chat.prompt[:count])
        return count + self._added_tokens(draft.visuals[:visuals])

    def _sample_length(self, draft: _Draft) -> int:
        return len(draft.chat.prompt) + self._added_tokens(draft.visuals) + len(draft.chat.response)

    def _added_tokens(self, visuals: Sequence[Visual]) -> int:
        """Count the tokens of ``visuals`` beyond the one placeholder of each."""
        return sum(visual.features(self.shape.vision.merge) - 1 for visual in visuals)

    def _is_visual(self, token: int) -> bool:
        return token in (self.shape.image_token, self.shape.video_token)

    def _length_error(self, draft: _Draft) -> TooLongError | None:
        """Return the error of a row that is over a limit, None for any other row."""
        prompt = self._prompt_length(draft)
        length = self._sample_length(draft)
        positions = self.shape.max_positions
        limit = self.config.max_prompt_tokens
        if prompt > limit:
            problem = f"the prompt takes {prompt} tokens, more than data.max_prompt_tokens={limit}"
            remedy = "shorten the row, shrink its images or raise the limit"
        elif length > positions:
            problem = f"the row takes {length} tokens, more than the model's {positions} positions"
            remedy = "shorten the row, or give the model more with ovr convert from-hf --yarn"
        else:
            return None
        return TooLongError(draft.row.where, "messages", problem, remedy)

    def _process_pixels(
        self, drafts: list[_Draft], images: list[list[PIL.Image.Image]], videos: list[list[Video]]
    ) -> list[list[np.ndarray]]:
        """Return the patches of each image and video of each draft, in the order of its tokens."""
        all_images = list(itertools.chain.from_iterable(images))
        all_videos = list(itertools.chain.from_iterable(videos))
        image_patches, video_patches = self._pixels.patches(all_images, all_videos)
        patches = []
        # Images and videos may alternate within a row; each iterator runs through the rows in order.
        for draft in drafts:
            sources = [image_patches if visual.seconds is None else video_patches for visual in draft.visuals]
            patches.append([next(source) for source in sources])
        return patches

    def _build_sample(
        self, draft: _Draft, images: list[PIL.Image.Image], videos: list[Video], patches: list[np.ndarray]
    ) -> Sample:
        """Repeat the placeholder of each visual for all of its features, and set positions and targets."""
        vision = self.shape.vision
        chat = draft.chat
        features = [visual.features(vision.merge) for visual in draft.visuals]
        assert [len(part) for part in patches] == [count * vision.merge**2 for count in features], "grid and pixels"
        prompt = np.array(chat.prompt, np.int64)
        is_visual = (prompt == self.shape.image_token) | (prompt == self.shape.video_token)
        repeats = np.ones(len(prompt), np.int64)
        repeats[is_visual] = features
        response = np.array(chat.response, np.int64)
        prompt_targets = np.repeat(np.array(chat.learned, bool), repeats)

        # Positions follow the placeholders of the prompt; the text after the last visual joins the response.
        segments: list[int | Visual] = []
        start = 0
        for index, visual in zip(np.flatnonzero(is_visual), draft.visuals, strict=True):
            segments += [int(index) - start, visual]
            start = int(index) + 1
        segments.append(len(prompt) - start + len(chat.response))
        return Sample(
            tokens=np.concatenate([np.repeat(prompt, repeats), response]),
            loss_mask=np.concatenate([prompt_targets, np.ones(len(response), bool)]),
            position_ids=self._family.positions(segments, self.shape, self.after_video),
            patches=np.concatenate([np.zeros((0, vision.patch_dim), np.float32), *patches]),
            grid_thw=np.array([visual.grid for visual in draft.visuals], np.int64).reshape(-1, 3),
            placement=np.flatnonzero(np.repeat(is_visual, repeats)),
            images=images,
            videos=videos,
            prompt_tokens=chat.prompt,
            row=draft.row,
        )


def converted_message(message: Message) -> Message:
    """Return the message with a trace, or with the request for a trace, in the form of `convert`."""
    rewrite = {"assistant": convert, "system": convert_instruction}.get(message.role)
    text = rewrite(message.text) if rewrite else message.text
    return message if text == message.text else replace(message, parts=(TextPart(text),))


def _learned_messages(row: Row) -> list[int]:
    """Return the indices of the assistant messages that the row lets a model learn."""
    return [i for i, message in enumerate(row.messages) if message.role == "assistant" and message.learn]


def _stack_videos(videos: Sequence[Sequence[PIL.Image.Image]], row: Row) -> list[Video]:
    """Stack the opened frames of each video of ``row``."""
    parts = itertools.chain.from_iterable(message.parts for message in row.messages)
    video_parts = [part for part in parts if isinstance(part, VideoPart)]
    return [stack_frames(frames, part, row) for frames, part in zip(videos, video_parts, strict=True)]


def continue_positions(position_ids: np.ndarray, tokens: int) -> np.ndarray:
    """Return the positions of ``tokens`` more text tokens after a document that ends in text: int64[3, tokens]."""
    assert position_ids.shape[1] and (position_ids[:, -1] == position_ids[0, -1]).all(), "must end in text"
    start = position_ids[0, -1] + 1
    return np.tile(np.arange(start, start + tokens), (3, 1))
