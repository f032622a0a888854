"""Copy HF assets: the files beside the weights of a Hugging Face folder that a reader of the model opens.

Anything else in a folder (training states, logs, code, secrets) stays where it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from ovr_megatron.errors import UserError

GENERATION = "generation_config.json"
BASE_GENERATION = "generation_config.base.json"
PREPROCESSOR = "preprocessor_config.json"
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
PROCESSOR = "processor_config.json"
HF_ASSETS = (
    *("config.json", GENERATION, BASE_GENERATION),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
    *(PREPROCESSOR, VIDEO_PREPROCESSOR, PROCESSOR),
    *("README.md", "LICENSE", "LICENSE.*", "NOTICE", "NOTICE.*"),
)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_MAX_BYTES = 100_000_000  # the largest known asset, tokenizer.json, has 12 million


class AssetError(UserError, ValueError):
    """A file beside the weights that is missing, broken, of another model or no file; names it and the remedy."""


def list_hf_assets(directory: Path) -> list[str]:
    """Return every file of a folder that matches `HF_ASSETS`, relative to it, sorted."""
    templates = directory / "additional_chat_templates"
    names = []
    # Listed and not globbed: a link that leads nowhere is there, too.
    for path in (*directory.iterdir(), *templates.glob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_dir() and _matches(name, HF_ASSETS):
            names.append(name)
    return sorted(names)


def list_other_files(directory: Path) -> list[str]:
    """Return the files of a folder that are neither HF assets nor weights, and are not copied; hidden files aside."""
    known_patterns = (*HF_ASSETS, *_WEIGHTS)
    names = []
    for path in directory.iterdir():
        is_hidden = path.name.startswith(".")
        if not is_hidden and not _matches(path.name, known_patterns):
            names.append(path.name)
    return sorted(names)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    # The same on every system: `fnmatch` would ignore case where the file system does.
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def copy_files(source: Path, out: Path) -> list[str]:
    """Copy the HF assets of ``source`` to ``out``, which exists.

    Returns:
        Their names, relative to the folder.

    Raises:
        AssetError: one is a link that leaves the folder or leads nowhere, no file, or too large to be one.
    """
    names = list_hf_assets(source)
    # All checks before the first copy: a refused folder leaves nothing behind.
    for name in names:
        check_link(source, name)
        path = source / name
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise AssetError(f"{path} has {size:,} bytes; it is not what its name says, remove it")
    for name in names:
        copy = out / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)  # contents alone: a read-only source must not lock the copy
    return names


def check_link(directory: Path, name: str) -> None:
    """Refuse the file ``name`` of a folder if it is a link that leaves the folder.

    Hugging Face's cache keeps ``snapshots/COMMIT/NAME`` as a link to ``blobs/HASH`` of the same model: that one stays.

    Raises:
        AssetError: names the link and where it leads.
    """
    path = directory / name
    home = directory.resolve()
    target = path.resolve()
    is_inside = target.is_relative_to(home)
    if home.parent.name == "snapshots" and not is_inside:
        blobs = home.parent.parent / "blobs"
        is_inside = target.is_relative_to(blobs)
    if not is_inside:
        raise AssetError(f"{path} is a link that leaves the folder, to {target}; put the file itself there")
    if not target.is_file():
        raise AssetError(f"{path} leads to {target}, which is no file; remove it or put the file itself there")
