"""Names of settings: all those of a schema, and the nearest ones to a name that it does not have."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from types import NoneType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

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


def text_names(schema: type) -> Iterator[str]:
    """Yield the dotted names of the settings of ``schema`` that are text, as ``run.dir``; those in lists aside."""
    hints: dict[str, Any] = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if hint is str or set(typing.get_args(hint)) == {str, NoneType}:
            yield field.name
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from (f"{field.name}.{name}" for name in text_names(hint))


def with_plain_text(schema: type, overrides: Sequence[str]) -> list[str]:
    """Return ``overrides``, those of text settings so that Hydra takes the value as it stands.

    A path may hold what Hydra's grammar reserves, as in ``run.dir=/data/it's (a=b), [x]``.  A value that the grammar
    reads as text, quoted or escaped by the user or not, is left alone, and so is an interpolation.
    """
    texts = set(text_names(schema))
    parser = OverridesParser.create()
    plain = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name.lstrip("+") in texts and not _is_text(parser, override):
            # In a quoted value of Hydra's a backslash counts only before a quote, where it has to be doubled.
            escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
            override = f"{name}='{escaped}'"
        plain.append(override)
    return plain


def _is_text(parser: OverridesParser, override: str) -> bool:
    """Return whether Hydra reads the value as one text, or as null."""
    try:
        value = parser.parse_override(override).value()
    except HydraException:
        return False
    return value is None or isinstance(value, str | QuotedString)


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
