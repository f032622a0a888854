"""From rows to samples: tokens, training targets, patches and positions.

One `Processor` serves every use: supervised samples, prompts for the rollout engine, and what the engine
answered.  It is the only place where an image becomes tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image

from ovr_megatron.config import DataConfig
from ovr_megatron.data.hf_assets import check_template, complete_folder, load_assets
from ovr_megatron.data.images import check_counts, image_size, load_media
from ovr_megatron.data.pixels import PixelProcessor, Video, frame_size, stack_frames
from ovr_megatron.data.positions import SERVED_AFTER_VIDEO, Visual, continue_positions, mrope_positions
from ovr_megatron.data.rendering import Chat, ChatTemplate, TemplateError, TokenisedChat
from ovr_megatron.data.schema import ImagePart, Message, Row, RowError, TextPart, VideoPart
from ovr_megatron.data.traces import END_OF_THOUGHT, continuation, convert, convert_instruction, problem_of
from ovr_megatron.model.shape import ModelShape

THINK_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
TEMPLATE_NOTICE = (
    "data.template=think: chats are written with this project's template in place of the model folder's own, and "
    "replies begin after an opened <think>; data.template=model takes the folder's"
)
NO_THOUGHT = f"\n{END_OF_THOUGHT}\n\n"  # what closes an opened thought at once


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
        template_notice: One sentence where it is another than the folder's own, else empty.
        end_token: Id of ``<|im_end|>``, which closes a response.
        mm_processor_kwargs: The image budget in the form that vLLM's argument of this name takes.
        after_video: How positions go on after a video, see `mrope_positions`: ``data.after_video``, else what the
            folder says that its model was trained with, else as vLLM serves it.
    """

    def __init__(self, model_dir: str | Path, config: DataConfig) -> None:
        """Load the processor of a local folder.

        Args:
            model_dir: Hugging Face Qwen2.5-VL folder.
            config: Template, image budget and limits.

        Raises:
            TemplateError: the ``model`` template is asked for and the folder has none.
            AssetError: tokenizer, processor or template is missing, broken, or does not fit the model.
            ShapeError: the folder is not a Qwen2.5-VL model.
        """
        self.config = config
        self.shape = ModelShape.from_hf(model_dir)
        self.after_video = config.after_video or self.shape.after_video or SERVED_AFTER_VIDEO
        self.folder = complete_folder(Path(model_dir))
        assets = load_assets(self.folder, self.shape)
        self.tokenizer, own = assets.tokenizer, assets.chat_template
        self.chat_template = THINK_TEMPLATE.read_text(encoding="utf-8") if config.template == "think" else own
        self.template_notice = TEMPLATE_NOTICE if own and own != self.chat_template else ""
        if not self.chat_template:
            raise TemplateError(f"{model_dir} has no chat template; set data.template=think or add one to the folder")
        self._chat = ChatTemplate(self.tokenizer, self.chat_template)
        check_template(self.chat_template, self._chat.special, model_dir)
        self._chat.check_text(model_dir)
        self.end_token = self._chat.end_token
        self._pixels = PixelProcessor(assets.image_processor, assets.video_processor, self.shape.vision, config)
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
        drafts = self._drafts(rows, generation)
        for draft in drafts:
            if error := self._too_long(draft):
                raise error
        media = [load_media(draft.row, self.config) for draft in drafts]
        images = [pictures for pictures, _ in media]
        videos = [
            [stack_frames(frames, part, draft.row) for frames, part in zip(every, _videos(draft.row), strict=True)]
            for (_, every), draft in zip(media, drafts, strict=True)
        ]
        patches = self._patches(drafts, images, videos)
        return [self._sample(*item) for item in zip(drafts, images, videos, patches, strict=True)]

    def lengths(self, rows: Sequence[Row], generation: bool, decode: bool = False) -> list[int | TooLongError]:
        """Return the tokens of each row's sample, exactly; of an image only the header is read.

        A row that is too long for `encode` gives its error in place of a number, to be counted.

        Args:
            rows: As for `encode`.
            generation: As for `encode`.
            decode: Whether to open every image whole, so that a damaged one is an error here and not in `encode`.

        Raises:
            RowError: as `encode`.
        """
        drafts = self._drafts(rows, generation)
        for draft in drafts if decode else ():
            load_media(draft.row, self.config)
        return [self._too_long(draft) or self._length(draft) for draft in drafts]

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
        rows = [self._converted(row) for row in rows]
        if not generation:
            rows = [self._learnable(row) for row in rows]
        chats = self._chat.tokenise([Chat(row.prompt) if generation else self._supervised(row) for row in rows])
        return [self._draft(row, chat) for row, chat in zip(rows, chats, strict=True)]

    def _converted(self, row: Row) -> Row:
        """The row with its reasoning traces in the form that an opened thought continues."""
        if not self._chat.opens_thought:
            return row
        return replace(row, messages=tuple(converted_message(message) for message in row.messages))

    def _learnable(self, row: Row) -> Row:
        """The row up to the last message that is learned.

        Raises:
            RowError: there is none.
        """
        if row.is_prompt:
            remedy = "a row to learn from ends with an assistant message; add it or remove the row"
            raise RowError(row.where, "messages", "the last message is the user's", remedy)
        learned = [i for i, message in enumerate(row.messages) if message.role == "assistant" and message.learn]
        if not learned:
            raise RowError(row.where, "messages", "has no message of weight 1 to learn from", "remove the row")
        return replace(row, messages=row.messages[: learned[-1] + 1])

    def _supervised(self, row: Row) -> Chat:
        """The chat of a row to learn from: which of its replies are learned, each as the generation prompt wants it."""
        last = len(row.messages) - 1
        learned = [i for i, message in enumerate(row.messages) if message.role == "assistant" and message.learn]
        replies = {i: self._reply(row, i) for i in learned if i < last and self.config.learn == "all"}
        return Chat(row.prompt, replies, self._reply(row, last))

    def _reply(self, row: Row, index: int) -> str:
        """The text of an assistant message from where the generation prompt ends.

        Raises:
            RowError: the generation prompt opens a thought, and the text does not close it, or opens another.
        """
        reply, policy = row.messages[index].text, self.config.without_thought
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

    def _draft(self, row: Row, chat: TokenisedChat) -> _Draft:
        parts = [part for message in row.prompt for part in message.parts if not isinstance(part, TextPart)]
        kinds = {self.shape.image_token: ImagePart, self.shape.video_token: VideoPart}
        placed = [kinds[token] for token in chat.prompt if token in kinds]
        if placed != [type(part) for part in parts]:
            raise TemplateError(
                f"{row.where}: the chat template places {len(placed)} images and videos where the row has "
                f"{len(parts)}, or another order; use data.template=think or correct the folder's template"
            )
        check_counts(row, self.config)
        return _Draft(row, chat, [self._visual(part, row) for part in parts])

    def _visual(self, part: ImagePart | VideoPart, row: Row) -> Visual:
        """The grid that an image or a video will have."""
        if isinstance(part, ImagePart):
            return self._pixels.still(*image_size(part, self.config))
        sizes = [image_size(frame, self.config) for frame in part.frames]
        return self._pixels.moving(len(sizes), *frame_size(sizes, row), part.fps)

    def _prompt_length(self, draft: _Draft) -> int:
        """Tokens before the first that is learned, and all of a prompt that is to be answered."""
        learned = draft.chat.learned
        count = learned.index(True) if any(learned) else len(learned)
        visuals = sum(self._is_visual(token) for token in draft.chat.prompt[:count])
        return count + self._features(draft.visuals[:visuals])

    def _length(self, draft: _Draft) -> int:
        return len(draft.chat.prompt) + self._features(draft.visuals) + len(draft.chat.response)

    def _features(self, visuals: Sequence[Visual]) -> int:
        """Tokens of ``visuals`` beyond the one placeholder of each."""
        return sum(visual.features(self.shape.vision.merge) - 1 for visual in visuals)

    def _is_visual(self, token: int) -> bool:
        return token in (self.shape.image_token, self.shape.video_token)

    def _too_long(self, draft: _Draft) -> TooLongError | None:
        prompt, length = self._prompt_length(draft), self._length(draft)
        positions, limit = self.shape.max_positions, self.config.max_prompt_tokens
        if prompt > limit:
            problem = f"the prompt takes {prompt} tokens, more than data.max_prompt_tokens={limit}"
            remedy = "shorten the row, shrink its images or raise the limit"
        elif length > positions:
            problem = f"the row takes {length} tokens, more than the model's {positions} positions"
            remedy = "shorten the row, or give the model more with tools/convert_from_hf.py --yarn"
        else:
            return None
        return TooLongError(draft.row.where, "messages", problem, remedy)

    def _patches(
        self, drafts: list[_Draft], images: list[list[PIL.Image.Image]], videos: list[list[Video]]
    ) -> list[list[np.ndarray]]:
        """Patches of each image and video of each draft, in the order of its tokens."""
        every_image = [image for of_row in images for image in of_row]
        every_video = [video for of_row in videos for video in of_row]
        still, moving = self._pixels.patches(every_image, every_video)
        return [[next(still if v.seconds is None else moving) for v in draft.visuals] for draft in drafts]

    def _sample(
        self, draft: _Draft, images: list[PIL.Image.Image], videos: list[Video], patches: list[np.ndarray]
    ) -> Sample:
        vision, chat = self.shape.vision, draft.chat
        features = [visual.features(vision.merge) for visual in draft.visuals]
        assert [len(part) for part in patches] == [count * vision.merge**2 for count in features], "grid and pixels"
        prompt = np.array(chat.prompt, np.int64)
        is_visual = (prompt == self.shape.image_token) | (prompt == self.shape.video_token)
        repeats = np.ones(len(prompt), np.int64)
        repeats[is_visual] = features
        tokens = np.concatenate([np.repeat(prompt, repeats), np.array(chat.response, np.int64)])
        learned = [np.repeat(np.array(chat.learned, bool), repeats), np.ones(len(chat.response), bool)]

        segments: list[int | Visual] = []
        start = 0
        for index, visual in zip(np.flatnonzero(is_visual), draft.visuals, strict=True):
            segments += [int(index) - start, visual]
            start = int(index) + 1
        segments.append(len(prompt) - start + len(chat.response))
        return Sample(
            tokens=tokens,
            loss_mask=np.concatenate(learned),
            position_ids=mrope_positions(segments, vision.merge, vision.tokens_per_second, self.after_video),
            patches=np.concatenate([np.zeros((0, vision.patch_dim), np.float32), *patches]),
            grid_thw=np.array([visual.grid for visual in draft.visuals], np.int64).reshape(-1, 3),
            placement=np.flatnonzero(np.repeat(is_visual, repeats)),
            images=images,
            videos=videos,
            prompt_tokens=chat.prompt,
            row=draft.row,
        )


def converted_message(message: Message) -> Message:
    """The message with a trace, or with the request for one, in the form of `convert`."""
    rewrite = {"assistant": convert, "system": convert_instruction}.get(message.role)
    text = rewrite(message.text) if rewrite else message.text
    return message if text == message.text else replace(message, parts=(TextPart(text),))


def _videos(row: Row) -> list[VideoPart]:
    return [part for message in row.messages for part in message.parts if isinstance(part, VideoPart)]
