"""Names of settings: all those of a schema, and the nearest ones to a name that it does not have."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

_MOST = 3  # names that are proposed


def setting_names(schema: type) -> Iterator[str]:
    """Yield every dotted name of the dataclass ``schema``; elements of a list are written ``data.sources[].path``."""
    hints: dict[str, Any] = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield field.name
        for kind, mark in _inner_types(hints[field.name]):
            yield from (f"{field.name}{mark}.{name}" for name in setting_names(kind))


def mapping_names(schema: type) -> Iterator[str]:
    """Yield the dotted names of the settings of ``schema`` whose keys the user chooses, as ``reward.rules``."""
    hints: dict[str, Any] = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if typing.get_origin(hints[field.name]) is dict:
            yield field.name
        for kind, mark in _inner_types(hints[field.name]):
            yield from (f"{field.name}{mark}.{name}" for name in mapping_names(kind))


def with_new_keys(schema: type, overrides: Sequence[str]) -> list[str]:
    """Return ``overrides`` so that those of mappings may add keys, for which Hydra wants ``++`` before the name."""
    mappings = [re.escape(name) for name in mapping_names(schema)]
    opened = re.compile(rf"(?:{'|'.join(mappings)})(?:\.[^=]*)?=") if mappings else None
    return [f"++{item}" if opened and opened.match(item) else item for item in overrides]


def _inner_types(hint: Any) -> Iterator[tuple[type, str]]:
    """Yield the dataclasses of a type hint, those in a list with the mark ``[]``."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint, ""
    for argument in typing.get_args(hint):
        mark = "[]" if typing.get_origin(hint) is list else ""
        yield from ((kind, mark + inner) for kind, inner in _inner_types(argument))


def unknown_setting(schema: type, name: str) -> str:
    """Return the sentence for a ``name`` that ``schema`` does not have, with the names that were probably meant.

    Args:
        schema: root dataclass of the configuration.
        name: dotted; the index of a list may be in it, as in ``data.sources.0.pth``.
    """
    nearest = nearest_names(re.sub(r"\.\d+(?=\.|$)|\[\d+\]", "[]", name), list(setting_names(schema)))
    remedy = f"did you mean {' or '.join(nearest)}?" if nearest else "--help lists all settings"
    return f"there is no setting {name}; {remedy}"


def nearest_names(name: str, known: list[str]) -> list[str]:
    """Return at most three of the ``known`` dotted names: those that end in ``name``, or the most similar one."""
    endings = [other for other in known if other.endswith(f".{name}")]
    if endings:
        return endings[:_MOST]
    if similar := difflib.get_close_matches(name, known, n=1, cutoff=0.75):
        return similar
    last = name.rpartition(".")[2]
    by_last = {other.rpartition(".")[2]: other for other in reversed(known)}
    return [by_last[match] for match in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
