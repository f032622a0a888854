"""Tables of rows by name, for the settings that take a name: estimators, losses, formats, trackers, rules, families."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ovr_megatron.errors import UserError

Row = TypeVar("Row")


class RegistryError(UserError, ValueError):
    """A name that no row of a table has, or that two rows would have; the message has the remedy."""


@dataclass(frozen=True)
class Registry(Generic[Row]):
    """The rows that a setting chooses from.

    Attributes:
        setting: The setting that has the name, for messages.
        rows: The rows by name.
        accept: Return the row for an object of the user's, which the setting names as ``package.module:NAME``, or None
            for an object that is none.  Without this function, rows are registered only.
        form: What the object must be, for messages, for example ``a function``.
        error: Class of the errors.
    """

    setting: str
    rows: dict[str, Row]
    accept: Callable[[Any], Row | None] | None = None
    form: str = "a function"
    error: type[UserError] = RegistryError

    def register(self, name: str, row: Row) -> None:
        """Add ``row`` under ``name``.

        Raises:
            UserError: of class ``error``; the name is taken, or cannot be told from the place of an object.
        """
        if ":" in name:
            raise self.error(
                f"{name!r} cannot be registered: a name with a colon is the place of an object in a module"
            )
        if name in self.rows:
            raise self.error(f"{name!r} is registered already; choose another name")
        self.rows[name] = row

    def look_up(self, name: str) -> Row:
        """Return the row called ``name``, or the one for the object at ``package.module:NAME``.

        Raises:
            UserError: of class ``error``; there is no such row or object, or the object is of another form.
        """
        if name in self.rows:
            return self.rows[name]
        module, _, attribute = name.partition(":")
        is_place = attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if self.accept is None or not is_place:
            nearest = difflib.get_close_matches(name, self.rows, n=1)
            proposal = f" (did you mean {nearest[0]}?)" if nearest else ""
            place = "" if self.accept is None else ", or write package.module:NAME"
            raise self.error(
                f"{self.setting}={name!r} is not known{proposal}; choose one of {', '.join(self.rows)}{place}"
            )
        try:
            loaded_module = importlib.import_module(module)
        except (ImportError, AttributeError) as error:
            raise self.error(f"{self.setting}={name}: {error}; {_import_remedy(module, error)}") from error
        if not hasattr(loaded_module, attribute):
            nearest = difflib.get_close_matches(attribute, dir(loaded_module), n=1)
            remedy = f"did you mean {module}:{nearest[0]}?" if nearest else "correct the name behind the colon"
            file = getattr(loaded_module, "__file__", None) or module
            raise self.error(f"{self.setting}={name}: {file} has no {attribute}; {remedy}")
        value = getattr(loaded_module, attribute)
        row = self.accept(value)
        if row is None:
            raise self.error(f"{self.setting}={name} is of type {type(value).__name__}; make it {self.form}")
        return row


def _import_remedy(module: str, error: Exception) -> str:
    """Return what to do about an ``error`` of importing ``module``."""
    if module.endswith(".py"):
        return f"write the module without .py: {module.removesuffix('.py')}"
    # A module that is there may itself import one that is absent.
    absent_module = error.name if isinstance(error, ModuleNotFoundError) else None
    is_absent = absent_module is not None and f"{module}.".startswith(f"{absent_module}.")
    return "is its folder in PYTHONPATH?" if is_absent else f"correct what {module} imports"
