"""Turn rows into samples: tokens, training targets, patches and positions.

One `Processor` serves every use: supervised samples, prompts for the rollout engine, and the engine's responses.
It is the only place where an image becomes tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image

from ovr_megatron.config import DataConfig
from ovr_megatron.data.expansion import Expansion, expand, merge_text_lengths
from ovr_megatron.data.hf_assets import check_template, complete_folder, load_assets
from ovr_megatron.data.hf_files import BASE_GENERATION
from ovr_megatron.data.images import check_counts, image_size, load_media
from ovr_megatron.data.pixels import PixelProcessor, Video, frame_size, stack_frames
from ovr_megatron.data.rendering import Chat, ChatTemplate, TemplateError, TokenisedChat
from ovr_megatron.data.row_chats import converted_row, cut_after_learned, supervised_chat
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import ImagePart, ImageSize, Row, RowError, TextPart, VideoPart, all_parts
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.positions import Visual
from ovr_megatron.runtime.logs import NOTICE, get_logger

logger = get_logger(__name__)

TEMPLATE_NOTICE = (
    "data.template=think: chats are written with this project's template in place of the model folder's own, and "
    "replies begin after an opened <think>; data.template=model takes the folder's"
)
_TRAINED_WARNING = (
    "data.template=think: {folder} was trained by this project with another chat template, the one in its folder, and "
    "has not learned to reply after the <think> that this run opens; go on with data.template=model, or train both "
    "stages with data.template=think"
)


class TooLongError(RowError):
    """A sound row that is longer than a limit: to be dropped and counted, never cut."""


@dataclass
class _Draft:
    """A row that is tokenised and whose media are measured; ``visuals`` are in the order of the tokens.

    ``expansions`` are what their placeholders become.
    """

    row: Row
    chat: TokenisedChat
    visuals: list[Visual]
    expansions: list[Expansion]


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
        video_options: Fields of the video processor beside the budget.
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
            path = self._family.processor.think_template
            self.chat_template = path.read_text(encoding="utf-8")
        is_replaced = bool(folder_template) and folder_template != self.chat_template
        # Only training writes this file.
        is_trained = (Path(model_dir) / BASE_GENERATION).is_file()
        self.template_notice = ""
        if is_replaced:
            self.template_notice = _TRAINED_WARNING.format(folder=model_dir) if is_trained else TEMPLATE_NOTICE
        self._notice_level = logging.WARNING if is_trained else NOTICE
        if not self.chat_template:
            raise TemplateError(f"{model_dir} has no chat template; set data.template=think or add one to the folder")
        self._chat = ChatTemplate(self.tokenizer, self.chat_template, self._family)
        check_template(self.chat_template, self._chat.special, model_dir)
        self._chat.check_text(model_dir)
        self.end_token = self._chat.end_token
        self._pixels = PixelProcessor(
            assets.image_processor,
            assets.video_processor,
            self.shape,
            config,
        )
        self.mm_processor_kwargs = self._pixels.mm_processor_kwargs
        self.video_options = self._pixels.video_options

    def log_template(self) -> None:
        """Log `template_notice`, if there is one; as a warning where the model was trained with another template."""
        if self.template_notice:
            logger.log(self._notice_level, self.template_notice)

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
        images = []
        frames = []
        for draft in drafts:
            row_images, row_frames = load_media(draft.row, self.config)
            images.append(row_images)
            frames.append(row_frames)
        videos = []
        for draft, row_frames in zip(drafts, frames, strict=True):
            videos.append(_stack_videos(row_frames, draft.row))
        patches = self._process_pixels(drafts, images, videos)
        samples = []
        for item in zip(drafts, images, videos, patches, strict=True):
            samples.append(self._build_sample(*item))
        return samples

    def lengths(
        self,
        rows: Sequence[Row],
        generation: bool,
        decode: bool = False,
    ) -> list[int | TooLongError]:
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
        lengths: list[int | TooLongError] = []
        for draft in drafts:
            error = self._length_error(draft)
            lengths.append(error or self._sample_length(draft))
        return lengths

    def grids(self, row: Row) -> list[tuple[int, int, int]]:
        """Return the patches in time, height and width of each image and video of a row; only headers are read.

        Raises:
            RowError: as `encode`, of an image.
        """
        media = [part for part in all_parts(row.prompt) if not isinstance(part, TextPart)]
        return [self._measure_visual(part, row).grid for part in media]

    def image_size(self, row: Row) -> ImageSize:
        """Return the size of a row's only image, in the file and as the model sees it; only the header is read.

        Raises:
            RowError: as `encode`, of an image; or the row has none, or several.
        """
        images = [part for part in all_parts(row.prompt) if isinstance(part, ImagePart)]
        if len(images) != 1:
            problem = f"has {len(images)} images where the size of a single one is needed"
            raise RowError(row.where, "messages", problem, "remove the row")
        width, height = image_size(images[0], self.config)
        _, rows, columns = self._pixels.still(width, height).grid
        patch = self.shape.vision.patch
        return ImageSize(width, height, columns * patch, rows * patch)

    def response_sample(self, sample: Sample, response_tokens: Sequence[int] | np.ndarray) -> Sample:
        """Append the engine's tokens to a prompt's sample, as they are; they are its target."""
        response = np.asarray(response_tokens, np.int64)
        targets = np.ones(len(response), bool)
        positions = continue_positions(sample.position_ids, len(response))
        return replace(
            sample,
            tokens=np.concatenate([sample.tokens, response]),
            loss_mask=np.concatenate([sample.loss_mask, targets]),
            position_ids=np.concatenate([sample.position_ids, positions], axis=1),
        )

    def decode(self, tokens: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Return the text of ``tokens``."""
        ids = [int(token) for token in tokens]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def _build_drafts(self, rows: Sequence[Row], generation: bool) -> list[_Draft]:
        """Tokenise the texts of ``rows`` in one batch and measure their media."""
        opens_thought = self._chat.opens_thought
        if opens_thought:
            rows = [converted_row(row) for row in rows]
        if generation:
            chats = [Chat(row.prompt) for row in rows]
        else:
            rows = [cut_after_learned(row) for row in rows]
            chats = [supervised_chat(row, self.config, opens_thought) for row in rows]
        tokenised = self._chat.tokenise(chats)
        drafts = []
        for row, chat in zip(rows, tokenised, strict=True):
            drafts.append(self._build_draft(row, chat))
        return drafts

    def _build_draft(self, row: Row, chat: TokenisedChat) -> _Draft:
        """Measure the media of ``row`` and check that the template has a placeholder for each, in order."""
        media = [part for part in all_parts(row.prompt) if not isinstance(part, TextPart)]
        part_types = {
            self.shape.image_token: ImagePart,
            self.shape.video_token: VideoPart,
        }
        placeholders = []
        for token in chat.prompt:
            if token in part_types:
                placeholders.append(part_types[token])
        if placeholders != [type(part) for part in media]:
            raise TemplateError(
                f"{row.where}: the chat template places {len(placeholders)} images and videos where the row has "
                f"{len(media)}, or another order; use data.template=think or correct the folder's template"
            )
        check_counts(row, self.config)
        visuals = [self._measure_visual(part, row) for part in media]
        expansions = [expand(visual, self.shape, self._chat.encode) for visual in visuals]
        return _Draft(row, chat, visuals, expansions)

    def _measure_visual(self, part: ImagePart | VideoPart, row: Row) -> Visual:
        """Return the grid that an image or a video will have."""
        if isinstance(part, ImagePart):
            width, height = image_size(part, self.config)
            return self._pixels.still(width, height)
        sizes = [image_size(frame, self.config) for frame in part.frames]
        width, height = frame_size(sizes, row)
        fewest = self._family.fewest_frames
        if len(sizes) < fewest:
            problem = f"has {len(sizes)} frame, and {self._family.title} takes at least {fewest}"
            raise RowError(row.where, "video", problem, "give it as an image, or give more frames")
        return self._pixels.moving(len(sizes), width, height, part.fps)

    def _prompt_length(self, draft: _Draft) -> int:
        """Count the tokens before the first that is learned; of a prompt that is to be answered, all of them."""
        learned = draft.chat.learned
        count = len(learned)
        if any(learned):
            count = learned.index(True)
        prompt = draft.chat.prompt[:count]
        visuals = sum(map(self._is_visual, prompt))
        return count + _added_tokens(draft.expansions[:visuals])

    def _sample_length(self, draft: _Draft) -> int:
        chat = draft.chat
        text_tokens = len(chat.prompt) + len(chat.response)
        return text_tokens + _added_tokens(draft.expansions)

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
        self,
        drafts: list[_Draft],
        images: list[list[PIL.Image.Image]],
        videos: list[list[Video]],
    ) -> list[list[np.ndarray]]:
        """Return the patches of each image and video of each draft, in the order of its tokens."""
        all_images = list(itertools.chain.from_iterable(images))
        all_videos = list(itertools.chain.from_iterable(videos))
        image_patches, video_patches = self._pixels.patches(all_images, all_videos)
        patches = []
        # Images and videos may alternate within a row; each iterator runs through the rows in order.
        for draft in drafts:
            draft_patches = []
            for visual in draft.visuals:
                source = image_patches if visual.seconds is None else video_patches
                draft_patches.append(next(source))
            patches.append(draft_patches)
        return patches

    def _build_sample(
        self,
        draft: _Draft,
        images: list[PIL.Image.Image],
        videos: list[Video],
        patches: list[np.ndarray],
    ) -> Sample:
        """Put the tokens of each visual in the place of its placeholder, and set positions and targets."""
        vision = self.shape.vision
        chat = draft.chat
        expected_patches = [visual.features(vision.merge) * vision.merge**2 for visual in draft.visuals]
        assert [len(part) for part in patches] == expected_patches, "grid and pixels"
        visual_tokens = (self.shape.image_token, self.shape.video_token)
        prompt: list[int] = []
        targets: list[bool] = []
        segments: list[int | Visual] = []
        grids: list[tuple[int, int, int]] = []
        start = 0  # of the text before the placeholder
        placeholders = np.flatnonzero(np.isin(chat.prompt, visual_tokens)).tolist()
        for index, expansion in zip(placeholders, draft.expansions, strict=True):
            prompt += chat.prompt[start:index] + expansion.tokens
            targets += chat.learned[start:index] + [chat.learned[index]] * len(expansion.tokens)
            segments += [index - start, *expansion.segments]
            grids += expansion.grids
            start = index + 1
        prompt += chat.prompt[start:]
        targets += chat.learned[start:] + [True] * len(chat.response)
        segments.append(len(chat.prompt) - start + len(chat.response))
        # Positions follow the placeholders of the prompt.
        is_feature = np.isin(prompt, visual_tokens)
        # Of fixed width: text alone has no patch, and its arrays still join those of other samples.
        no_patches = np.zeros((0, vision.patch_dim), np.float32)
        return Sample(
            tokens=np.array(prompt + chat.response, np.int64),
            loss_mask=np.array(targets, bool),
            position_ids=self._family.positions(merge_text_lengths(segments), self.shape, self.after_video),
            patches=np.concatenate([no_patches, *patches]),
            grid_thw=np.array(grids, np.int64).reshape(-1, 3),
            placement=np.flatnonzero(is_feature),
            images=images,
            videos=videos,
            prompt_tokens=chat.prompt,
            row=draft.row,
        )


def _added_tokens(expansions: Sequence[Expansion]) -> int:
    """Count the tokens of ``expansions`` beyond the one placeholder of each."""
    return sum(len(expansion.tokens) - 1 for expansion in expansions)


def _stack_videos(videos: Sequence[Sequence[PIL.Image.Image]], row: Row) -> list[Video]:
    """Stack the opened frames of each video of ``row``."""
    video_parts = [part for part in all_parts(row.messages) if isinstance(part, VideoPart)]
    arrays = []
    for frames, part in zip(videos, video_parts, strict=True):
        arrays.append(stack_frames(frames, part, row))
    return arrays


def continue_positions(position_ids: np.ndarray, tokens: int) -> np.ndarray:
    """Return the positions of ``tokens`` more text tokens after a document that ends in text: int64[3, tokens]."""
    assert position_ids.shape[1], "must end in text"
    last = position_ids[:, -1]
    # The three positions of a text token are equal, those of a visual need not be.
    assert (last == last[0]).all(), "must end in text"
    start = last[0] + 1
    positions = np.arange(start, start + tokens)
    return np.tile(positions, (3, 1))
