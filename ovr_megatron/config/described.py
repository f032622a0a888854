"""Write settings as YAML with the description of each and what it allows above it, for ``--help``."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic.fields import FieldInfo

from ovr_megatron.config.checks import bounds, fields_of, inner_schemas

WIDTH = 100


def described_yaml(schema: type, values: DictConfig) -> str:
    """Return the ``values`` of a ``schema`` as YAML with comments."""
    # An interpolation stays as it is written, also one of an environment variable.
    written: Any = OmegaConf.to_container(values, resolve=False)
    return "\n".join(_lines(schema, written, "")) + "\n"


def _lines(schema: type, values: Mapping[str, object], indent: str) -> Iterator[str]:
    """Yield the lines of the settings of ``schema``."""
    for name, field in fields_of(schema).items():
        yield from _comment(_description(field), indent)
        value = values[name]
        schemas = inner_schemas(field.annotation)
        if schemas and isinstance(value, dict) and typing.get_origin(field.annotation) is not dict:
            yield f"{indent}{name}:"
            yield from _lines(schemas[0], value, f"{indent}  ")
            continue
        for inner_schema in schemas:
            for inner_name, inner in fields_of(inner_schema).items():
                yield from _comment(f"{inner_name}: {_description(inner)}", f"{indent}#   ", "")
        setting = OmegaConf.create({name: value})
        text = OmegaConf.to_yaml(setting)
        yield from textwrap.indent(text, indent).splitlines()


def _comment(text: str, indent: str, mark: str = "# ") -> list[str]:
    """Return ``text`` as lines of a comment."""
    prefix = indent + mark
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix)


def _description(field: FieldInfo) -> str:
    """Return the description of a setting, with its choices or bounds."""
    words = (field.description or "").split()  # a docstring has line breaks and indentation
    description = " ".join(words)
    allowed = " | ".join(_choices(field.annotation))
    if not allowed:
        # The verbs belong to the sentence of an error.
        allowed = bounds(field).removeprefix("be ").removeprefix("lie ")
    return f"{description} [{allowed}]" if allowed else description


def _choices(annotation: Any) -> Iterator[str]:
    """Yield the texts that a setting may be, none for any text."""
    for argument in typing.get_args(annotation):
        if typing.get_origin(annotation) is typing.Literal:
            yield argument
        else:
            yield from _choices(argument)
