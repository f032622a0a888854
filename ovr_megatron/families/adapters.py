"""Which linear layers of a model have an adapter (LoRA), by the names of Megatron's modules."""

from __future__ import annotations

from ovr_megatron.config import LoraConfig
from ovr_megatron.families import ModelShape, family_of

ATTENTION = ("self_attention.linear_qkv", "self_attention.linear_proj")
MLP = ("mlp.linear_fc1", "mlp.linear_fc2")
LINEARS = {"attention": ATTENTION, "mlp": MLP, "all": ATTENTION + MLP}


def adapted_linears(shape: ModelShape, lora: LoraConfig, tower: bool = False) -> dict[str, int]:
    """Return the linear layers of a transformer layer that have an adapter, each with its number of fused tensors.

    Args:
        shape: the model's sizes.
        lora: which layers have one.
        tower: of the vision tower's layers rather than of the language model's.
    """
    if not lora.rank or (tower and not lora.vision):
        return {}
    prefix = "vision.layers.{i}." if tower else "decoder.layers.{i}."
    linears: dict[str, int] = {}
    for megatron, hf, _, _ in family_of(shape).weight_table:
        name = megatron.removeprefix(prefix).removesuffix(".weight")
        if megatron.startswith(prefix) and name in LINEARS[lora.layers]:
            linears[name] = len(hf)
    return linears


def has_adapter(lora: LoraConfig, part: str) -> bool:
    """Whether linear layers of ``part`` of a layer, ``attention`` or ``mlp``, have adapters."""
    return lora.rank > 0 and lora.layers in (part, "all")


def is_adapter(name: str) -> bool:
    """Whether a Megatron parameter of this name belongs to an adapter."""
    return name.endswith((".lora_A", ".lora_B"))
