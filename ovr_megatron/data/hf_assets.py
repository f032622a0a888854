"""Load the files of a model folder that Transformers reads beside the weights: tokenizer, processors, chat template.

No other module loads them.  Every error of Transformers, tokenizers or Jinja becomes one sentence that names the
folder and the file, and a tokenizer that does not fit the model is refused before it makes a token.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase

from ovr_megatron.data.hf_files import PREPROCESSOR, PROCESSOR, VIDEO_PREPROCESSOR, AssetError, copy_files
from ovr_megatron.families import ModelShape, family_of, family_of_folder
from ovr_megatron.runtime.logs import NOTICE, get_logger

logger = get_logger(__name__)

# Plain text of letters, digits, punctuation, line ends and other scripts, in Unicode's composed form.
_PROBE = "Solve 3x + 41 = 59, then\n\n\tcheck: \\boxed{6} für 你好 😀"
_MARK = re.compile(r"<\|[a-z_]+\|>")
_REASON_CHARACTERS = 160  # of a library's message


@dataclass(frozen=True)
class HfAssets:
    """The objects of Transformers that one model folder describes.

    Attributes:
        tokenizer: Checked against the model's vocabulary by `check_tokenizer`.
        image_processor: For still images.
        video_processor: For videos.
        chat_template: Jinja source of the folder, None where it has none.
    """

    tokenizer: Any
    image_processor: Any
    video_processor: Any
    chat_template: str | None


@contextmanager
def one_sentence(what: str, remedy: str) -> Iterator[None]:
    """Turn any error of the block into an `AssetError` of ``what``, the library's reason and the remedy.

    Transformers, tokenizers and Jinja raise nearly every class of error for a broken file, tokenizers even
    ``Exception`` itself, so no narrower list is complete.
    """
    try:
        yield
    except (MemoryError, AssetError):
        raise
    except Exception as error:
        reason = reason_of(error)
        raise AssetError(f"{what} ({reason}); {remedy}") from error


def reason_of(error: BaseException) -> str:
    """Return the first line of a library's message, bounded and printable, with the error's class."""
    # The first that is not blank: some messages begin with an empty line.
    lines = str(error).strip().splitlines()
    line = lines[0].strip() if lines else ""
    reason = f"{type(error).__name__}: {line}"
    characters = [letter if letter.isprintable() else "?" for letter in reason]
    text = "".join(characters)
    if len(text) > _REASON_CHARACTERS:
        return text[:_REASON_CHARACTERS] + "..."
    return text


def load_assets(directory: str | Path, shape: ModelShape) -> HfAssets:
    """Load the assets of ``directory`` and check that they belong to the model of ``shape``.

    Raises:
        AssetError: a file is missing, cannot be read, or does not fit the model.
    """
    folder = complete_folder(Path(directory))
    processor_class = family_of(shape).processor.load_class()
    _check_json(folder)
    with one_sentence(
        f"{directory}: Transformers cannot load its tokenizer or its processor",
        f"get tokenizer.json, tokenizer_config.json, {PREPROCESSOR} and {VIDEO_PREPROCESSOR} (if the model has it) "
        "again",
    ):
        processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True)
    if not isinstance(processor, processor_class):
        raise AssetError(
            f"{directory}: its processor is {type(processor).__name__}; set processor_class in {PREPROCESSOR} (or "
            f"{PROCESSOR}) to {processor_class.__name__}"
        )
    with one_sentence(f"{directory}: its tokenizer cannot be used", "get tokenizer.json of the model again"):
        check_tokenizer(processor.tokenizer, shape, directory)
    for part, is_video in ((processor.image_processor, False), (processor.video_processor, True)):
        name = type(part).__name__
        file = _settings_file(folder, is_video)
        with one_sentence(f"{directory}: its {name} cannot be used", f"get {file} again"):
            _check_pixels(part, is_video, shape, directory, file)
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is not None and not isinstance(template, str):
        # Transformers gives several templates as a dictionary by name.
        names = ", ".join(template) if isinstance(template, dict) else type(template).__name__
        raise AssetError(f"{directory}: it has several chat templates ({names}); leave one, or set data.template=think")
    return HfAssets(
        processor.tokenizer,
        processor.image_processor,
        processor.video_processor,
        template,
    )


def check_assets(directory: str | Path) -> ModelShape:
    """Check configuration, tokenizer and processors of a folder that is only read or copied; return its shape.

    Raises:
        ShapeError: ``config.json`` is not of a model that we can build.
        AssetError: as `load_assets`.
    """
    shape = ModelShape.from_hf(directory)
    load_assets(directory, shape)
    return shape


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, shape: ModelShape, directory: str | Path) -> None:
    """Check ids against the model's vocabulary, and that a text with every special token decodes to itself.

    Raises:
        AssetError: names the token or the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise AssetError(f"{directory}: its tokenizer is not a fast one; save it with tokenizer.json")
    family = family_of(shape)
    vocabulary = tokenizer.get_vocab()
    beyond = []
    for token, index in vocabulary.items():
        if index >= shape.vocab:
            beyond.append((index, token))
    if beyond:
        index, token = min(beyond)
        raise AssetError(
            f"{directory}: {len(beyond)} ids of the tokenizer lie past the model's vocabulary of {shape.vocab}, the "
            f"first is {index} ({token!r}); tokenizer and config.json do not belong together, get both again"
        )
    # Plain text first: with a damaged vocabulary the checks of special tokens would name the wrong cause.
    _check_round_trip(tokenizer, _PROBE, directory)
    for token in family.tokens.chat:
        if token not in vocabulary:
            raise AssetError(f"{directory}: the tokenizer lacks {token}; it is not {family.title}'s, get it again")
    for name in ("image", "video", "vision_start", "vision_end"):
        index = getattr(shape, f"{name}_token")
        token = getattr(family.tokens, name)
        token_id = vocabulary.get(token)
        if token_id != index:
            raise AssetError(
                f"{directory}: {token} is {token_id} in the tokenizer and {index} in config.json "
                f"({name}_token_id); get both files again"
            )
    special = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special[token.content] = index
    ordinary = [name for name in family.tokens.chat if name not in special]
    if ordinary:
        raise AssetError(
            f"{directory}: {ordinary[0]} is no special token of the tokenizer, so that a text could write it; get "
            "tokenizer.json and tokenizer_config.json of the model again"
        )
    text = "".join(f"{name}x" for name in special)
    ids = _check_round_trip(tokenizer, text, directory)
    lost = [name for name, index in special.items() if index not in ids]
    if lost:
        raise AssetError(f"{directory}: {lost[0]} becomes other ids than its own; get tokenizer.json again")


def _check_round_trip(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    directory: str | Path,
) -> list[int]:
    """Return the ids of ``text``; raise `AssetError` unless they decode to ``text``."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    # No cleaning up: it would drop spaces before punctuation.
    decoded = tokenizer.decode(
        ids,
        skip_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )
    if decoded != text:
        raise AssetError(
            f"{directory}: the tokenizer does not give a text back: {text[:24]!r} becomes {decoded[:24]!r}; its "
            "vocabulary files are missing or damaged, get tokenizer.json (or vocab.json and merges.txt) again"
        )
    return ids


def check_template(template: str, special: dict[str, int], directory: str | Path) -> None:
    """Refuse a chat template whose marks the tokenizer does not know: they would be trained as characters.

    Raises:
        AssetError: names the mark.
    """
    marks = set(_MARK.findall(template))
    unknown = sorted(marks - special.keys())
    if unknown:
        raise AssetError(
            f"{directory}: the chat template writes {unknown[0]}, which is no special token of the tokenizer; template "
            "and tokenizer do not belong together"
        )


def _settings_file(folder: Path, is_video: bool) -> str:
    """Return the name of the file that Transformers reads the settings of the image or the video processor from."""
    if ("video_processor" if is_video else "image_processor") in _read_json(folder / PROCESSOR):
        return PROCESSOR
    if is_video and (folder / VIDEO_PREPROCESSOR).exists():
        return VIDEO_PREPROCESSOR
    return PREPROCESSOR


def _check_pixels(processor: Any, is_video: bool, shape: ModelShape, directory: str | Path, file: str) -> None:
    """Raise `AssetError` unless the processor, whose settings are in ``file``, cuts the patches of the vision tower."""
    vision = shape.vision
    files = family_of(shape).processor
    class_name = type(processor).__name__
    if is_video and not class_name.startswith(files.video_class_prefix):
        remedy = f"set video_processor_type in {file} to {files.video_class_prefix}VideoProcessor"
        if file == PREPROCESSOR:
            remedy = f"get {VIDEO_PREPROCESSOR} of the model, which is missing"
        raise AssetError(f"{directory}: videos would go through {class_name}; {remedy}")
    if not is_video and not class_name.startswith(files.image_class_prefix):
        raise AssetError(
            f"{directory}: pictures would go through {class_name}; set image_processor_type in "
            f"{file} to {files.image_processor['image_processor_type']}"
        )
    settings = {
        "patch_size": vision.patch,
        "merge_size": vision.merge,
        "temporal_patch_size": vision.temporal_patch,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    for name, expected in settings.items():
        value = getattr(processor, name, None)
        if value != expected:
            raise AssetError(
                f"{directory}: {name} of {type(processor).__name__} is {value!r} and the model needs {expected!r}; "
                f"correct {file}"
            )
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name)
        if len(values) != 3 or not all(map(_is_bounded, values)):
            raise AssetError(f"{directory}: {name} is {values!r} and not three numbers; correct {file}")
    if not all(float(value) > 0 for value in processor.image_std):
        raise AssetError(f"{directory}: image_std is {processor.image_std!r}; each must be above 0; correct {file}")


def _is_bounded(value: Any) -> bool:
    # Compared, and not only converted: no bound holds for NaN.
    return abs(float(value)) < 1e3


def _check_json(folder: Path) -> None:
    """Raise `AssetError` unless every JSON file holds an object: Transformers' own messages do not name the file."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
    for name in (*names, PREPROCESSOR, PROCESSOR, VIDEO_PREPROCESSOR, "chat_template.json"):
        _read_json(folder / name)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is no file.

    Raises:
        AssetError: it cannot be read or holds something else.
    """
    if not path.exists() and not path.is_symlink():
        return {}
    with one_sentence(f"{path} cannot be read", "download or copy this file again"):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise AssetError(f"{path} holds a {type(value).__name__} and not an object; download or copy this file again")
    return value


@functools.cache  # one stand-in a process, however many parts of it ask
def complete_folder(directory: Path) -> Path:
    """Return ``directory``, or a temporary stand-in where the image processor is missing or has its early name.

    The stand-in has links to the weights and copies of everything else, with the missing file written; Transformers,
    vLLM and exports read it in place of the folder, which is not changed.  It is removed when the process ends.

    Raises:
        ShapeError: ``config.json`` is there and is not of a known family.
        AssetError: a file cannot be read or written.
    """
    if not (directory / "config.json").is_file():
        return directory
    family = family_of_folder(directory)
    preprocessor = _read_json(directory / PREPROCESSOR)
    processor = _read_json(directory / PROCESSOR)
    nested = processor.get("image_processor")
    settings = preprocessor or (nested if isinstance(nested, dict) else {})
    type_name = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    if settings and type_name not in family.processor.renamed_types:
        return directory
    published = family.processor.image_processor
    with one_sentence(f"{directory}: no stand-in for it can be made", "see that TMPDIR has room"):
        stand_in = Path(tempfile.mkdtemp(prefix="ovr-model-"))
        atexit.register(shutil.rmtree, stand_in, ignore_errors=True)
        copy_files(directory, stand_in)
        for path in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
            # The resolved file: in Hugging Face's cache the path is itself a link, relative to its folder.
            (stand_in / path.name).symlink_to(path.resolve())
        # The folder's own settings count, all but the early name.
        image_class = published["image_processor_type"]
        complete = {**published, **settings, "image_processor_type": image_class}
        if preprocessor or not nested:
            name = PREPROCESSOR
            contents = complete
        else:
            name = PROCESSOR
            contents = {**processor, "image_processor": complete}
        text = json.dumps(contents, indent=2) + "\n"
        (stand_in / name).write_text(text)
    if os.environ.get("RANK", "0") == "0":  # once a run, before torch knows its ranks
        problem = "does not describe an image processor"
        if type_name:
            problem = f"names {type_name}, which Transformers does not know"
        notice = f"notice: {directory} {problem}; {image_class} with {family.title}'s numbers is used"
        logger.log(NOTICE, notice)
    return stand_in
