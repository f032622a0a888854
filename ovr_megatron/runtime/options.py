"""Make command-line options of settings: name, type, bounds and default of an option are those of the setting."""

from __future__ import annotations

import argparse
import math
import typing
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, TypeVar

from pydantic.fields import FieldInfo

from ovr_megatron.config.checks import fields_of
from ovr_megatron.runtime.command import number, whole_number

T = TypeVar("T")


def add_option(parser: argparse.ArgumentParser, schema: type, name: str, **keywords: Any) -> None:
    """Add the option of a setting: ``--max-tokens`` of ``max_tokens``.

    Args:
        parser: Gets the option.
        schema: A class of settings.
        name: One of its fields: a text, a number, a choice or a switch, or none of these.
        keywords: Of ``add_argument``; a ``default`` replaces that of the field.
    """
    field = fields_of(schema)[name]
    option = f"--{name.replace('_', '-')}"
    [kind] = [inner for inner in _inner_types(field.annotation) if inner is not NoneType]
    if kind is bool:
        parser.add_argument(option, action="store_true", **keywords)
        return
    keywords.setdefault("default", field.default)
    if typing.get_origin(kind) is typing.Literal:
        # The default comes first in the help.
        keywords["choices"] = sorted(typing.get_args(kind), key=lambda choice: choice != keywords["default"])
    elif kind in (int, float):
        keywords["type"] = _parse_number(field, kind)
    parser.add_argument(option, **keywords)


def read_options(schema: type[T], args: argparse.Namespace, **values: Any) -> T:
    """Build settings of the options that `add_option` added, and of ``values``, which replace them.

    Raises:
        ConfigError: values that cannot work together.
    """
    options = {name: getattr(args, name) for name in fields_of(schema) if hasattr(args, name)}
    make: Callable[..., T] = schema
    return make(**options | values)


def _inner_types(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, or the one type of another annotation."""
    if typing.get_origin(annotation) in (None, typing.Literal):
        yield annotation
    else:
        for argument in typing.get_args(annotation):
            yield from _inner_types(argument)


def _parse_number(field: FieldInfo, kind: type) -> Callable[[str], float]:
    """Return the type of an option that is a number within the bounds of ``field``."""
    bounds = ("gt", "ge", "le")
    limits = {name: getattr(mark, name) for mark in field.metadata for name in bounds if hasattr(mark, name)}
    largest = limits.get("le", math.inf)
    if kind is float:
        return number(limits.get("ge", -math.inf), limits.get("gt", -math.inf), largest)
    return whole_number(limits["ge"] if "ge" in limits else limits["gt"] + 1, largest)
