"""Weights of checkpoints that Megatron-LM and Megatron-Bridge write, under Hugging Face names, and the way back.

Megatron-Bridge names the language model ``language_model.*``, as Megatron-Core's GPTModel names it, and keeps the tower
of Transformers as ``visual.*``.  Megatron-LM's GPTModel has the first names without their prefix and no tower.
How parameters are fused stands in `ovr_megatron.weights.table`.  In torch_dist the layers of a parameter are stacked
along a first dimension, unless the model was saved with ``non_homogeneous_layers``: both are read, and the first is
written, which is what both programs expect by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.runtime.folder_kinds import TRACKER, describe_folder, newest_iteration, tracked_iteration
from ovr_megatron.weights import table
from ovr_megatron.weights.diagnosis import HEAD
from ovr_megatron.weights.folder import WeightError, WeightFolder, some
from ovr_megatron.weights.rank_files import RANK_FOLDER, RankFiles
from ovr_megatron.weights.shard import FORMATS
from ovr_megatron.weights.table import TensorRow
from ovr_megatron.weights.torch_dist import TensorChunk, TorchDistFolder

LANGUAGE = "language_model."
_TOWER = "visual."
_TABLE_TOWER = "vision."  # in `ovr_megatron.weights.table`
_LAYERS = "decoder.layers."
_TRAINING = ("optimizer", "chained_", "rng_state", "rerun_state_machine", "opt_param_scheduler", "iteration")
# Layers without Transformer Engine have their norms as modules of their own.
_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
# Modules that have a state of their own in Transformer Engine. Without FP8 it is empty, and a model asks for it.
_STATEFUL = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
# The same of the norms of queries and keys of each head, in models that have them.
_STATEFUL_HEAD_NORMS = ("self_attention.q_layernorm", "self_attention.k_layernorm")
_FORMAT_NAMES = {dtype: name for name, dtype in FORMATS.items()}


class MegatronTensors(Protocol):
    """The stored tensors of a checkpoint, of `TorchDistFolder` or `RankFiles`."""

    @property
    def directory(self) -> Path:
        """Return the folder of the iteration."""

    @property
    def sizes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the sizes of all stored tensors; of the parts that one rank has, where they are apart."""

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a stored tensor."""

    def shards(self, key: str, layer: int | None = None) -> list[Tensor]:
        """Return the parts of a stored tensor, of a stacked one those of ``layer``, by tensor-parallel rank."""


@dataclass(frozen=True)
class _Stored:
    """Where a parameter lies: keys whose tensors follow one another along dimension 0, and a layer of stacked ones."""

    keys: tuple[str, ...]
    layer: int | None


@dataclass(frozen=True)
class _Part:
    """A Hugging Face tensor as a part of a parameter: the ``index``-th of ``row``, or the parameter itself."""

    parameter: str
    row: TensorRow | None
    index: int
    size: tuple[int, ...]


def open_megatron(path: Path) -> MegatronTensors:
    """Open a checkpoint of Megatron-LM or Megatron-Bridge: its newest iteration, or the one that ``path`` is.

    Raises:
        WeightError: there is no checkpoint, or it cannot be read.
    """
    iteration = newest_iteration(path)
    if iteration is None:
        problem = (
            f"{path} is no checkpoint of Megatron-LM or Megatron-Bridge: no iteration is in it; give the folder "
            f"that has {TRACKER}"
        )
        raise WeightError(describe_folder(path, "megatron") or problem)
    tracked = tracked_iteration(path)
    if tracked not in (None, iteration.name):
        raise WeightError(
            f"{path / TRACKER} names {tracked!r}, which is not there or not whole; copy it again, or give the folder "
            "of another iteration"
        )
    if any(RANK_FOLDER.match(folder.name) for folder in iteration.iterdir()):
        return RankFiles(iteration)
    return TorchDistFolder(iteration)


class MegatronFolder(WeightFolder):
    """A checkpoint of Megatron-LM or Megatron-Bridge as the Hugging Face tensors that it holds, fused no more.

    Args:
        source: of the stored tensors.
        shape: of the model.
        tower: of a folder that gives the vision tower to a checkpoint of the language model alone; closed with this.

    Raises:
        WeightError: a tensor belongs to no parameter of the model, or the tower is missing or comes twice.
    """

    def __init__(self, source: MegatronTensors, shape: ModelShape, tower: WeightFolder | None = None):
        self.directory = source.directory
        self._source = source
        self._shape = shape
        self._tower = tower
        self._parameters = _parameters(source.sizes, shape.layers)
        self._parts: dict[str, _Part] = {}
        self._find_parts()
        names = [name for name in self._parts if name.startswith(_TOWER)]
        if tower is not None and names:
            raise WeightError(f"{self.directory} has a vision tower ({some(names)}); leave out --text-only")
        if tower is None and not names:
            raise WeightError(
                f"{self.directory} has no vision tower ({_TOWER}*): it is a language model alone; with --text-only the "
                "tower is that of --hf"
            )
        # Query, key and value are parts of one parameter and asked for one after another.
        self._load = lru_cache(maxsize=2)(self._read)

    def _find_parts(self) -> None:
        """Assign each stored parameter to the Hugging Face tensors that it holds."""
        unknown = set(self._parameters)
        rows = table.rows(self._shape)
        if self._shape.tied:
            # The last stage of a pipeline may have stored its copy of the embedding.
            head_size = (self._shape.vocab, self._shape.hidden)
            rows.append(TensorRow("output_layer.weight", (HEAD,), "vocabulary", (head_size,)))
        for row in rows:
            is_tower = row.megatron.startswith(_TABLE_TOWER)
            for index, (name, size) in enumerate(zip(row.hf, row.sizes, strict=True)):
                parameter = name if is_tower else row.megatron
                if parameter in self._parameters:
                    self._parts[name] = _Part(parameter, None if is_tower else row, index, size)
                    unknown.discard(parameter)
        if unknown:
            raise WeightError(
                f"{self.directory}: {some(sorted(unknown))} not in this model; the checkpoint and --hf do not belong "
                "together"
            )

    def __exit__(self, *exception: object) -> None:
        if self._tower is not None:
            self._tower.__exit__(*exception)

    def __contains__(self, name: str) -> bool:
        return name in self._parts or self._from_tower(name)

    def _from_tower(self, name: str) -> bool:
        return self._tower is not None and name.startswith(_TOWER) and name in self._tower

    def names(self) -> list[str]:
        """Return the Hugging Face names of all tensors."""
        tower_names = self._tower.names() if self._tower is not None else []
        return [*self._parts, *(name for name in tower_names if self._from_tower(name))]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as the model needs it; `tensor` refuses another one."""
        if self._tower is not None and self._from_tower(name):
            return self._tower.shape(name)
        return self._part(name).size

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as safetensors writes it, without reading it."""
        if self._tower is not None and self._from_tower(name):
            return self._tower.dtype(name)
        keys = self._parameters[self._part(name).parameter].keys
        dtype = self._source.dtype(keys[0])
        return _FORMAT_NAMES.get(dtype, str(dtype))

    def tensor(self, name: str) -> Tensor:
        """Return the tensor.

        Raises:
            WeightError: it is not of the model's size, or cannot be read.
        """
        if self._tower is not None and self._from_tower(name):
            return self._tower.tensor(name)
        part = self._part(name)
        parameter = self._load(part.parameter, part.row)
        tensor = parameter
        if part.row is not None:
            tensors = table.to_hf(part.row, parameter, self._shape)
            tensor = tensors[part.index]
        shape = tuple(tensor.shape)
        if shape != part.size:
            raise WeightError(
                f"{self.directory}: {part.parameter} gives {name} the shape {list(shape)}, and config.json "
                f"makes it {list(part.size)}; the checkpoint and --hf do not belong together"
            )
        return tensor

    def _part(self, name: str) -> _Part:
        if name not in self._parts:
            raise WeightError(f"{self.directory} has no parameter with {name}; it is of another model or not whole")
        return self._parts[name]

    def _read(self, parameter: str, row: TensorRow | None) -> Tensor:
        """Return a whole parameter, the padding of the vocabulary cut off."""
        stored = self._parameters[parameter]
        wholes = []
        for key in stored.keys:
            shards = self._source.shards(key, stored.layer)
            if row is None:
                # Transformers' tower is on every rank entire.
                return shards[0]
            whole = table.join(row, shards, self._shape)
            wholes.append(whole)
        assert row is not None
        whole = wholes[0] if len(wholes) == 1 else torch.cat(wholes)
        if row.kind == "vocabulary":
            return whole[: self._shape.vocab]
        self._check_elements(parameter, whole, row)
        return whole

    def _check_elements(self, parameter: str, whole: Tensor, row: TensorRow) -> None:
        """Refuse a fused parameter of another size: it could not be taken apart."""
        expected = _fused_size(row)
        shape = tuple(whole.shape)
        if shape != expected:
            raise WeightError(
                f"{self.directory}: {parameter} has shape {list(shape)}, and config.json makes it "
                f"{list(expected)}; the checkpoint and --hf do not belong together"
            )


def _fused_size(row: TensorRow) -> tuple[int, ...]:
    """Return the size of a whole parameter: its Hugging Face tensors are stacked along the first dimension."""
    row_counts = [size[0] for size in row.sizes]
    _, *width = row.sizes[0]
    return (sum(row_counts), *width)


def _parameters(sizes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, _Stored]:
    """Return where each parameter of the model lies, by the name that the table gives it.

    Raises:
        WeightError: stacked layers are not as many as the model has.
    """
    parameters: dict[str, _Stored] = {}
    for key, size in sizes.items():
        name = key.removeprefix("module.").removeprefix(LANGUAGE)
        if name.startswith(_TRAINING) or name.endswith(("_extra_state", "rotary_pos_emb.inv_freq")):
            continue
        for suffix, fused in _NORMS.items():
            if name.endswith(suffix):
                name = name.removesuffix(suffix) + fused
        # Gate and up under names of their own (``singleton_local_shards``).
        keys: tuple[str, ...] = (key,)
        if name.endswith("mlp.linear_fc1.weight_v"):
            continue
        if name.endswith("mlp.linear_fc1.weight_w"):
            name = name.removesuffix("_w")
            keys = (key, key.removesuffix("_w") + "_v")
        rest = name.removeprefix(_LAYERS)
        if rest == name or re.match(r"\d+\.", rest):
            parameters[name] = _Stored(keys, None)
            continue
        stacked_layers = size[0] if size else 0
        if stacked_layers != layers:
            raise WeightError(
                f"{key} has {stacked_layers} layers, and config.json says {layers}; the checkpoint and --hf do not "
                "belong together"
            )
        for layer in range(layers):
            parameters[f"{_LAYERS}{layer}.{rest}"] = _Stored(keys, layer)
    return parameters


def chunks(
    folder: WeightFolder,
    shape: ModelShape,
    text_only: bool,
    dtype: torch.dtype | None,
) -> Iterator[TensorChunk]:
    """Yield the chunks of a torch_dist checkpoint of a policy, its layers stacked, in the order of the table.

    Args:
        folder: weights under Hugging Face names, checked against ``shape``.
        shape: of the model.
        text_only: whether the names are those of Megatron-LM's GPTModel, without the vision tower.
        dtype: of the result; None keeps each tensor's own.
    """
    prefix = "" if text_only else LANGUAGE
    for row in table.rows(shape):
        stored = dtype or FORMATS[folder.dtype(row.hf[0])]
        if row.megatron.startswith(_TABLE_TOWER):
            if not text_only:
                for name, size in zip(row.hf, row.sizes, strict=True):
                    load = partial(folder.tensor, name)
                    yield TensorChunk(name, size, (0,) * len(size), size, stored, load)
            continue
        size = _fused_size(row)
        start = (0,) * len(size)
        load = partial(_fuse, folder, row, shape)
        if not row.megatron.startswith(_LAYERS):
            yield TensorChunk(f"{prefix}{row.megatron}", size, start, size, stored, load)
            continue
        name = row.megatron.removeprefix(_LAYERS)
        layer, _, rest = name.partition(".")
        stacked_size = (shape.layers, *size)
        offsets = (int(layer), *start)
        yield TensorChunk(f"{prefix}{_LAYERS}{rest}", stacked_size, offsets, (1, *size), stored, load)


def _fuse(folder: WeightFolder, row: TensorRow, shape: ModelShape) -> Tensor:
    """Read a parameter."""
    tensors = [folder.tensor(name) for name in row.hf]
    return table.from_hf(row, tensors, shape)


def empty_states(shape: ModelShape, text_only: bool) -> list[str]:
    """Return the keys of the states that modules of Transformer Engine ask for when they are loaded."""
    prefix = "" if text_only else LANGUAGE
    keys = [f"{prefix}decoder.final_layernorm._extra_state/shard_0_1"]
    has_head_norms = bool(family_of(shape).decoder_options(shape).get("qk_layernorm"))
    modules = (*_STATEFUL, *(_STATEFUL_HEAD_NORMS if has_head_norms else ()))
    for module in modules:
        for layer in range(shape.layers):
            keys.append(f"{prefix}{_LAYERS}{module}._extra_state/shard_{layer}_{shape.layers}")
    return keys
