"""Turn a setting that cannot work into `ConfigError`, a sentence that names its key, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import typing
from types import UnionType
from typing import Any

from pydantic.fields import FieldInfo

from ovr_megatron.errors import UserError

LARGEST = 2**31 - 1  # of counts that must fit into memory


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the key, its value and what to change."""


@dataclasses.dataclass(frozen=True)
class ZeroMeans:
    """Mark of a number's type: what the value 0 stands for, in messages and in the help."""

    meaning: str


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def fields_of(schema: type) -> dict[str, FieldInfo]:
    """Return the fields of a class of settings by name, with what pydantic knows about them."""
    fields: dict[str, FieldInfo] = vars(schema)["__pydantic_fields__"]
    return fields


def field_at(schema: type, names: list[str]) -> FieldInfo:
    """Return the field of ``schema`` at the end of a path; an index of a list is no part of ``names``."""
    field = fields_of(schema)[names[0]]
    inner_names = names[1:]
    if not inner_names:
        return field
    inner_schema = inner_schemas(field.annotation)[0]
    if typing.get_origin(field.annotation) is dict:  # the first name is the user's
        inner_names = inner_names[1:]
    return field_at(inner_schema, inner_names)


def inner_schemas(annotation: Any) -> list[type]:
    """Return the class of settings that a field holds, alone, in a list, by name or optional; else an empty list."""
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return [annotation]
    if typing.get_origin(annotation) in (list, dict, typing.Union, UnionType):
        schemas: list[type] = []
        for argument in typing.get_args(annotation):
            schemas += inner_schemas(argument)
        return schemas
    return []


def bounds(field: FieldInfo) -> str:
    """Return what a number must do, as ``be positive`` or ``lie in 0..1``; an empty text without bounds."""
    limits: dict[str, float] = {}
    zero = ""
    for mark in field.metadata:
        for name in ("gt", "ge", "lt", "le"):
            if hasattr(mark, name):
                limits[name] = getattr(mark, name)
        if isinstance(mark, ZeroMeans):
            zero = f" ({mark.meaning})"
    is_unit_interval = limits.get("ge") == 0 and limits.get("le") == 1
    if is_unit_interval and not zero:
        return "lie in 0..1"
    phrases = []
    if "gt" in limits:
        phrases.append(f"above {limits['gt']}" if limits["gt"] else "positive")
    if "ge" in limits:
        phrases.append(f"at least {limits['ge']}" if limits["ge"] else f"0{zero} or more")
    if "lt" in limits:
        phrases.append(f"below {limits['lt']}")
    if limits.get("le", LARGEST) != LARGEST:
        phrases.append(f"at most {limits['le']:,}")
    if not phrases:
        return ""
    return "be " + " and ".join(phrases)
