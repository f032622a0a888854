"""The uniform average of several models' weights (paper, section 3.2: the final model)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ovr_megatron.data.hf_assets import check_assets
from ovr_megatron.families import ModelShape
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.weights.diagnosis import HEAD
from ovr_megatron.weights.folder import WeightError, WeightFolder, WeightWriter, copy_hf_assets
from ovr_megatron.weights.table import published_name
from ovr_megatron.weights.transfer import check_finite, check_weights, staged

_PIECE = 1 << 22  # numbers that are summed at once


def policy_folder(directory: Path) -> Path:
    """The Hugging Face folder of a checkpoint's policy; a folder that is a model itself stays as it is."""
    policy = directory / "policy"
    if (policy / "config.json").exists():
        return policy
    return directory


def average(directories: Sequence[Path], out: Path, replace: bool = False) -> None:
    """Write the uniform mean of the weights, and the first model's other files, to the Hugging Face folder ``out``.

    Each directory is a Hugging Face folder or a checkpoint, whose policy is taken.  The folder appears when it is
    whole; memory holds one shard.  A tied model is written without ``lm_head.weight``.

    Raises:
        WeightError: no directory, models of different shapes or dtypes, weights that `check_weights`
            refuses, or an ``out`` that `staged` refuses.
    """
    if not directories:
        raise WeightError("nothing to average: give at least one checkpoint or Hugging Face folder")
    sources = [policy_folder(directory) for directory in directories]
    shapes = [check_assets(source) for source in sources]
    with ExitStack() as stack:
        folders = [stack.enter_context(WeightFolder(source)) for source in sources]
        first_folder = folders[0]
        first_shape = shapes[0]
        for folder, shape in zip(folders, shapes, strict=True):
            check_weights(folder, shape)
            check_finite(folder)
            _check_alike(first_folder, first_shape, folder, shape)
        names = first_folder.names()
        if first_shape.tied:  # the embedding is the output layer, which only some folders store a second time
            names = [name for name in names if name != HEAD]
        # The writer, entered last, names its files before the folder that they are in gets its own name.
        partial = stack.enter_context(staged(out, directories, replace))
        copy_hf_assets(sources[0], partial)
        title = f"mean of {len(folders)} models"
        progress = stack.enter_context(Progress(len(names), title, "tensor"))
        writer = stack.enter_context(WeightWriter(partial))
        for name in names:
            tensors = [folder.tensor(name) for folder in folders]
            writer.add(published_name(name, first_shape), mean(tensors))
            progress.update(1)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of equally shaped tensors, rounded once to their format.

    float32 is summed in float64, bfloat16 and float16 in float32, in the order given.
    """
    first = tensors[0]
    wide = torch.float64 if first.dtype == torch.float32 else torch.float32
    result = torch.empty_like(first)
    # Piece by piece: a wide copy of a whole embedding would take several times its memory.
    targets = result.view(-1).split(_PIECE)
    sources = [tensor.flatten().split(_PIECE) for tensor in tensors]
    for target, *pieces in zip(targets, *sources, strict=True):
        total = torch.zeros_like(target, dtype=wide)
        for piece in pieces:
            total += piece
        target.copy_(total / len(tensors))
    return result


def _check_alike(
    first: WeightFolder,
    first_shape: ModelShape,
    second: WeightFolder,
    second_shape: ModelShape,
) -> None:
    first_sizes = dataclasses.asdict(first_shape)
    second_sizes = dataclasses.asdict(second_shape)
    for key, size in first_sizes.items():
        if second_sizes[key] != size:
            raise WeightError(
                f"{second.directory} is of another model than {first.directory}: {key} is {second_sizes[key]} instead "
                f"of {size}; average checkpoints of one run"
            )
    for name in first.names():
        if name not in second:
            continue
        first_dtype = first.dtype(name)
        second_dtype = second.dtype(name)
        if second_dtype != first_dtype:
            raise WeightError(
                f"{second.directory}: {name} is {second_dtype}, but {first_dtype} in {first.directory}; "
                "convert them to one format first"
            )
