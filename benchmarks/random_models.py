"""Make models of the published sizes with random weights, for measurements: no weights are read or downloaded.

Their tokenizer is the miniature's: sampled ids are its few hundred, out of the whole vocabulary.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape, families
from ovr_megatron.families.presets import presets
from ovr_megatron.families.tiny import TinySizes
from ovr_megatron.model.tiny import make_tiny_model

# Small models by name: the miniature, and one of about a gigabyte.
SMALL = {
    "tiny": TinySizes(),
    "wide": TinySizes(hidden=1024, layers=17, heads=16, kv_heads=4, ffn=4096),
}


def write_model(name: str, folder: Path, layers: int = 0, family: str = "") -> Path:
    """Write configuration, tokenizer and processor of a model into ``folder``, and no weights.

    Args:
        name: of `SMALL` or a preset.
        folder: is made, and returned.
        layers: how many of them the language model has; 0: all.
        family: of a model of `SMALL`; empty: the default one. A preset has its own.
    """
    for record in families():
        if name in record.presets:
            family = record.name
    make_tiny_model(folder, sizes=SMALL.get(name, TinySizes(max_positions=128000)), family=family)
    (folder / "model.safetensors").unlink()  # the miniature's weights fit no other configuration
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if name in presets():
        # The ids of special tokens belong to the tokenizer, which is the miniature's.
        token_ids = {key: value for key, value in config.items() if key.endswith("token_id")}
        config = copy.deepcopy(presets()[name]) | token_ids
    if layers:
        # Some families have the language model's sizes on a level of their own.
        text = config.get("text_config", config)
        text["num_hidden_layers"] = layers
        if "max_window_layers" in text:
            text["max_window_layers"] = layers
    path.write_text(json.dumps(config))
    return folder


def read_shape(name: str, layers: int = 0, family: str = "") -> ModelShape:
    """Return the shape of the model that `write_model` writes with these arguments."""
    with tempfile.TemporaryDirectory() as folder:
        return ModelShape.from_hf(write_model(name, Path(folder), layers, family))


@torch.no_grad()
def randomise(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Fill ``parameters`` with values as training begins with them: fresh memory may hold NaN or infinities."""
    for parameter in parameters:
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0)


def randomise_engine(engine: Engine) -> Engine:
    """`randomise` the weights of ``engine`` and its optimizer's copies of them, and return ``engine``."""
    for part in engine.parts:
        randomise(part.parameters())
    if hasattr(engine, "optimizer"):
        # Its float32 copies were taken from the weights before.
        engine.optimizer.reload_model_params()
    return engine
