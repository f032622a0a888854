"""Plain numbers and their units, read from cleaned text without evaluating anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ovr_megatron.rewards.latex import clean

_DIGITS = r"(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<plain>{_DIGITS})"
    rf"|(?:(?P<whole>\d{{1,60}}) )?(?P<a>{_DIGITS})/(?P<b>{_DIGITS})"
    rf"|(?P<whole2>\d{{1,60}})? ?\\frac ?\{{ ?(?P<sign2>-?) ?(?P<c>{_DIGITS}) ?\}} ?\{{ ?(?P<d>{_DIGITS}) ?\}})"
)

# dimension -> scale -> names; a plural "s" is understood.
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "1/1000": "mm millimeter millimetre",
        "1/100": "cm centimeter centimetre",
        "1/10": "dm decimeter decimetre",
        "1": "m meter metre",
        "1000": "km kilometer kilometre",
        "127/5000": "in inch inches",
        "381/1250": "ft foot feet",
        "1143/1250": "yd yard",
        "201168/125": "mi mile",
    },
    "mass": {
        "1/1000000": "mg milligram",
        "1/1000": "g gram gm",
        "1": "kg kilogram kilo",
        "1000": "ton tonne",
        "45359237/100000000": "lb pound",
        "45359237/1600000000": "oz ounce",
    },
    "time": {
        "1/1000": "ms millisecond",
        "1": "s sec second",
        "60": "min minute",
        "3600": "h hr hour",
        "86400": "d day",
        "604800": "week",
        "2592000": "month",
        "31536000": "yr year",
    },
    "volume": {"1/1000": "ml mL milliliter millilitre", "1": "l L liter litre", "473176473/125000000": "gal gallon"},
    "money": {"1/100": "cent pence", "1": "dollar euro USD EUR"},
    "speed": {"1": "mph", "3125/5029": "kmh kph kmph"},
    "current": {"1/1000": "mA", "1": "A amp ampere"},
    "voltage": {"1/1000": "mV", "1": "V volt", "1000": "kV"},
    "power": {"1": "W watt", "1000": "kW kilowatt"},
    "energy": {"1": "J joule", "1000": "kJ kilojoule"},
    "force": {"1": "N newton", "1000": "kN"},
    "resistance": {"1": "ohm \\Omega", "1000": "k\\Omega"},
    "frequency": {"1": "Hz hertz", "1000": "kHz"},
    "pressure": {"1": "Pa pascal", "1000": "kPa"},
    "temperature": {"1": "K kelvin celsius fahrenheit"},
    "angle": {"1": "degree deg"},
    "arc": {"1": "rad radian"},
    "count": {"1": "unit"},
}
_UNITS = {
    name: (dimension, Fraction(scale))
    for dimension, scales in _TABLE.items()
    for scale, names in scales.items()
    for name in names.split()
}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}

_WORD = r"(?:k?\\Omega|[A-Za-z]+)(?:\^\{?-?\d\}?)?\.?"
_TAIL = re.compile(rf"(?<![\\A-Za-z{{_^])({_WORD}(?:(?: ?/ ?| ?\\cdot ?| ){_WORD})*)$")
# A counted noun may follow a number ("12 jumps"), but not one of these, which change what is said.
_NO_NOUN = re.compile(
    r"^[A-Za-z]{1,2}\b|\b(?:and|or|to|not|than|more|less|least|most|over|under|about|other|none|mod"
    r"|dozen|hundred|thousand|million|billion|trillion|squared?|cubed?|half|halves|quarters?)\b"
)
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]|=")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2}")
_VALUE = re.compile(r"\d|\\pi|\\infty")


@dataclass(frozen=True)
class Unit:
    """A product of powers of known dimensions, as (dimension, exponent) pairs, and its size in base units.

    A counted noun ("jumps") has no dimensions.
    """

    dimensions: tuple[tuple[str, int], ...] = ()
    scale: Fraction = Fraction(1)


def number(text: str) -> Fraction | None:
    r"""Value of an integer, decimal, ``a/b``, ``\frac{a}{b}`` or mixed number; None for all else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if (match["sign"] == "-") != (match["sign2"] == "-") else 1
    if match["plain"]:
        return sign * Fraction(match["plain"])
    over, under = (Fraction(match[a] or match[b]) for a, b in (("a", "c"), ("b", "d")))
    if under == 0:
        return None
    return sign * (Fraction(match["whole"] or match["whole2"] or 0) + over / under)


def _known(tail: str) -> Unit | None:
    dimensions: dict[str, int] = {}
    scale = Fraction(1)
    sign, power, last = 1, 1, ""
    for part in re.findall(r"/|[^ /]+", re.sub(r"\bper\b", "/", tail).replace("\\cdot", " ")):
        if part == "/":
            sign = -1
            continue
        name, _, exponent = part.rstrip(".").partition("^")
        if name in ("squared", "cubed") and last:
            name, exponent, base = last, "", _POWERS[name] - 1
        elif name in _POWERS:
            power = _POWERS[name]
            continue
        else:
            base = power * int(exponent.strip("{}") or 1)
        dimension, size = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"), ("", Fraction(1)))
        if not dimension:
            return None
        dimensions[dimension] = dimensions.get(dimension, 0) + sign * base
        scale *= size ** (sign * base)
        power, last = 1, name
    return Unit(tuple(sorted(dimensions.items())), scale) if dimensions else None


def split_unit(text: str, attached: bool = False) -> tuple[str, Unit | None]:
    """Cut the unit, or the counted noun, off the end of cleaned ``text``.

    Args:
        text: output of `ovr_megatron.rewards.latex.clean`.
        attached: whether "8m" is eight metres; otherwise a lone letter is a unit only after a space, since
            in a reference it may be a variable.

    Returns:
        the rest and the unit; the whole text and None where nothing of the kind ends it.
    """
    tail = _TAIL.search(text)
    if tail is None or tail.start() == 0:
        return text, None
    words, value = tail[1], text[: tail.start()].rstrip()
    unit = _known(words)
    plain = number(value) is not None
    # "s^2-2 s" and "V=\\frac{3}{2} W" end in a variable, "3\\pi m" in metres.
    lone = len(words) == 1 and not (text[tail.start() - 1] in " )" or (attached and plain))
    letters = _LETTER.search(value) if len(words) == 1 else _LETTERS.search(value)
    if unit and not lone and not letters and _VALUE.search(value):
        return value, unit
    return (value, Unit()) if plain and not _NO_NOUN.search(words) else (text, None)


def same_number(reference: Fraction, candidate: Fraction, decimal: bool) -> bool:
    """Equal, or the one a decimal rounding of the other.

    Args:
        reference: one value.
        candidate: the other.
        decimal: whether exactly one of them was written as a decimal.  It may then be off by one part in a
            million if the other has no finite decimal form ("0.333333" for a third).
    """
    if reference == candidate:
        return True
    if not decimal or all(10**60 % value.denominator == 0 for value in (reference, candidate)):
        return False
    return abs(reference - candidate) * 1_000_000 <= abs(reference)


def has_unit(raw: str) -> bool:
    """Whether the answer, as written, has a unit, a counted noun, a degree, percent or currency sign."""
    signs = re.search(r"\\circ|\\degree|°|%|€|£|\\\$|\\textdollar", raw)
    return bool(signs) or split_unit(clean(raw), attached=True)[1] is not None
