"""The Hugging Face files beside the weights of a checkpoint: those of the base model, with the run's settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from ovr_megatron.data.hf_files import BASE_GENERATION, GENERATION, PREPROCESSOR, PROCESSOR, VIDEO_PREPROCESSOR
from ovr_megatron.data.processing import Processor
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.weights.folder import copy_hf_assets

_PROCESSORS = (PREPROCESSOR, VIDEO_PREPROCESSOR, PROCESSOR)


def write_hf_assets(out: Path, processor: Processor) -> None:
    """Copy configuration, tokenizer and processor of the processor's folder to ``out`` with the run's settings.

    The chat template is the one that the run trains with, the image budget and the rule after a video are the run's,
    and the generation config is that of training. So a server of the export feeds the model what it was trained on
    and samples the distribution that was trained.
    """
    copy_hf_assets(processor.folder, out)
    template = str(processor.chat_template)
    (out / "chat_template.jinja").write_text(template)
    # Transformers 4 reads the template from these two.
    fields = {"chat_template": template}
    text = json.dumps(fields, indent=2) + "\n"
    (out / "chat_template.json").write_text(text)
    _update_json(out / "tokenizer_config.json", fields)

    # A run that begins from this folder, and an evaluation of it, take the rule from here.
    _update_json(out / "config.json", {"after_video": processor.after_video})

    # Versions of Transformers write the budget as pixels, as edges of `size`, or as both.
    min_pixels = processor.config.min_pixels
    max_pixels = processor.config.max_pixels
    budget = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    for name in _PROCESSORS:
        _update_pixel_budget(out / name, budget, size, processor.video_options)
    vocabulary = processor.tokenizer.get_vocab()
    write_generation_config(out, processor.shape, vocabulary)


def write_critic_assets(out: Path, folder: Path, processor: Processor) -> None:
    """Write the files of a critic of another size than the policy below ``out``: the policy's, its own configuration.

    Args:
        out: folder of the policy's files (`write_hf_assets`); the critic's get a folder in it.
        folder: the critic's, whose ``config.json`` is taken.
        processor: the policy's, whose samples the critic reads.
    """
    critic = out / "critic"
    write_hf_assets(critic, processor)
    shutil.copyfile(folder / "config.json", critic / "config.json")
    _update_json(critic / "config.json", {"after_video": processor.after_video})


def write_generation_config(folder: Path, shape: ModelShape, vocabulary: dict[str, int]) -> None:
    """Make the trained distribution the default of a server, and keep the base model's generation config beside it.

    The trained distribution is the unmodified one at temperature 1. Transformers and vLLM take temperature,
    penalties, top-p and top-k from this file, and Qwen's own asks for nearly greedy sampling with a repetition penalty.

    Args:
        folder: Hugging Face folder; the file of the base model becomes `BASE_GENERATION`, once.
        shape: Sizes of the model, whose family names its special tokens.
        vocabulary: Ids by token.
    """
    path = folder / GENERATION
    base_path = folder / BASE_GENERATION
    tokens = family_of(shape).tokens
    end_of_turn = vocabulary[tokens.end_of_turn]
    padding = vocabulary[tokens.end_of_text]
    values = {
        "bos_token_id": padding,
        "eos_token_id": [end_of_turn, padding],
        "pad_token_id": padding,
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,  # all tokens; without the field Transformers 4 takes 50
        "repetition_penalty": 1.0,
    }
    text = json.dumps(values, indent=2) + "\n"
    # A resumed run finds its own file here, which must not become the base model's.
    if path.exists() and path.read_text() == text:
        return
    if path.exists() and not base_path.exists():
        path.rename(base_path)
    path.write_text(text)


def _update_json(path: Path, values: Mapping[str, object]) -> None:
    """Set top-level fields of a JSON file, if the folder has it."""
    if not path.exists():
        return
    content = json.loads(path.read_text())
    text = json.dumps(content | values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n")


def _update_pixel_budget(
    path: Path,
    budget: dict[str, int],
    size: dict[str, int],
    video_options: Mapping[str, object],
) -> None:
    """Set the pixel budget wherever the file has one, and the options of a video processor.

    Transformers 5 nests the processors in one file.
    """
    if not path.exists():
        return
    content = json.loads(path.read_text())
    parts = {}
    for name, part in content.items():
        if isinstance(part, dict) and ("size" in part or "min_pixels" in part):
            parts[name] = part
    for name, part in (parts or {path.name: content}).items():
        part.update(budget)
        if "size" in part:
            part["size"] = size
        if name.startswith("video_"):
            part.update(video_options)
    text = json.dumps(content, indent=2)
    path.write_text(text + "\n")
