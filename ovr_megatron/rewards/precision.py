"""Compare SymPy expressions in many digits, relative to their size."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from sympy import Basic, Expr, FiniteSet, Float, Integer, Interval, MatrixBase, Rational, Tuple
from sympy.core.function import AppliedUndef

DIGITS = 30
EXACT = Rational(1, 10**25)
"""Relative difference up to which exact numbers count as equal."""
DECIMAL = Rational(1, 10**6)
"""The same if one of them is written as a decimal."""
NOTHING = Rational(1, 10**60)
"""Size below which a number counts as zero: SymPy may leave a remainder of zero, but no constant is as small."""


def numeric_value(item: Any) -> Any | None:
    """Return the value of an expression in `DIGITS` digits, None for one without a value.

    Fixed numbers replace its symbols, so that equal formulas get equal values.
    """
    if not isinstance(item, Expr) or item.has(AppliedUndef):
        return None
    symbols = sorted(item.free_symbols, key=str)
    # Arbitrary fractions, one for each symbol by its name: no formula of interest has a special value there.
    numbers = {symbol: Rational(1234577 + 91193 * n, 1000003) for n, symbol in enumerate(symbols)}
    value = item.subs(numbers).evalf(DIGITS)
    return value if value.is_number and value.is_finite else None


def differ(left: Any, right: Any) -> bool:
    """Return whether corresponding numbers of both differ by more than a rounding.

    Fixed numbers replace symbols, so that coefficients are compared, too.  False if the forms cannot be compared.
    """
    left_parts = _parts(left)
    right_parts = _parts(right)
    if left_parts is not None and right_parts is not None:
        pairs = zip_longest(left_parts, right_parts, fillvalue=Integer(0))
        return any(differ(left_part, right_part) for left_part, right_part in pairs)
    if left_parts is not None or right_parts is not None:
        return False
    left_value = numeric_value(left)
    right_value = numeric_value(right)
    if left_value is None or right_value is None:
        return False
    largest = max(abs(left_value), abs(right_value))
    tolerance = DECIMAL if left.has(Float) or right.has(Float) else EXACT
    return bool(largest > NOTHING and abs(left_value - right_value) > tolerance * largest)


def _parts(item: Any) -> list[Basic] | None:
    """Return the entries of a tuple, interval, set of numbers or matrix in order; None for anything else.

    math-verify reads an open interval as a pair, so that one may be compared with the other.
    """
    if isinstance(item, MatrixBase):
        return list(item.flat())
    if isinstance(item, Interval):
        return [item.start, item.end]
    if isinstance(item, Tuple):
        return list(item.args)
    if isinstance(item, FiniteSet) and all(isinstance(entry, Expr) and entry.is_real for entry in item.args):
        return sorted(item.args, key=lambda entry: entry.evalf(DIGITS))
    return None
