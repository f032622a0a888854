"""Model families: one frozen record each, which is all that the rest of the code asks of a family.

A family is a package here, whose ``FAMILY`` is its record; it is read when the first question comes, and nothing else
imports from it.  `register` adds a family from elsewhere.  What families share is in `ovr_megatron.model`.

A record is made without torch and NumPy, so that a command line is judged at once.  What an answer needs, Transformers
or vLLM, is imported when it is asked: fields named ``load_...`` return a class, the others compute.
"""

from __future__ import annotations

import functools
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.families.assets import ProcessorFiles, SpecialTokens
from ovr_megatron.families.config_json import ShapeError, check_kind, read_config
from ovr_megatron.families.positions import Visual
from ovr_megatron.families.tiny import TinyModel
from ovr_megatron.families.yarn import Yarn
from ovr_megatron.runtime.registry import Registry

if TYPE_CHECKING:
    import numpy as np

LONGEST_RESPONSE = 32768
"""Tokens of an evaluated response where no limit is set: reasoning models write thousands."""


@dataclass(frozen=True)
class VisionShape:
    """Sizes of a vision tower: ``depth`` blocks of ``heads`` heads; a family adds its own.

    ``has_layer_norm`` is whether a block has LayerNorm rather than RMSNorm, ``has_gate`` whether its MLP is SwiGLU, of
    three matrices, rather than GELU between two.  Trainer and plan read both.
    """

    has_layer_norm: ClassVar[bool] = False
    has_gate: ClassVar[bool] = True

    depth: int
    hidden: int
    ffn: int
    heads: int
    in_channels: int
    patch: int
    temporal_patch: int
    merge: int

    @property
    def patch_dim(self) -> int:
        """Return the elements of one patch: channels x temporal patch x patch x patch."""
        return self.in_channels * self.temporal_patch * self.patch**2

    @property
    def attention_side(self) -> int:
        """Return the features along the side of what a block attends to, 1 where it is always a whole frame."""
        return 1

    @property
    def layer_features(self) -> int:
        """Return how many of the decoder's first layers have features of the tower added to their output."""
        return 0


@dataclass(frozen=True)
class ModelShape:
    """Sizes and special ids of one model.

    ``family`` names its `Family`.  ``max_positions`` is its longest document, YaRN included.  ``after_video`` is the
    rule of positions that the model was trained with (`AFTER_VIDEO`), None where the folder does not say.
    """

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int
    tied: bool
    vision: VisionShape
    image_token: int
    video_token: int
    vision_start_token: int
    vision_end_token: int
    yarn: Yarn | None = None
    after_video: str | None = None

    @property
    def trained_positions(self) -> int:
        """Return the positions without YaRN."""
        if self.yarn:
            return self.yarn.original_positions
        # ``config.json`` may allow more positions than the training had.
        return min(self.max_positions, family_of(self).trained_positions)

    def check_length(self, tokens: int, setting: str) -> None:
        """Refuse a document of ``tokens``, asked for by ``setting``, that is longer than the model's positions.

        Raises:
            ConfigError: names the setting, both lengths and the remedy.
        """
        if tokens > self.max_positions:
            # A factor counts from the trained positions, also in a folder that was stretched before.
            factor = math.ceil(tokens / self.trained_positions)
            raise ConfigError(
                f"{setting} comes to {tokens} tokens, and the model has {self.max_positions} positions; lower it, or "
                f"give the model more with YaRN: ovr convert from-hf --yarn {factor}"
            )

    def response_limit(self, max_tokens: int, prompt_tokens: int) -> int:
        """Return ``max_tokens``, or for 0 the positions that a prompt leaves, at most `LONGEST_RESPONSE` tokens."""
        if max_tokens:
            return max_tokens
        remaining = self.max_positions - prompt_tokens
        return max(1, min(LONGEST_RESPONSE, remaining))

    @staticmethod
    def from_hf(directory: str | Path) -> ModelShape:
        """Read ``config.json`` of ``directory`` by the family that it names.

        Raises:
            ShapeError: the file is missing, is not JSON, is of a model of no known family, lacks a field, or asks for
                a feature that is not computed here.
        """
        raw, path = read_config(directory, titles())
        family = _family_of_config(raw, path)
        check_kind(raw, path, family.architecture)
        return family.read_shape(family.name, raw, path)


# Megatron parameter, Hugging Face tensors, kind, size of each Hugging Face tensor in letters of `Family.weight_sizes`.
WeightEntry = tuple[str, tuple[str, ...], str, tuple[str, ...]]


def _unchanged(visual: Visual, sizes: ModelShape, encode: Callable[[str], list[int]]) -> list[list[int] | Visual]:
    """Return the visual alone: its features in a row."""
    return [visual]


def _layer_counts(sizes: ModelShape) -> Mapping[str, int]:
    """Return the layers of the language model and of the vision tower."""
    return {"decoder.layers.": sizes.layers, "vision.layers.": sizes.vision.depth}


# By identity: its dictionaries have no hash, and vLLM's registration is cached by family.
@dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """Everything that the code outside of a family's package asks of it.

    Attributes:
        name: Names the family in `ModelShape.family`.
        title: Names it in messages.
        model_types: Values of ``model_type`` in ``config.json``.
        architecture: Name of Transformers' class in ``architectures`` of ``config.json``, by which vLLM looks it up.
        is_default: Tiny models are of this family where none is named; true of one family.
        read_shape: Sizes of a model, of the family's name, the object in ``config.json`` and its path.
        trained_positions: Most positions that the models were trained with, whatever ``config.json`` allows.
        presets: ``config.json`` of the published models by name.
        tokens: Names of special tokens.
        processor: Transformers' processors and chat template.
        positions: Rows of time, height and width of a document, int64[3, S], of its segments (lengths of text, and
            visuals), the sizes and the rule after a video.  They are computed once, when the sample is built, and
            travel with the tokens from there on; nothing later derives positions from a pack.
        expand: What the placeholder of a visual becomes, of the visual, the sizes and a function that encodes a text:
            ids, and visuals that take a placeholder for each of their features, as `positions` gets them.
        served_after_video: The rule after a video that vLLM serves with, of `AFTER_VIDEO`.
        image_grid: What an image becomes, of its width and height, the sizes and the image budget.
        fewest_frames: Of a video; Transformers' processor refuses shorter ones.
        video_grid: What a video becomes, of its frames, width, height, frames a second, the sizes and the budget.
        weight_table: A row for each Megatron parameter, ``{i}`` for a layer (`ovr_megatron.weights.table`).
        weight_sizes: The numbers that the letters of ``weight_table`` stand for.
        weight_stacks: For how many parameters a row with ``{i}`` stands, by what stands before ``{i}`` in its name.
        has_module_names: Whether published folders name tensors as Transformers 5 names its modules
            (``model.language_model.*``), and not as Transformers 4 did; both are read.
        has_bridge_tower: Whether checkpoints of Megatron-Bridge name the vision tower's tensors as Transformers 4 did.
        decoder_options: Fields of Megatron's configuration of the language model that differ between families.
        load_model_class: The trainer's class, a `ovr_megatron.model.vision_language.VisionLanguageModel`.
        load_rollout_class: vLLM's class, a `ovr_megatron.rollout.model.RolloutModel`.
        patch_forward: FLOP of the tower and of the merger for a patch, of the sizes and the patches of its frame.
        tiny: Files of small random models.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architecture: str
    is_default: bool = False
    read_shape: Callable[[str, dict[str, object], Path], ModelShape]
    trained_positions: int
    presets: Mapping[str, dict[str, object]]
    tokens: SpecialTokens
    processor: ProcessorFiles
    positions: Callable[[Sequence[int | Visual], ModelShape, str], np.ndarray]
    expand: Callable[[Visual, ModelShape, Callable[[str], list[int]]], list[list[int] | Visual]] = _unchanged
    served_after_video: str
    image_grid: Callable[[int, int, ModelShape, DataConfig], Visual]
    fewest_frames: int = 1
    video_grid: Callable[[int, int, int, float, ModelShape, DataConfig], Visual]
    weight_table: tuple[WeightEntry, ...]
    weight_sizes: Callable[[ModelShape], dict[str, int]]
    weight_stacks: Callable[[ModelShape], Mapping[str, int]] = _layer_counts
    has_module_names: bool = False
    has_bridge_tower: bool = False
    decoder_options: Callable[[ModelShape], Mapping[str, object]]
    load_model_class: Callable[[], type[Any]]
    load_rollout_class: Callable[[], type[Any]]
    patch_forward: Callable[[ModelShape, int], tuple[float, float]]
    tiny: TinyModel

    def load_hf_class(self) -> type[Any]:
        """Return Transformers' class named by ``architecture``."""
        # Here and not at the top: the records of all families are read without Transformers.
        import transformers

        model_class: type[Any] = getattr(transformers, self.architecture)
        return model_class


_FAMILIES = Registry[Family]("family", {}, error=ConfigError)


def register(family: Family) -> None:
    """Make a family known.

    Raises:
        ConfigError: another family has its name, one of its values of ``model_type``, or a preset of that name.
    """
    # The families of this folder first, so that a clash with one of them is the new family's error.
    _load_packages()
    _add(family)


def _add(family: Family) -> None:
    for registered in _FAMILIES.rows.values():
        if set(registered.model_types) & set(family.model_types):
            types = ", ".join(registered.model_types)
            raise ConfigError(f"family {family.name}: {registered.name} (model_type {types}) is registered already")
        # A preset is asked for by its name alone, as 7B.
        shared_presets = set(registered.presets) & set(family.presets)
        if shared_presets:
            preset = min(shared_presets)
            raise ConfigError(
                f"family {family.name}: {preset} names a preset of {registered.name}; give it another name"
            )
    _FAMILIES.register(family.name, family)


@functools.cache
def _load_packages() -> None:
    """Register the families whose packages are in this folder, once a process, in the order of their names."""
    for module in pkgutil.iter_modules(__path__):
        if module.ispkg:
            # Here and not at the top: a family's package imports from this module.
            package = import_module(f"{__name__}.{module.name}")
            _add(package.FAMILY)


def families() -> list[Family]:
    """Return all known families."""
    _load_packages()
    return list(_FAMILIES.rows.values())


def titles() -> str:
    """Return the titles of all known families, for messages."""
    return " or ".join(family.title for family in families())


def family_of(source: ModelShape | str) -> Family:
    """Return the family of a model's sizes, or the one of a name.

    Raises:
        ConfigError: no family has the name; the message lists those that are known.
    """
    name = source if isinstance(source, str) else source.family
    _load_packages()
    return _FAMILIES.look_up(name)


def family_of_folder(directory: str | Path) -> Family:
    """Return the family that ``config.json`` of ``directory`` names.

    Raises:
        ShapeError: the file cannot be read, or names no known family.
    """
    return _family_of_config(*read_config(directory, titles()))


def _family_of_config(raw: dict[str, object], path: Path) -> Family:
    model_type = raw.get("model_type")
    for family in families():
        if model_type in family.model_types:
            return family
    known_types: list[str] = []
    for family in families():
        known_types.extend(repr(name) for name in family.model_types)
    types = " or ".join(known_types)
    raise ShapeError(f"{path}: model_type is {model_type!r}, expected {types}")


def default_family() -> Family:
    """Return the family of tiny models where none is named."""
    # Unpacking fails unless exactly one family is the default.
    (family,) = (family for family in families() if family.is_default)
    return family
