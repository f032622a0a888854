"""Turn a setting that cannot work into `ConfigError`, a sentence that names its key, its value and what is allowed."""

from __future__ import annotations

import dataclasses
import re
import typing
from types import UnionType
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ovr_megatron.config.writing import text_as_written
from ovr_megatron.errors import UserError
from ovr_megatron.keys import unknown_setting

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


def sentence(error: ValidationError, schema: type, prefix: str = "") -> str:
    """Return the first of pydantic's errors as one sentence.

    Args:
        error: of a validation against ``schema``.
        schema: a class of settings.
        prefix: what stands before the names of its fields, as ``run.``.
    """
    first, *further = error.errors(include_url=False)
    # Of a text or an object, the errors of the text come first.
    if further and first["type"] == "string_type" and isinstance(first["input"], dict):
        first = further[0]
    kind = first["type"]
    path = _without_types(first["loc"])
    input_value = first["input"]
    if kind == "value_error":  # a `ConfigError` of a check across fields, which names its keys
        return str(first["ctx"]["error"])
    keys = tuple(map(str, path))
    dotted = prefix + ".".join(keys)
    if kind == "unexpected_keyword_argument":
        return unknown_setting(schema, dotted)
    # The text shows ${oc.env:NAME}, not the variable's value, which may be a secret.
    value = text_as_written(keys, input_value)
    # An index is written as in the checks across fields: ``curriculum[0].max_tokens``.
    key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", dotted)
    if kind == "string_too_short":
        return f"{key} is empty; give a value, or null where it may be left out"
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", first["ctx"]["expected"])
        return f"{key}={value!r} is not known; choose one of {', '.join(choices)}"
    if kind == "finite_number":
        return f"{key}={value} must be a finite number"
    if kind == "int_parsing_size":  # more digits than any setting has
        return f"{key}={value} is too large a number"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        names = [part for part in path if isinstance(part, str)]
        field = field_at(schema, names)
        # Pydantic's input is as it was written: 1 for a float is printed as 1.0, as the setting would be.
        shown_value = value
        if value is input_value and field.annotation is float:
            shown_value = float(input_value)
        # The bound that keeps counts within memory is no choice of the setting: `bounds` leaves it out.
        too_large = kind == "less_than_equal" and first["ctx"]["le"] == LARGEST
        allowed = f"be at most {LARGEST}" if too_large else bounds(field)
        return f"{key}={shown_value} must {allowed}"
    return f"{dotted or 'config'}: {first['msg']} (got {value!r})"


def _without_types(path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return a path of pydantic's without the names of types that it adds for a text or an object."""
    names = tuple(name for name in path if not str(name).startswith("dict["))
    return names[:-1] if names[-1:] in (("str",), ("constrained-str",)) else names


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
