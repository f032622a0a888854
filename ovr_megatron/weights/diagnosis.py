"""Why the tensors of a folder are not those of its ``config.json``: the ways in which models are saved elsewhere."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ovr_megatron.weights.table import canonical

HEAD = "lm_head.weight"
_ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".lora_embedding_", ".lora_magnitude_", ".base_layer.", ".modules_to_save.")
_QUANTISED_SUFFIXES = {
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".scales": "AWQ or GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
# Files that are no part of a model in shards, and what they are.
_LEFT_OVERS = {
    "adapter_model.safetensors": "a LoRA adapter, which is not applied (merge it into the model first if it should be)",
    "consolidated.safetensors": "another copy of a model",
    "optimizer.safetensors": "an optimizer's state",
}


def left_over(name: str) -> str | None:
    """What a safetensors file beside a whole model is, or None where it may be a part of the model."""
    if name.startswith("consolidated"):
        return _LEFT_OVERS["consolidated.safetensors"]
    return _LEFT_OVERS.get(name)


def explain(
    directory: Path,
    names: Collection[str],
    expected: Collection[str],
    critic: bool,
) -> str | None:
    """One sentence on a known way of saving, None where the tensors fit none.

    Args:
        directory: Of the folder, for the sentence.
        names: Of its tensors, as `canonical` gives them.
        expected: Those that the model needs.
        critic: Whether it is to be a critic.
    """
    for name in sorted(names):
        kinds = [kind for suffix, kind in _QUANTISED_SUFFIXES.items() if name.endswith(suffix)]
        if kinds:
            kind = kinds[0]
            return f"{directory}: {name} is a quantised weight ({kind}); give the model it was made from, unquantised"
        if any(mark in f"{name}." for mark in _ADAPTER_MARKS):
            return (
                f"{directory}: {name} is a part of a LoRA adapter; merge it into its model first (PEFT: "
                "merge_and_unload) and save the whole model"
            )
    if prefix := _prefix(names, expected):
        return (
            f"{directory}: every tensor is named {prefix}... ({min(names)}), as a wrapped model saves them; "
            "save the inner model, or rename them without it"
        )
    missing = set(expected) - set(names)
    if missing == {HEAD} and not critic and set(names) <= set(expected):
        return (
            f"{directory}: {HEAD} is missing and config.json says tie_word_embeddings=false: the head was lost in "
            "saving; save the model again, or set it to true if output layer and embedding are one"
        )
    if missing and missing == {name for name in expected if name.startswith("visual.")}:
        return f"{directory}: the vision tower (visual.*) is missing; it is a language model alone, give the whole one"
    return None


def _prefix(names: Collection[str], expected: Collection[str]) -> str | None:
    """What stands before the model's own name in each tensor's, if nearly all have it."""
    anchor = next((name for name in sorted(names) if name.endswith("embed_tokens.weight")), None)
    if anchor is None:
        return None
    stem = "embed_tokens.weight"
    # The longest first: the others end it, too, and would leave a part of the model's own name in the prefix.
    for inner in (f"model.language_model.{stem}", f"language_model.{stem}", f"model.{stem}"):
        if not anchor.endswith(inner):
            continue
        prefix = anchor.removesuffix(inner)
        if prefix:
            prefixed_names = [name for name in names if name.startswith(prefix)]
            bare = {canonical(name.removeprefix(prefix)) for name in prefixed_names}
            matching = bare & set(expected)
            if len(matching) > len(expected) // 2:
                return prefix
    return None
