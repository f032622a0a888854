"""SymPy expressions compared in many digits, relative to their size."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from sympy import Basic, Expr, FiniteSet, Float, Integer, Interval, MatrixBase, Rational, Tuple
from sympy.core.function import AppliedUndef

DIGITS = 30
EXACT = Rational(1, 10**25)
DECIMAL = Rational(1, 10**6)
"""Relative differences of numbers that count as equal: of exact ones, and where one is written as a decimal."""
NOTHING = Rational(1, 10**60)
"""What SymPy leaves of an expression that is zero; no constant of nature is as small."""


def evaluated(item: Any) -> Any | None:
    """The value of an expression in `DIGITS` digits, its symbols replaced by fixed numbers; None for what has none."""
    if not isinstance(item, Expr) or item.has(AppliedUndef):
        return None
    symbols = sorted(item.free_symbols, key=str)
    value = item.subs({symbol: Rational(1234577 + 91193 * n, 1000003) for n, symbol in enumerate(symbols)})
    value = value.evalf(DIGITS)
    return value if value.is_number and value.is_finite else None


def apart(left: Any, right: Any) -> bool:
    """Whether numbers at the same place of both differ by more than a rounding.

    Symbols stand for fixed numbers, so that coefficients are compared, too; False where the forms cannot be compared.
    """
    ours, theirs = _parts(left), _parts(right)
    if ours is not None and theirs is not None:
        return any(apart(a, b) for a, b in zip_longest(ours, theirs, fillvalue=Integer(0)))
    if ours is not None or theirs is not None:
        return False
    a, b = evaluated(left), evaluated(right)
    if a is None or b is None:
        return False
    largest = max(abs(a), abs(b))
    tolerance = DECIMAL if left.has(Float) or right.has(Float) else EXACT
    return bool(largest > NOTHING and abs(a - b) > tolerance * largest)


def _parts(item: Any) -> list[Basic] | None:
    """Return the entries of a tuple, interval, set of numbers or matrix in order; None of anything else.

    math-verify takes an open interval for a pair, so that both may stand beside each other.
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
