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
    numbers = {}
    for n, symbol in enumerate(symbols):
        numerator = 1234577 + 91193 * n
        numbers[symbol] = Rational(numerator, 1000003)
    value = item.subs(numbers).evalf(DIGITS)
    if value.is_number and value.is_finite:
        return value
    return None


def differ(reference: Any, candidate: Any) -> bool:
    """Return whether corresponding numbers of both differ by more than a rounding.

    Fixed numbers replace symbols, so that coefficients are compared, too.  False if the forms cannot be compared.
    """
    reference_parts = _parts(reference)
    candidate_parts = _parts(candidate)
    if reference_parts is not None and candidate_parts is not None:
        pairs = zip_longest(reference_parts, candidate_parts, fillvalue=Integer(0))
        return any(differ(reference_part, candidate_part) for reference_part, candidate_part in pairs)
    if reference_parts is not None or candidate_parts is not None:
        return False
    reference_value = numeric_value(reference)
    candidate_value = numeric_value(candidate)
    if reference_value is None or candidate_value is None:
        return False
    largest = max(abs(reference_value), abs(candidate_value))
    # Two remainders of zero may differ by any share of their size.
    if not largest > NOTHING:
        return False
    is_decimal = reference.has(Float) or candidate.has(Float)
    tolerance = DECIMAL if is_decimal else EXACT
    difference = abs(reference_value - candidate_value)
    return bool(difference > tolerance * largest)


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
    if isinstance(item, FiniteSet):
        is_real = all(isinstance(entry, Expr) and entry.is_real for entry in item.args)
        # By value: SymPy's own order of a set goes by the form of its entries.
        return sorted(item.args, key=lambda entry: entry.evalf(DIGITS)) if is_real else None
    return None
