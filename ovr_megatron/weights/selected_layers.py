"""Read a model folder as a model of some of its layers: where a smaller student begins."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ovr_megatron.config import ConfigError
from ovr_megatron.families import ModelShape
from ovr_megatron.weights.folder import WeightFolder

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")


class SelectedLayers(WeightFolder):
    """The weights of a model with ``layers`` of the language model alone, numbered anew; the vision tower is entire."""

    def __init__(self, directory: Path, layers: Sequence[int]):
        super().__init__(directory)
        stored = {}
        for name, tensor in self._stored.items():
            match = _LAYER.fullmatch(name)
            if match is None:
                stored[name] = tensor
            elif int(match[1]) in layers:
                index = layers.index(int(match[1]))
                stored[f"model.layers.{index}.{match[2]}"] = tensor
        self._stored = stored


def check_layers(layers: Sequence[int], shape: ModelShape) -> None:
    """Refuse a selection that is no ascending list of the model's layers, or leaves out one with features of the tower.

    Raises:
        ConfigError: names the layers that can be selected.
    """
    are_present = all(0 <= layer < shape.layers for layer in layers)
    if not layers or list(layers) != sorted(set(layers)) or not are_present:
        numbers = ",".join(map(str, layers))
        raise ConfigError(f"--layers {numbers}: give numbers of 0 to {shape.layers - 1}, ascending, as 0,2,4")
    first = list(range(shape.vision.layer_features))
    if list(layers[: len(first)]) != first:
        numbers = ",".join(map(str, layers))
        raise ConfigError(
            f"--layers {numbers}: the first {len(first)} layers of this model take features of the vision tower and "
            f"stay where they are; begin with {','.join(map(str, first))}"
        )


def write_layer_count(directory: Path, layers: Sequence[int]) -> ModelShape:
    """Write into ``config.json`` of ``directory`` that the model has ``layers`` of its layers; return the new sizes."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    # The outer level may repeat fields of the nested one; both must agree afterwards.
    for part in (config, config.get("text_config") or {}):
        if "num_hidden_layers" in part:
            part["num_hidden_layers"] = len(layers)
        if "layer_types" in part:  # one for each layer, as Transformers 5 writes them
            part["layer_types"] = [part["layer_types"][layer] for layer in layers]
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return ModelShape.from_hf(directory)
