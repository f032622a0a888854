"""Write all settings of the commands as one Markdown page of tables, for docs/settings.md."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic.fields import FieldInfo

from ovr_megatron.config.building import defaults
from ovr_megatron.config.checks import bounds, fields_of, inner_schemas

HEAD = """# Settings

All settings, with what they may be, their defaults and their meaning. `ovr settings` prints this page.

A setting is given as `key=value` behind a command, or stands in a recipe, a YAML file (`--config-name`); the command
line comes before the recipe, and the recipe before the default. `--help` behind a command prints the values of its
recipe. An element of a list is written `[{path: a.jsonl, weight: 2}]`; `data.sources[].weight` is a field of it.
"""
_MARKS: dict[Any, str] = {list: "[]", dict: ".NAME"}  # before the name of a field of an element
REQUIRED = "???"  # Hydra's mark of a value that must be given
TYPES = {str: "text", int: "whole number", float: "number", bool: "`true` or `false`", type(None): "`null`"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a class of settings is used: its command, the names before its fields, and its defaults there."""

    command: str
    prefix: str
    defaults: Mapping[str, object]


def settings_page(roots: Mapping[str, type]) -> str:
    """Return the page: a section for each class of settings, wherever it is used.

    Args:
        roots: by command, the class of all of its settings.
    """
    places: dict[type, list[Place]] = {}
    for command, schema in roots.items():
        places[schema] = [Place(command, "", defaults(schema))]
    for schema in roots.values():
        _collect(schema, places[schema][0], places)
    sections = [HEAD]
    for schema, used in places.items():
        sections.append("\n".join(_section(schema, used, places)) + "\n")
    return "\n".join(sections)


def _collect(schema: type, place: Place, places: dict[type, list[Place]]) -> None:
    """Add the places below ``place``, which is one of ``schema``, to ``places``."""
    for name, field in fields_of(schema).items():
        mark = _MARKS.get(typing.get_origin(field.annotation), "")
        for inner in inner_schemas(field.annotation):
            values = place.defaults[name]
            inner_defaults = values if isinstance(values, dict) and not mark else defaults(inner)
            prefix = f"{place.prefix}{name}{mark}."
            inner_place = Place(place.command, prefix, inner_defaults)
            places.setdefault(inner, []).append(inner_place)
            _collect(inner, inner_place, places)


def _section(schema: type, used: list[Place], places: Mapping[type, list[Place]]) -> Iterator[str]:
    """Yield the lines of the section of ``schema``."""
    first = used[0]
    description = " ".join((schema.__doc__ or "").split())
    yield f"## `{_heading(first)}`"
    yield ""
    yield escaped(description)
    if first.prefix:
        yield ""
        yield from _uses(used)
    yield ""
    yield "| setting | may be | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in fields_of(schema).items():
        meaning = escaped(" ".join((field.description or "").split()))
        value = first.defaults[name]
        has_defaults = typing.get_origin(field.annotation) not in _MARKS
        is_section = has_defaults and bool(inner_schemas(field.annotation)) and isinstance(value, dict)
        default = "" if is_section else _default(value)
        yield f"| `{first.prefix}{name}` | {_allowed(field, places)} | {default} | {meaning} |"


def _heading(place: Place) -> str:
    """Return the name of a section: the path of its settings, or for those of the root the command."""
    return place.prefix.removesuffix(".") or place.command


def _uses(used: list[Place]) -> Iterator[str]:
    """Yield a line for each path of a class of settings: the commands that have it, and defaults that differ."""
    first = used[0]
    for prefix in dict.fromkeys(place.prefix for place in used):
        same_path = [place for place in used if place.prefix == prefix]
        commands = ", ".join(f"`{place.command}`" for place in same_path)
        changed = [
            f"`{name}` is {_default(value)}"
            for name, value in same_path[0].defaults.items()
            if value != first.defaults[name]
        ]
        others = f"; there {', '.join(changed)} by default" if changed else ""
        yield f"- `{prefix.removesuffix('.')}`: {commands}{others}"


def _allowed(field: FieldInfo, places: Mapping[type, list[Place]]) -> str:
    """Return what a setting may be."""
    # The verbs belong to the sentence of an error.
    limits = bounds(field).removeprefix("be ").removeprefix("lie ")
    text = _type(field.annotation, places)
    return f"{text}, {limits}" if limits else text


def _type(annotation: Any, places: Mapping[type, list[Place]]) -> str:
    """Return the type of a setting in words; a class of settings is a link to its section."""
    if annotation in TYPES:
        return TYPES[annotation]
    if annotation in places:
        heading = _heading(places[annotation][0])
        return f"[`{heading}`](#{anchor(heading)})"
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    texts = [_type(argument, places) for argument in arguments]
    if origin in (typing.Union, types.UnionType):
        return " or ".join(texts)
    if origin is list:
        return f"list of {texts[0]}"
    if origin is dict:
        return f"{texts[1]}{',' if ' ' in texts[1] else ''} by name"
    raise AssertionError(f"a setting of type {annotation}")


def _default(value: object) -> str:
    """Return a default as YAML has it on one line."""
    if value == REQUIRED:
        return "required"
    return f"`{_yaml(value)}`"


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return str(value)


def anchor(heading: str) -> str:
    """Return the name by which a link finds a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


def escaped(text: str) -> str:
    """Return plain text as Markdown of a table's cell; what stands between backticks stays as it is."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([*|])", r"\\\1", parts[index]).replace("<", "&lt;")
    return "`".join(parts)
