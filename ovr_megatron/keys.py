"""List the names of the settings of a schema, and find the nearest to a name that it does not have."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any

_MOST_PROPOSALS = 3
# Similarity of `difflib`, from 0 to 1: of entire dotted names, and of their last parts.
_SIMILAR_NAME = 0.75
_SIMILAR_LAST_PART = 0.65
# By the dotted name of a setting of former versions, what to write instead.
_FORMER_SETTINGS = {
    "algorithm.importance_cap": "write algorithm.correction=token_truncate algorithm.correction_high=CAP, and nothing "
    "where the cap was 0",
}

# By the last part of a setting's name in verl, ms-swift or TRL, ours; docs/coming_from.md has the rest.
NAMES_ELSEWHERE = {
    "beta": ["algorithm.kl_coefficient"],
    "clip_ratio": ["algorithm.clip"],
    "clip_ratio_high": ["algorithm.clip_high"],
    "entropy_coeff": ["algorithm.entropy_bonus"],
    "epsilon": ["algorithm.clip"],
    "epsilon_high": ["algorithm.clip_high"],
    "eval_steps": ["validation.every", "evaluation.every"],
    "filter_groups": ["algorithm.dynamic_sampling"],
    "freeze_vision_tower": ["model.freeze_vision"],
    "freeze_vit": ["model.freeze_vision"],
    "gradient_accumulation_steps": ["packs_per_step", "algorithm.policy_steps"],
    "gradient_checkpointing": ["model.recompute"],
    "kl_coef": ["algorithm.kl_coefficient"],
    "kl_loss_coef": ["algorithm.kl_coefficient"],
    "learning_rate": ["optimizer.lr"],
    "logger": ["run.trackers"],
    "logging_steps": ["run.log_every"],
    "lora_alpha": ["model.lora.alpha"],
    "lora_rank": ["model.lora.rank"],
    "max_completion_length": ["curriculum[].max_tokens"],
    "max_grad_norm": ["optimizer.clip_grad"],
    "max_length": ["data.pack_tokens"],
    "max_prompt_length": ["data.max_prompt_tokens"],
    "max_response_length": ["curriculum[].max_tokens"],
    "max_steps": ["steps", "iterations"],
    "micro_batch_size": ["data.pack_tokens", "packs_per_step"],
    "n": ["responses"],
    "num_generations": ["responses"],
    "num_train_epochs": ["epochs", "iterations"],
    "output_dir": ["run.dir"],
    "per_device_train_batch_size": ["packs_per_step", "prompts"],
    "ppo_epochs": ["algorithm.policy_epochs"],
    "ppo_micro_batch_size_per_gpu": ["data.pack_tokens"],
    "ppo_mini_batch_size": ["algorithm.policy_steps"],
    "report_to": ["run.trackers"],
    "save_freq": ["run.save_every"],
    "save_steps": ["run.save_every"],
    "save_total_limit": ["run.keep_last"],
    "target_modules": ["model.lora.layers"],
    "tensor_model_parallel_size": ["parallel.tp"],
    "test_freq": ["evaluation.every"],
    "train_batch_size": ["packs_per_step", "prompts"],
    "train_files": ["data.sources"],
    "val_files": ["evaluation.sources"],
    "warmup_ratio": ["optimizer.warmup_steps"],
}


def replace_former_settings(settings: dict[str, Any]) -> None:
    """Replace the settings of former versions in the stored ``settings`` of a run by those that mean the same."""
    algorithm = settings.get("algorithm")
    if isinstance(algorithm, dict) and "importance_cap" in algorithm:
        cap = algorithm.pop("importance_cap")
        if cap:
            algorithm |= {"correction": "token_truncate", "correction_high": cap}


# The same within a section of an optimizer, where some names have another meaning.
_NAMES_IN_OPTIMIZER = {"epsilon": ["eps"], "adam_epsilon": ["eps"], "beta": ["beta1", "beta2"]}


def setting_names(schema: type) -> Iterator[str]:
    """Yield every dotted name of the dataclass ``schema``; elements of a list are written ``data.sources[].path``."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field.name
        for inner_schema, mark in _inner_schemas(hints[field.name]):
            for name in setting_names(inner_schema):
                yield f"{field.name}{mark}.{name}"


def leaf_names(schema: type) -> list[str]:
    """Return the dotted names of ``schema`` that are no sections."""
    names = list(setting_names(schema))
    sections = {name.rpartition(".")[0] for name in names}
    return [name for name in names if name not in sections]


def mapping_names(schema: type) -> Iterator[str]:
    """Yield the dotted names of the settings of ``schema`` whose keys the user chooses, as ``reward.rules``."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if typing.get_origin(hints[field.name]) is dict:
            yield field.name
        for inner_schema, mark in _inner_schemas(hints[field.name]):
            for name in mapping_names(inner_schema):
                yield f"{field.name}{mark}.{name}"


def optional_sections(schema: type) -> Iterator[str]:
    """Yield the dotted names of the sections of ``schema`` that may be null, as ``critic.parallel``."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if NoneType in typing.get_args(hint) and any(map(dataclasses.is_dataclass, typing.get_args(hint))):
            yield field.name
        for inner_schema, mark in _inner_schemas(hint):
            for name in optional_sections(inner_schema):
                yield f"{field.name}{mark}.{name}"


def with_new_keys(schema: type, overrides: Sequence[str]) -> list[str]:
    """Return ``overrides`` with ``++`` before those that add keys: only then Hydra lets them.

    They are those of mappings, and those of fields in a section that may be null.
    """
    patterns = [rf"{re.escape(name)}(?:\.[^=]*)?=" for name in mapping_names(schema)]
    patterns += [rf"{re.escape(name)}\.[^=]+=" for name in optional_sections(schema)]
    if not patterns:
        return list(overrides)
    adds_key = re.compile("|".join(patterns))
    return [f"++{override}" if adds_key.match(override) else override for override in overrides]


def text_names(schema: type) -> Iterator[str]:
    """Yield the dotted names of the settings of ``schema`` that are text, as ``run.dir``, except those in lists."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if _is_text_hint(hint):
            yield field.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            for name in text_names(hint):
                yield f"{field.name}.{name}"


def _is_text_hint(hint: Any) -> bool:
    """Return whether a setting of this type is text: any, one of some choices, or none."""
    if typing.get_origin(hint) is typing.Literal:
        return all(isinstance(choice, str) for choice in typing.get_args(hint))
    arguments = typing.get_args(hint)
    return hint is str or (NoneType in arguments and all(_is_text_hint(a) for a in arguments if a is not NoneType))


def _inner_schemas(hint: Any) -> Iterator[tuple[type, str]]:
    """Yield the dataclasses in a type hint, each with a mark for what is around it: ``[]`` a list, ``.NAME`` names."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint, ""
    for argument in typing.get_args(hint):
        mark = {list: "[]", dict: ".NAME"}.get(typing.get_origin(hint), "")
        for inner_schema, inner_mark in _inner_schemas(argument):
            yield inner_schema, mark + inner_mark


def unknown_setting(schema: type, name: str) -> str:
    """Return the error message for a ``name`` that ``schema`` does not have, with the names that were probably meant.

    Args:
        schema: root dataclass of the configuration.
        name: dotted; the index of a list may be in it, as in ``data.sources.0.pth``.
    """
    if name in _FORMER_SETTINGS:
        return f"there is no setting {name} any more; {_FORMER_SETTINGS[name]}"
    without_indices = re.sub(r"\.\d+(?=\.|$)|\[\d+\]", "[]", name)
    nearest = nearest_names(without_indices, leaf_names(schema))
    remedy = f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists all settings"
    return f"there is no setting {name}; {remedy}"


def nearest_names(name: str, candidates: list[str]) -> list[str]:
    """Return at most three dotted names of ``candidates``.

    They are those that end in ``name``, those that mean what ``name`` does in another trainer, or the most similar one.
    """
    endings = [candidate for candidate in candidates if candidate.endswith(f".{name}")]
    if endings:
        return endings[:_MOST_PROPOSALS]
    *outer_parts, last_part = name.split(".")
    # Within a section of ours first: `epsilon` is Adam's in `optimizer`, and the clip's elsewhere.
    own_section = [candidate for candidate in candidates if candidate.rpartition(".")[0] == ".".join(outer_parts)]
    if outer_parts and own_section:
        if ours := _names_in_section(last_part, own_section):
            return ours
    for part in (last_part, *reversed(outer_parts)):
        if ours := _our_names(name, part, candidates):
            return ours
    if similar := difflib.get_close_matches(name, candidates, n=1, cutoff=_SIMILAR_NAME):
        return similar
    for foreign_name in difflib.get_close_matches(last_part, NAMES_ELSEWHERE, n=1, cutoff=_SIMILAR_NAME):
        return _our_names(name, foreign_name, candidates)
    # Of several candidates with one last part, the first of the schema wins: later entries overwrite earlier ones.
    by_last_part = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    matches = difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=_SIMILAR_LAST_PART)
    return [by_last_part[match] for match in matches]


def _names_in_section(foreign_name: str, section: list[str]) -> list[str]:
    """Return the settings of one section that ``foreign_name`` means or is most similar to."""
    by_last_part = {candidate.rpartition(".")[2]: candidate for candidate in section}
    meant = [name for name in _NAMES_IN_OPTIMIZER.get(foreign_name, []) if name in by_last_part]
    similar = difflib.get_close_matches(foreign_name, by_last_part, n=1, cutoff=_SIMILAR_NAME)
    return [by_last_part[name] for name in meant or similar]


def _our_names(name: str, foreign_name: str, candidates: list[str]) -> list[str]:
    """Return the ``candidates`` that mean what ``foreign_name`` does in another trainer.

    In the section of ``name`` only that section's: ``critic.optimizer.learning_rate`` is ``critic.optimizer.lr``.
    """
    ours = [candidate for candidate in NAMES_ELSEWHERE.get(foreign_name, []) if candidate in candidates]
    section = name.rpartition(".")[0]
    in_section = [f"{section}.{candidate.rpartition('.')[2]}" for candidate in ours]
    return [candidate for candidate in in_section if candidate in candidates] or ours
