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
_SIMILAR_LAST_PART = 0.6
# By the dotted name of a setting of former versions, what to write instead.
_FORMER_SETTINGS = {
    "algorithm.importance_cap": "write algorithm.correction=token_truncate algorithm.correction_high=CAP, and nothing "
    "where the cap was 0",
}


def replace_former_settings(settings: dict[str, Any]) -> None:
    """Replace the settings of former versions in the stored ``settings`` of a run by those that mean the same."""
    algorithm = settings.get("algorithm")
    if isinstance(algorithm, dict) and "importance_cap" in algorithm:
        cap = algorithm.pop("importance_cap")
        if cap:
            algorithm |= {"correction": "token_truncate", "correction_high": cap}


def setting_names(schema: type) -> Iterator[str]:
    """Yield every dotted name of the dataclass ``schema``; elements of a list are written ``data.sources[].path``."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field.name
        for inner_schema, mark in _inner_schemas(hints[field.name]):
            for name in setting_names(inner_schema):
                yield f"{field.name}{mark}.{name}"


def mapping_names(schema: type) -> Iterator[str]:
    """Yield the dotted names of the settings of ``schema`` whose keys the user chooses, as ``reward.rules``."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if typing.get_origin(hints[field.name]) is dict:
            yield field.name
        for inner_schema, mark in _inner_schemas(hints[field.name]):
            for name in mapping_names(inner_schema):
                yield f"{field.name}{mark}.{name}"


def with_new_keys(schema: type, overrides: Sequence[str]) -> list[str]:
    """Return ``overrides`` with ``++`` before those of mappings: only then Hydra lets them add keys."""
    mappings = [re.escape(name) for name in mapping_names(schema)]
    if not mappings:
        return list(overrides)
    of_mapping = re.compile(rf"(?:{'|'.join(mappings)})(?:\.[^=]*)?=")
    return [f"++{override}" if of_mapping.match(override) else override for override in overrides]


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
    nearest = nearest_names(without_indices, list(setting_names(schema)))
    remedy = f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists all settings"
    return f"there is no setting {name}; {remedy}"


def nearest_names(name: str, candidates: list[str]) -> list[str]:
    """Return at most three dotted names of ``candidates``: those that end in ``name``, or the most similar one."""
    endings = [candidate for candidate in candidates if candidate.endswith(f".{name}")]
    if endings:
        return endings[:_MOST_PROPOSALS]
    if similar := difflib.get_close_matches(name, candidates, n=1, cutoff=_SIMILAR_NAME):
        return similar
    # Of several candidates with one last part, the first of the schema wins: later entries overwrite earlier ones.
    by_last_part = {candidate.rpartition(".")[2]: candidate for candidate in reversed(candidates)}
    last_part = name.rpartition(".")[2]
    matches = difflib.get_close_matches(last_part, by_last_part, n=1, cutoff=_SIMILAR_LAST_PART)
    return [by_last_part[match] for match in matches]
