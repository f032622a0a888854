"""Read Megatron-LM's older checkpoints: a file ``mp_rank_TT[_PPP]/model_optim_rng.pt`` of each model-parallel rank.

The files are mapped, so that memory holds the pages in use.  They are pickles: tensors alone are read
(``weights_only=True``).  Arguments, random states and enumerations of Megatron beside them become empty records, and a
file that names any other class or function is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ovr_megatron.weights.folder import WeightError, some
from ovr_megatron.weights.torch_dist import PlainRecord

FILE = "model_optim_rng.pt"
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_MODEL = re.compile(r"model(\d*)")
_LAYER = re.compile(r"(.*\bdecoder\.layers\.)(\d+)(\..*)")
# What a training program stores beside the weights. None of it is made: an empty record takes its place.
_RECORDS = ("argparse.Namespace", "megatron.", "numpy.", "_io.BytesIO", "pathlib.", "signal.", "transformer_engine.")
_ModelPart = dict[str, Tensor]


@dataclass(frozen=True)
class _RankFile:
    """The weights in one file: by interleaved part of its pipeline stage, under the names of that part."""

    path: Path
    parts: list[_ModelPart]


class RankFiles:
    """The tensors of a checkpoint by rank, under the names that the whole model gives its layers.

    Attributes:
        directory: of the iteration.
        sizes: of each tensor on a tensor-parallel rank.

    Raises:
        WeightError: a rank's file is missing, damaged, of another kind of model, or asks for code to be run.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        files = _read_files(directory)
        ranks = {rank for rank, _ in files}
        stages = {stage for _, stage in files}
        tp = max(ranks) + 1
        stage_count = max(stages) + 1
        if len(files) != tp * stage_count:
            raise WeightError(
                f"{directory} has {len(files)} of the {tp * stage_count} files of {tp} tensor-parallel ranks and "
                f"{stage_count} stages; copy the checkpoint again"
            )
        self._shards: dict[str, list[Tensor]] = {}
        for rank in range(tp):
            parts = [files[rank, stage].parts for stage in range(stage_count)]
            joined = _join_stages(parts)
            for key, tensor in joined.items():
                shards = self._shards.setdefault(key, [])
                shards.append(tensor)
        for key, shards in self._shards.items():
            if len(shards) != tp:
                raise WeightError(f"{directory}: {len(shards)} of {tp} ranks have {key}; copy the checkpoint again")
        self.sizes: dict[str, tuple[int, ...]] = {}
        for key, shards in self._shards.items():
            self.sizes[key] = tuple(shards[0].shape)

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._shards[key][0].dtype

    def shards(self, key: str, layer: int | None = None) -> list[Tensor]:
        """Return the parts of a tensor, one for each tensor-parallel rank, mapped from their files."""
        assert layer is None, "layers are not stacked in this format"
        return self._shards[key]


def _read_files(directory: Path) -> dict[tuple[int, int], _RankFile]:
    """Return the files by tensor-parallel rank and pipeline stage."""
    files: dict[tuple[int, int], _RankFile] = {}
    for folder in sorted(directory.glob("mp_rank_*")):
        match = RANK_FOLDER.fullmatch(folder.name)
        if match is None:
            raise WeightError(
                f"{folder}: a rank of expert parallelism, or of another form; save the checkpoint as torch_dist"
            )
        rank = int(match[1])
        stage = int(match[2] or 0)
        path = folder / FILE
        parts = _read_parts(path)
        files[rank, stage] = _RankFile(path, parts)
    if not files:
        raise WeightError(f"{directory} has no mp_rank_* folder; give the folder of an iteration")
    return files


def _read_parts(path: Path) -> list[_ModelPart]:
    """Return the weights in a file: ``model``, or ``model0`` and so on of an interleaved pipeline."""
    content = _load(path)
    numbered: dict[int, str] = {}
    for name in content:
        match = _MODEL.fullmatch(name)
        if match:
            number = int(match[1] or 0)
            numbered[number] = name
    parts: list[_ModelPart] = []
    for number in sorted(numbered):
        name = numbered[number]
        weights = content[name]
        if not isinstance(weights, Mapping):
            raise WeightError(f"{path}: {name} is no dictionary of weights; give a checkpoint of Megatron-Core")
        part: _ModelPart = {}
        for key, value in weights.items():
            if isinstance(value, Mapping):
                raise WeightError(
                    f"{path}: {name}.{key} is nested, as Megatron-LM's models before Megatron-Core are saved; convert "
                    "it with Megatron-LM's tools/checkpoint/convert.py --saver core first"
                )
            if isinstance(value, Tensor) and not key.endswith("_extra_state"):
                part[key] = value
        parts.append(part)
    if not parts:
        raise WeightError(f"{path} has no model; give the folder that has the model's files")
    return parts


def _load(path: Path) -> dict[str, object]:
    """Return the content of a file, tensors mapped and everything else but plain values as empty records."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = [name for name in names if not name.startswith(_RECORDS)]
        if refused:
            raise WeightError(
                f"{path} asks for {some(sorted(refused))} to be run, which is not done for a file from elsewhere; save "
                "the checkpoint as torch_dist with the program that wrote it"
            )
        # By name: the classes themselves are not looked up.
        records = [(PlainRecord, name) for name in names]
        with torch.serialization.safe_globals(records):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise WeightError(f"{path} is missing; copy the checkpoint again") from None
    except WeightError:
        raise
    # A damaged pickle raises nearly every class of error.
    except Exception as error:
        raise WeightError(f"{path} is damaged or cut off ({type(error).__name__}); copy it again") from error
    if not isinstance(content, dict):
        raise WeightError(f"{path} holds a {type(content).__name__} and no checkpoint of Megatron-LM; give another one")
    return content


def _join_stages(stages: list[list[_ModelPart]]) -> _ModelPart:
    """Return the weights of all stages of a rank, layers counted over the whole model.

    A stage counts its layers from 0.  Part v of stage s comes before part v of stage s + 1, and all parts v before
    parts v + 1.
    """
    joined: _ModelPart = {}
    offset = 0
    for parts in zip(*stages, strict=True):
        for part in parts:
            layers = 0
            for key, tensor in part.items():
                match = _LAYER.fullmatch(key)
                if match is None:
                    joined.setdefault(key, tensor)
                    continue
                prefix, local, rest = match.groups()
                layer = int(local)
                layers = max(layers, layer + 1)
                name = f"{prefix}{offset + layer}{rest}"
                joined[name] = tensor
            offset += layers
    return joined
