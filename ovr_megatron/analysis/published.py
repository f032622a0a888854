"""Models of the published sizes with random weights, for measurements: nothing is read from a disk or a hub.

Their tokenizer is the miniature's: what is sampled are its few hundred ids, out of the whole vocabulary.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ovr_megatron.engine import Engine
from ovr_megatron.model.presets import PRESETS
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.model.tiny import TinySizes, make_tiny_model

# Small models by name: the miniature, and one of about a gigabyte.
SMALL = {
    "tiny": TinySizes(),
    "wide": TinySizes(hidden=1024, layers=17, heads=16, kv_heads=4, ffn=4096),
}


def write_model(name: str, folder: Path, layers: int = 0) -> Path:
    """Configuration, tokenizer and processor of ``name``, of `SMALL` or a preset, with so many layers (0: all).

    Returns:
        ``folder``, without any weights in it.
    """
    make_tiny_model(folder, sizes=SMALL.get(name, TinySizes(max_positions=128000)))
    (folder / "model.safetensors").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if name in PRESETS:
        ids = {key: value for key, value in config.items() if key.endswith("token_id")}
        config = PRESETS[name] | ids
    if layers:
        config |= {"num_hidden_layers": layers, "max_window_layers": layers}
    path.write_text(json.dumps(config))
    return folder


def shape_of(name: str, layers: int = 0) -> ModelShape:
    """Sizes of such a model."""
    with tempfile.TemporaryDirectory() as folder:
        return ModelShape.from_hf(write_model(name, Path(folder), layers))


@torch.no_grad()
def randomise(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Numbers as training begins with them; what lies in fresh memory may be none."""
    for parameter in parameters:
        parameter.normal_(0.0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)


def fill(engine: Engine) -> Engine:
    """`randomise` the weights of ``engine`` and its optimizer's copies of them."""
    randomise(parameter for part in engine.parts for parameter in part.parameters())
    if hasattr(engine, "optimizer"):
        engine.optimizer.reload_model_params()
    return engine
