"""Turn pydantic's errors into sentences that name the setting, its value, what is allowed, and how it is written."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ValidationError

from ovr_megatron.config.checks import LARGEST, bounds, field_at, fields_of, inner_schemas
from ovr_megatron.config.writing import text_as_written
from ovr_megatron.keys import unknown_setting

_MAX_NAMES = 4  # of the settings of a group, in a message
# By pydantic's kind of error, what the value must be.
_SCALARS = {
    "float_parsing": "a number",
    "float_type": "a number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text",
}


def describe_error(error: ValidationError, schema: type, prefix: str = "") -> str:
    """Return the first of pydantic's errors as one sentence.

    Args:
        error: of a validation against ``schema``.
        schema: a class of settings.
        prefix: what stands before the names of its fields, as ``run.``.
    """
    errors = error.errors(include_url=False)
    first = errors[0]
    # Of a text or an object, the errors of the text come first.
    if len(errors) > 1 and first["type"] == "string_type" and isinstance(first["input"], dict):
        first = errors[1]
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
    if kind == "missing":
        siblings = [sibling for sibling in errors if sibling["loc"][:-1] == path[:-1]]
        unknown = [str(sibling["loc"][-1]) for sibling in siblings if sibling["type"] == "unexpected_keyword_argument"]
        return _missing_field(schema, path, key, unknown)
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
    return _form_problem(kind, schema, path, key, value) or f"{dotted or 'config'}: {first['msg']} (got {value!r})"


def _without_types(path: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return a path of pydantic's without the names of types that it adds for a text or an object."""
    names = tuple(name for name in path if not str(name).startswith("dict["))
    return names[:-1] if names[-1:] in (("str",), ("constrained-str",)) else names


def _form_problem(kind: str, schema: type, path: tuple[str | int, ...], key: str, value: Any) -> str | None:
    """Return the message for a value of another form than that of its setting; None for another kind of error.

    Args:
        kind: type of pydantic's error.
        schema: class of settings that was validated.
        path: place of the value below ``schema``, with the indices of lists.
        key: the same place in messages.
        value: the value as it was written.
    """
    if kind in _SCALARS:
        shown_value = "null" if value is None else repr(value)
        return f"{key}={shown_value} must be {_SCALARS[kind]}"
    if kind not in ("list_type", "dict_type", "dataclass_type"):
        return None
    field = field_at(schema, [part for part in path if isinstance(part, str)])
    text = _value_text(value)
    groups = inner_schemas(field.annotation)
    if kind == "dict_type" and groups:
        first_field = next(iter(fields_of(groups[0])))
        return f"{key}={text} must have names; write {key}.NAME.{first_field}=VALUE"
    if kind == "dict_type":
        return f"{key}={text} must have names; write {key}.NAME={text}"
    if kind == "list_type":
        element = _with_field_name(groups[0], value) if groups else text
        return f"{key}={text} must be a list; write '{key}=[{element}]'"
    group = groups[0]
    if isinstance(path[-1], int):
        return f"{key}={text} must have fields with names; write {_with_field_name(group, value)}"
    names = ", ".join(f"{key}.{name}" for name in list(fields_of(group))[:_MAX_NAMES])
    return f"{key}={text}: {key} is a group of settings; give one of them, as {names}"


def _missing_field(schema: type, path: tuple[str | int, ...], key: str, unknown: list[str]) -> str:
    """Return the message for an object without a field that it must have.

    Args:
        schema: class of settings that was validated.
        path: place of the field below ``schema``.
        key: the same place in messages.
        unknown: keys of the object that are no fields of it.
    """
    names = [part for part in path if isinstance(part, str)]
    group = inner_schemas(field_at(schema, names[:-1]).annotation)[0] if len(names) > 1 else schema
    fields = ", ".join(fields_of(group))
    wrong = f", and {', '.join(unknown)} is no field of it" if unknown else ""
    return f"no value for {key}{wrong}; the fields are {fields}"


def _value_text(value: Any) -> str:
    """Return a value as a command line has it."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value_text, value)) + "]"
    return json.dumps(value, default=str)


def _with_field_name(group: type, value: Any) -> str:
    """Return an element of a list of ``group`` in the form ``{path: VALUE}``: ``value`` is its first required field."""
    if isinstance(value, dict):
        return _value_text(value)
    required = [name for name, field in fields_of(group).items() if field.is_required()]
    rest = "".join(f", {name}: VALUE" for name in required[1:])
    return f"{{{required[0]}: {_value_text(value)}{rest}}}"
