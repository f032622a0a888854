"""Adapters (LoRA) in the table of weights and in PEFT's files, and merged into the weights beside them.

A folder of an adapter has PEFT's `ADAPTER_WEIGHTS` and `ADAPTER_CONFIG`. Names in it are those that PEFT gives to the
modules of Transformers 5 (``base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight``), which
vLLM reads, too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from ovr_megatron.config import LoraConfig
from ovr_megatron.families import ModelShape
from ovr_megatron.families.adapters import adapted_linears
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.folder_kinds import ADAPTER, kind_of
from ovr_megatron.weights.diagnosis import HEAD
from ovr_megatron.weights.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WeightError, WeightFolder
from ovr_megatron.weights.shard import FORMATS
from ovr_megatron.weights.table import PEFT_PREFIX, TensorRow, module_name
from ovr_megatron.weights.table import rows as table_rows
from ovr_megatron.weights.transfer import VALUE_HEAD

_FINGERPRINTED = 256  # numbers of each tensor


def adapter_rows(shape: ModelShape, lora: LoraConfig) -> list[TensorRow]:
    """Return the rows of the table for all adapters of a model, in the order of its weights.

    A of a column-parallel linear is on every rank and B is cut as the weight is; of a row-parallel one it is the other
    way round.
    """
    adapters: list[TensorRow] = []
    for row in _adapted_rows(shape, lora):
        prefix = row.megatron.removesuffix(".weight")
        a_names = tuple(peft_name(name, "A") for name in row.hf)
        b_names = tuple(peft_name(name, "B") for name in row.hf)
        a_sizes = tuple((lora.rank, in_features) for _, in_features in row.sizes)
        b_sizes = tuple((out_features, lora.rank) for out_features, _ in row.sizes)
        is_row_parallel = row.kind == "row"
        a_kind = "row" if is_row_parallel else f"stacked_{len(row.hf)}"
        b_kind = "replicated" if is_row_parallel else row.kind
        adapters.append(TensorRow(f"{prefix}.adapter.lora_A", a_names, a_kind, a_sizes))
        adapters.append(TensorRow(f"{prefix}.adapter.lora_B", b_names, b_kind, b_sizes))
    return adapters


def _adapted_rows(shape: ModelShape, lora: LoraConfig) -> Iterator[TensorRow]:
    """Yield the rows of the weights that have an adapter."""
    linears = adapted_linears(shape, lora)
    tower_linears = adapted_linears(shape, lora, tower=True)
    for row in table_rows(shape):
        stack, _, name = row.megatron.partition(".layers.")
        _, _, linear = name.removesuffix(".weight").partition(".")
        names = tower_linears if stack == "vision" else linears
        if name.endswith(".weight") and linear in names:
            yield row


def peft_name(name: str, matrix: str) -> str:
    """Return PEFT's name of ``matrix``, A or B, of the adapter of a weight with the Hugging Face name ``name``."""
    module = module_name(name).removesuffix(".weight")
    return f"{PEFT_PREFIX}{module}.lora_{matrix}.weight"


def initial_adapter(row: TensorRow, seed: int) -> list[Tensor]:
    """Return the first values of an adapter's matrix, one tensor for each name of ``row``, in float32.

    A is uniform within 1 / sqrt(in), as in PEFT (Kaiming's rule with a = sqrt(5)), B is zero: the model begins as it
    is without the adapter. The numbers depend on seed and name alone, so that every layout begins with the same ones.
    """
    tensors = []
    for name, size in zip(row.hf, row.sizes, strict=True):
        tensor = torch.zeros(size)
        if row.megatron.endswith(".lora_A"):
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            bound = 1 / math.sqrt(size[1])
            tensor.uniform_(-bound, bound, generator=generator)
        tensors.append(tensor)
    return tensors


class AdapterConfig(TypedDict):
    """The fields of PEFT's ``adapter_config.json`` that are written."""

    peft_type: str
    task_type: str
    base_model_name_or_path: str
    r: int
    lora_alpha: float
    lora_dropout: float
    bias: str
    target_modules: str
    inference_mode: bool


def adapter_config(shape: ModelShape, lora: LoraConfig, base: Path) -> AdapterConfig:
    """Return PEFT's configuration of the adapters of the model in the folder ``base``."""
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha  # vLLM declares an integer
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _module_pattern(shape, lora),
        "inference_mode": True,
    }


def _module_pattern(shape: ModelShape, lora: LoraConfig) -> str:
    """Return a regular expression of the modules with an adapter: the tower's have the language model's last names."""
    patterns: list[str] = []
    for row in _adapted_rows(shape, lora):
        for name in row.hf:
            parts = module_name(name).removesuffix(".weight").split(".")
            pattern = r"\.".join(r"\d+" if part.isdigit() else part for part in parts)
            if pattern not in patterns:
                patterns.append(pattern)
    return "|".join(patterns)


def write_adapter_config(path: Path, config: AdapterConfig) -> None:
    """Write PEFT's configuration, and wait until the disk has it."""
    write_whole(path, json.dumps(config, indent=2) + "\n", durable=True)


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and no weights of a model."""
    return kind_of(folder) is ADAPTER


def adapter_dtype(folder: Path) -> torch.dtype | None:
    """Return the dtype of the adapters in ``folder``, which is that of the run; None where there are none."""
    if not is_adapter_folder(folder):
        return None
    with WeightFolder(folder, ADAPTER_WEIGHTS) as adapter:
        return FORMATS[adapter.dtype(adapter.names()[0])]


@dataclass(frozen=True)
class AdapterSettings:
    """What a stored adapter says of itself: the folder of its model, rank and scale."""

    base: Path
    rank: int
    scale: float


def read_adapter_settings(folder: Path) -> AdapterSettings:
    """Read PEFT's ``adapter_config.json``.

    Raises:
        WeightError: it is missing or broken, or asks for what is not computed here; names the field.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text())
        base = Path(config["base_model_name_or_path"])
        rank = int(config["r"])
        alpha = float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(f"{path} is not a LoRA configuration of PEFT ({error!r}); get this file again") from error
    for field in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save"):
        if config.get(field):
            raise WeightError(f"{path}: {field} is set, which is not computed here; merge it with PEFT")
    if rank < 1:
        raise WeightError(f"{path}: r is {rank}, expected at least 1")
    return AdapterSettings(base, rank, alpha / rank)


def fingerprint(folder: WeightFolder) -> str:
    """Return a hash that tells the weights of a folder from others: names, shapes and the first numbers of each tensor.

    It does not depend on the folder's path, its shards or its dtype's name in ``config.json``.
    """
    digest = hashlib.sha256()
    for name in sorted(folder.names()):
        # Mapped: only the first page of each tensor is read.
        first_numbers = folder.tensor(name).flatten()[:_FINGERPRINTED].double()
        digest.update(f"{name} {folder.shape(name)}".encode())
        digest.update(first_numbers.numpy().tobytes())
    return digest.hexdigest()


def check_adapter(folder: WeightFolder, rows: Sequence[TensorRow]) -> None:
    """Check every name and size of a stored adapter against the ``rows`` that it is to fill.

    Raises:
        WeightError: names the tensor, and both shapes where they differ.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for row in rows:
        expected |= zip(row.hf, row.sizes, strict=True)
    names = set(folder.names())
    if names != expected.keys():
        name = min(names ^ expected.keys())
        problem = "lacks" if name in expected else "has"
        raise WeightError(
            f"{folder.directory} {problem} {name}; model.lora.layers, model.lora.vision and the model must be those "
            "that the adapter was trained with"
        )
    for name, size in expected.items():
        if folder.shape(name) != size:
            raise WeightError(
                f"{folder.directory}: {name} has shape {list(folder.shape(name))}, and this run makes it {list(size)}; "
                "model.lora.rank and the model must be those that the adapter was trained with"
            )


class MergedFolder(WeightFolder):
    """The weights of a model with an adapter added; a critic's brings a value head in place of the model's head.

    Args:
        base: folder of the model.
        adapter: of the adapter; closed with this folder.
        scale: alpha / rank.

    Raises:
        WeightError: the model cannot be read, or the adapter belongs to another one.
    """

    def __init__(self, base: Path, adapter: WeightFolder, scale: float):
        super().__init__(base)
        self._open_files.push(adapter)
        self._adapter = adapter
        self._scale = scale
        unused = set(adapter.names())
        for name in self.names():
            pair = {peft_name(name, "A"), peft_name(name, "B")}
            if pair <= unused:
                self._check_pair(name)
                unused -= pair
        # A tensor of the adapter alone takes the place of the model's, or is one more: a critic's value head.
        self._own = {name for name in unused if not name.startswith(PEFT_PREFIX)}
        for name in self._own:
            self._stored[name] = adapter._find(name)
        if VALUE_HEAD in self._own:
            self._stored.pop(HEAD, None)
        if unused - self._own:
            raise WeightError(
                f"{adapter.directory}: {min(unused - self._own)} belongs to no weight of {base}; the adapter is of "
                "another model"
            )

    def _check_pair(self, name: str) -> None:
        """Refuse an adapter whose product has another size than the weight ``name``."""
        out_features = self._adapter.shape(peft_name(name, "B"))[0]
        in_features = self._adapter.shape(peft_name(name, "A"))[1]
        if (out_features, in_features) != self.shape(name):
            raise WeightError(
                f"{self._adapter.directory}: the adapter of {name} is {out_features} x {in_features}, and the weight "
                f"in {self.directory} is {list(self.shape(name))}; the adapter is of another model"
            )

    def tensor(self, name: str) -> Tensor:
        """Return a weight, in float32 where an adapter is added to it."""
        weight = super().tensor(name)
        if peft_name(name, "A") not in self._adapter:
            return weight
        down = self._adapter.tensor(peft_name(name, "A"))
        up = self._adapter.tensor(peft_name(name, "B"))
        return merge(weight, up, down, self._scale)


def merge(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A, float32 [out, in]; whoever stores it rounds it once."""
    product = (up.float() * scale) @ down.float()
    return product.add_(weight)
