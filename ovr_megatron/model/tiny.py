"""A small random model in a Hugging Face folder: the model of the miniature and of the tests.

Nothing is downloaded.  The folder has all files of a real one (config, weights, byte-level tokenizer with the
family's special tokens, processor, chat template, generation config), so that Transformers, vLLM and this
package read it like one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ovr_megatron.families import default_family, family_of
from ovr_megatron.families.assets import SpecialTokens
from ovr_megatron.families.tiny import TinySizes
from ovr_megatron.model.tiny_tokenizer import CORPUS, write_tokenizer


def make_tiny_model(
    out: str | Path,
    *,
    tied: bool = True,
    seed: int = 0,
    sizes: TinySizes | None = None,
    corpus: Iterable[str] | None = None,
    perturb: bool = False,
    std: float = 0.04,
    dtype: torch.dtype = torch.float32,
    family: str = "",
) -> Path:
    """Write a small random model to the folder ``out`` and return its path.

    Args:
        out: Folder to create; files of the same names in it are replaced.
        tied: The output layer is the embedding (as in the 3B model) or has its own weight (7B).
        seed: Seed of the weights; the same arguments give the same bytes.
        sizes: Widths and depths; the miniature's by default.
        corpus: Texts that the byte-level BPE is trained on; default: a few lines with the puzzles' words.
        perturb: Move norms and biases off their trivial 1 and 0, so that a test sees each of them.
        std: Standard deviation of the matrices.
        dtype: Dtype of the stored weights.
        family: Name of the model's family; default: the miniature's.

    Raises:
        ValueError: sizes that do not divide, or a family that is not known.
    """
    sizes = sizes or TinySizes()
    record = family_of(family) if family else default_family()
    tiny = record.tiny
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(out, CORPUS if corpus is None else corpus, sizes.bpe_vocab, sizes.max_positions, record)
    config = tiny.config(sizes, ids, tied, std, str(dtype).removeprefix("torch."))
    _write_json(out / "config.json", config)
    _write_json(out / "preprocessor_config.json", tiny.preprocessor)
    if tiny.video_preprocessor is not None:
        _write_json(out / "video_preprocessor_config.json", tiny.video_preprocessor)
    _write_json(out / "chat_template.json", {"chat_template": tiny.chat_template})
    _write_json(out / "generation_config.json", _generation_config(ids, record.tokens))
    generator = torch.Generator().manual_seed(seed)
    # Some families have the language model's sizes on a level of their own.
    text = config.get("text_config", config)
    assert isinstance(text, dict)
    vocab = text["vocab_size"]
    assert isinstance(vocab, int)
    weights = {}
    for name, shape in tiny.tensors(sizes, vocab, tied):
        # Drawn in float32 and then rounded: models of both dtypes come from the same draws.
        tensor = _initial(name, shape, generator, std, perturb)
        weights[name] = tensor.to(dtype)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    return out


def _generation_config(ids: Mapping[str, int], tokens: SpecialTokens) -> dict[str, object]:
    return {
        "bos_token_id": ids[tokens.end_of_text],
        "eos_token_id": [ids[token] for token in tokens.ends],
        "pad_token_id": ids[tokens.end_of_text],
        "do_sample": True,
        "temperature": 1.0,
    }


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator, std: float, perturb: bool) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return std * noise
    centre = 0.0 if name.endswith(".bias") else 1.0
    return centre + 0.1 * noise if perturb else torch.full(shape, centre)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
