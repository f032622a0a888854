"""Declare settings: `section` makes a checked class of them, and these are the types of their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from ovr_megatron.config.checks import LARGEST, ConfigError, fields_of
from ovr_megatron.config.sentences import describe_error

Count = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveInt = Annotated[int, Field(gt=0, le=LARGEST)]
LargeCount = Annotated[int, Field(ge=0)]
"""A seed, or a count of what need not fit into memory."""
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
UnitFloat = Annotated[float, Field(ge=0, le=1)]
PositiveUnitFloat = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["float32", "bfloat16"]

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def section(prefix: str) -> Callable[[type[T]], type[T]]:
    """Return a decorator that makes a class a frozen dataclass whose values are checked when it is made.

    Every field has a type that allows nothing that cannot work, and a description as the docstring under it.  Unknown
    keys, empty texts and numbers that are not finite are refused everywhere.  A check across fields is a
    ``__post_init__``, which sees fields that are right by themselves.  A class may inherit from another, and give a
    field another default; the field is then described as there.

    Args:
        prefix: what stands before the names of its fields, in the message of the `ConfigError` that an object
            made in Python raises; `build` names the path from the root instead.
    """
    config = ConfigDict(extra="forbid", allow_inf_nan=False, str_min_length=1, use_attribute_docstrings=True)

    def decorate(cls: type[T]) -> type[T]:
        schema: Any = dataclass(frozen=True, kw_only=True, config=config)(cls)
        validate = schema.__init__

        def checked_init(self: T, **values: Any) -> None:
            try:
                validate(self, **values)
            except ValidationError as error:
                raise ConfigError(describe_error(error, schema, prefix)) from None

        schema.__init__ = checked_init
        _inherit_descriptions(schema)
        checked: type[T] = schema
        return checked

    return decorate


def _inherit_descriptions(schema: type) -> None:
    """Describe the fields of ``schema`` that have no docstring as the classes do that it inherits them from."""
    # Pydantic reads the docstrings of the class alone.
    fields = fields_of(schema)
    for base in schema.__mro__[1:]:
        if "__pydantic_fields__" not in vars(base):
            continue
        for name, inherited in fields_of(base).items():
            fields[name].description = fields[name].description or inherited.description
