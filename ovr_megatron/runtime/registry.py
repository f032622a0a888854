"""Find the row of a table that a setting names: one of the table, or an object in a module of the user's."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, MutableMapping
from typing import TypeVar

from ovr_megatron.errors import UserError

Row = TypeVar("Row")


class RegistryError(UserError, ValueError):
    """A name that no row of a table has, or that two rows would have; the message has the remedy."""


def add_row(table: MutableMapping[str, Row], name: str, row: Row) -> None:
    """Add ``row`` to ``table`` under ``name``.

    Raises:
        RegistryError: the name is taken, or cannot be told from the place of an object.
    """
    if ":" in name:
        raise RegistryError(f"{name!r} cannot be registered: a name with a colon is the place of an object in a module")
    if name in table:
        raise RegistryError(f"{name!r} is registered already; choose another name")
    table[name] = row


def find_row(setting: str, name: str, table: Mapping[str, Row]) -> Row:
    """Return the row of ``table`` called ``name``, or the object at ``package.module:NAME``.

    Args:
        setting: the setting that has the name, for the error message.
        name: of the row, or the place of the user's own.
        table: the rows by name.

    Raises:
        RegistryError: there is no such row or object.
    """
    if name in table:
        return table[name]
    module, _, attribute = name.partition(":")
    if attribute.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"{setting}={name}: {error}; is its folder in PYTHONPATH?") from error
    nearest = difflib.get_close_matches(name, table, n=1)
    proposal = f" (did you mean {nearest[0]}?)" if nearest else ""
    raise RegistryError(
        f"{setting}={name!r} is not known{proposal}; choose one of {', '.join(table)}, or write package.module:NAME"
    )
