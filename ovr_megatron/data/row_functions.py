"""Formats that are a plain function of the user's: from a decoded row to a chat, in the form of docs/data.md."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ovr_megatron.data.schema import RowError

_REMEDY = "return {'messages': [...]} with the fields of docs/data.md, or the list of turns alone"


@dataclass(frozen=True)
class RowFunction:
    """A function from a decoded row to a chat; ``name`` is ``package.module:function``, for errors."""

    function: Callable[[Any], Any]
    name: str

    def __call__(self, raw: Any, where: str) -> Mapping[str, Any]:
        """Return the object with ``messages`` that the function makes of ``raw``.

        Raises:
            RowError: the function raises or returns something else; a `RowError` of its own stays as it is.
        """
        try:
            # A copy: a function may take fields out of a row, which is read again in the next epoch.
            result = self.function(copy.deepcopy(raw))
        except RowError as error:
            # The function knows no place: an empty one is filled in.
            raise RowError(error.where or where, error.field, error.problem, error.remedy) from error
        except Exception as error:
            self._refuse(error, where)
        if isinstance(result, list):
            return {"messages": result}
        if isinstance(result, Mapping) and "messages" in result:
            return result
        beginning = str(result)[:60]
        problem = f"{self.name} returned {type(result).__name__} {beginning!r}"
        raise RowError(where, "row", problem, _REMEDY)

    def _refuse(self, error: Exception, where: str) -> NoReturn:
        """Raise a `RowError` with the line of the user's file at which ``error`` was raised."""
        trace = error.__traceback__
        line = 0
        code = getattr(self.function, "__code__", None)
        while trace is not None:
            if trace.tb_frame.f_code is code:
                line = trace.tb_lineno
            trace = trace.tb_next
        place = f" in line {line}" if line else ""
        problem = f"{self.name} raised {type(error).__name__}{place}: {error}"
        raise RowError(where, "row", problem, "correct the function or the row, or remove the row") from error

    def name_in(self, error: RowError) -> RowError:
        """Return ``error``, which is about what the function returned, with the function's name."""
        problem = f"{error.problem} (as {self.name} returned it)"
        return RowError(error.where, error.field, problem, error.remedy)


def row_function(value: Any) -> RowFunction | None:
    """Return ``value`` as a `RowFunction`; None if it is no function that can be called with a row alone."""
    if not callable(value) or isinstance(value, type):
        return None
    try:
        inspect.signature(value).bind(None)
    except (TypeError, ValueError):  # it needs other arguments, or is written in C and does not say
        return None
    name = getattr(value, "__name__", type(value).__name__)
    return RowFunction(value, f"{value.__module__}:{name}")
