"""Read plain numbers and their units from cleaned text, without evaluating anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from ovr_megatron.rewards.latex import clean

# Lengths are bounded: a power or a fraction of a million digits would take minutes.
_DIGITS = r"(?:\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})"
_POWER_OF_TEN = (
    r"(?: ?(?:\\cdot ?10\^(?:\{ ?(?P<power>[+-]?\d{1,3}) ?\}|(?P<digit>\d))|[eE](?P<exponent>[+-]?\d{1,3})))"
)
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<plain>{_DIGITS}){_POWER_OF_TEN}?"
    r"|10\^(?:\{ ?(?P<ten>[+-]?\d{1,3}) ?\}|(?P<ten_digit>\d))"
    rf"|(?P<before>\d{{0,60}}\.\d{{0,60}}) ?\\overline ?\{{ ?(?P<recurring>\d{{1,60}}) ?\}}"
    rf"|(?:(?P<whole>\d{{1,60}}) )?(?P<a>{_DIGITS})/(?P<b>{_DIGITS})"
    rf"|(?P<whole2>\d{{1,60}})? ?\\frac ?\{{ ?(?P<sign2>-?) ?(?P<c>{_DIGITS}) ?\}} ?\{{ ?(?P<d>{_DIGITS}) ?\}})"
)

_COUNTED = (
    "个 只 人 名 位 本 张 块 件 条 支 辆 棵 颗 次 种 岁 页 题 道 台 枝 朵 头 匹 架 袋 箱 瓶 杯 盒 组 步 枚 粒 株 套 分"
)
# Dimension, a product of powers of base dimensions -> scale in kg, m, s, A -> names.  A plural "s" is recognised.
_TABLE: dict[str, dict[str, str]] = {
    "length": {
        "1/1000000000": "nm nanometer nanometre 纳米",
        "1/1000000": "\\mum μm micrometer micrometre micron 微米",
        "1/1000": "mm millimeter millimetre 毫米",
        "1/100": "cm centimeter centimetre 厘米",
        "1/10": "dm decimeter decimetre 分米",
        "1": "m meter metre 米",
        "1000": "km kilometer kilometre 千米 公里",
        "127/5000": "in inch inches 英寸",
        "381/1250": "ft foot feet 英尺",
        "1143/1250": "yd yard",
        "201168/125": "mi mile 英里",
    },
    "mass": {
        "1/1000000": "mg milligram 毫克",
        "1/1000": "g gram gm 克",
        "1": "kg kilogram kilo 千克 公斤",
        "1000": "ton tonne 吨",
        "45359237/100000000": "lb pound",
        "45359237/1600000000": "oz ounce",
    },
    "time": {
        "1/1000": "ms millisecond 毫秒",
        "1": "s sec second 秒 秒钟",
        "60": "min minute 分钟",
        "3600": "h hr hour 小时 时",
        "86400": "d day 天 日",
        "604800": "week 周 星期",
        "2592000": "month 月 个月",
        "31536000": "yr year 年",
    },
    "length^3": {
        "1/1000000": "ml mL milliliter millilitre 毫升",
        "1/1000": "l L liter litre 升",
        "473176473/125000000000": "gal gallon",
    },
    "length^2": {"10000": "hectare 公顷"},
    "dollar": {"1/100": "cent", "1": "dollar USD 美元"},
    "euro": {"1": "euro EUR 欧元"},
    "pence": {"1": "pence"},
    "yuan": {"1": "yuan RMB CNY 元"},
    "length time^-1": {"1397/3125": "mph", "5/18": "kmh kph kmph"},
    "current": {"1/1000": "mA", "1": "A amp ampere 安培"},
    "current time": {"1": "C coulomb 库仑"},
    "mass length^2 time^-3 current^-1": {"1/1000": "mV", "1": "V volt 伏特", "1000": "kV"},
    "mass length^2 time^-3": {"1": "W watt 瓦特", "1000": "kW kilowatt 千瓦"},
    "mass length^2 time^-2": {"1": "J joule 焦耳", "1000": "kJ kilojoule 千焦"},
    "mass length time^-2": {"1": "N newton 牛顿", "1000": "kN"},
    "mass length^2 time^-3 current^-2": {"1": "ohm \\Omega 欧姆", "1000": "k\\Omega"},
    "time^-1": {"1": "Hz hertz 赫兹", "1000": "kHz"},
    "mass length^-1 time^-2": {"1": "Pa pascal 帕斯卡", "1000": "kPa"},
    "amount": {"1": "mol mole 摩尔"},
    "kelvin": {"1": "K kelvin"},
    "celsius": {"1": "celsius 摄氏度"},
    "fahrenheit": {"1": "fahrenheit 华氏度"},
    "degree": {"1": "degree deg 度"},
    "radian": {"1": "rad radian 弧度"},
    # Counted things, and the unit that a question leaves open: they match every unit.
    "": {"1": f"unit 单位 {_COUNTED}"},
}


Dimensions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """A product of powers of known dimensions.  A counted noun ("jumps") has no dimensions.

    Attributes:
        dimensions: Pairs of dimension and exponent, sorted.
        scale: Size in base units.
    """

    dimensions: Dimensions = ()
    scale: Fraction = Fraction(1)


def _dimensions(text: str) -> Dimensions:
    """Parse a key of `_TABLE`, such as "mass length^2 time^-3"."""
    pairs = (part.partition("^") for part in text.split())
    return tuple(sorted((name, int(power or 1)) for name, _, power in pairs))


def _units_by_name() -> dict[str, Unit]:
    units: dict[str, Unit] = {}
    for dimensions, scales in _TABLE.items():
        for scale, names in scales.items():
            unit = Unit(_dimensions(dimensions), Fraction(scale))
            units.update(dict.fromkeys(names.split(), unit))
    return units


_UNITS = _units_by_name()
_POWERS = {"square": 2, "sq": 2, "squared": 2, "平方": 2, "cubic": 3, "cu": 3, "cubed": 3, "立方": 3}

_HAN = r"[\u4e00-\u9fff]+"
_WORD = rf"(?:k?\\Omega|\\mu ?m|μm|[A-Za-z]+|{_HAN})(?:\^(?:\{{-?\d\}}|-?\d))?\.?"
_TAIL = re.compile(rf"(?<![\\A-Za-z{{_^])({_WORD}(?:(?: ?/ ?| ?\\cdot ?| ){_WORD})*)$")
# A counted noun may follow a number ("12 jumps"), but not one of these words, which change the statement.
_NO_NOUN = re.compile(
    r"^[A-Za-z]{1,2}\b|\b(?:and|or|to|not|than|more|less|least|most|over|under|about|other|none|mod|versus|maybe|perhaps"
    r"|dozen|hundred|thousand|million|billion|trillion|squared?|cubed?|half|halves|quarters?|percent)\b"
    rf"|{_HAN}"
)
_LETTER = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]|=")
_LETTERS = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2}")
_VALUE = re.compile(r"\d|\\pi|\\infty")


def number(text: str) -> Fraction | None:
    r"""Return the value of a plain number, None for any other text.

    Plain numbers are integers, decimals, ``a/b``, ``\frac{a}{b}``, mixed numbers, ``1.2e3``, ``1.2\cdot 10^{3}``, and
    ``0.1\overline{6}``.
    """
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign = -1 if (match["sign"] == "-") != (match["sign2"] == "-") else 1
    if match["plain"]:
        power = match["power"] or match["digit"] or match["exponent"] or 0
        return sign * Fraction(match["plain"]) * Fraction(10) ** int(power)
    if ten := match["ten"] or match["ten_digit"]:
        return sign * Fraction(10) ** int(ten)
    if match["recurring"]:
        return sign * _recurring(match["before"], match["recurring"])
    numerator = Fraction(match["a"] or match["c"])
    denominator = Fraction(match["b"] or match["d"])
    if denominator == 0:
        return None
    return sign * (Fraction(match["whole"] or match["whole2"] or 0) + numerator / denominator)


def _recurring(before: str, period: str) -> Fraction:
    """Return the value of the decimal ``before``, followed by the digits of ``period`` again and again."""
    shift = len(before.partition(".")[2])
    return Fraction(f"0{before}") + Fraction(int(period), 10**shift * (10 ** len(period) - 1))


def _parse_unit(tail: str) -> Unit | None:
    """Parse a unit such as "km/h" or "square metres"; None for a word that is no unit."""
    dimensions: dict[str, int] = {}
    scale = Fraction(1)
    sign = 1  # -1 after a "/"
    power = 1  # of the next unit, from a word such as "square" before it
    previous = ""
    tail = re.sub(r"\bper\b|每", "/", tail).replace("\\cdot", " ").replace("\\mu ", "\\mu")
    # The Chinese words for square and cubic have no space to the unit that they change.
    for part in re.findall(r"/|[^ /]+", re.sub("(平方|立方)", r" \1 ", tail)):
        if part == "/":
            sign = -1
            continue
        name, _, exponent_text = part.rstrip(".").partition("^")
        if name in ("squared", "cubed") and previous:
            # The unit before the word has been counted once already.
            exponent = _POWERS[name] - 1
            name = previous
        elif name in _POWERS:
            power = _POWERS[name]
            continue
        else:
            exponent = power * int(exponent_text.strip("{}") or 1)
        unit = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
        if unit is None:
            return None
        exponent *= sign
        for dimension, unit_exponent in unit.dimensions:
            dimensions[dimension] = dimensions.get(dimension, 0) + exponent * unit_exponent
        scale *= unit.scale**exponent
        power = 1
        previous = name
    if not previous:
        return None
    pairs = [(dimension, exponent) for dimension, exponent in dimensions.items() if exponent]
    return Unit(tuple(sorted(pairs)), scale)


def conversion(reference: Unit | None, candidate: Unit | None) -> Fraction | None:
    """Return the factor from the candidate's unit to the reference's; None if they measure different things.

    A unit that is left out, or a counted noun, matches every unit.
    """
    if not (reference and candidate and reference.dimensions and candidate.dimensions):
        return Fraction(1)
    if reference.dimensions != candidate.dimensions:
        return None
    return candidate.scale / reference.scale


def split_unit(text: str, attached: bool = False) -> tuple[str, Unit | None]:
    """Cut the unit, or the counted noun, off the end of cleaned ``text``.

    Args:
        text: output of `ovr_megatron.rewards.latex.clean`.
        attached: whether "8m" is eight metres; otherwise a single letter is a unit only after a space, since in a
            reference it may be a variable.

    Returns:
        the text without its unit, and the unit; the text as it is and None if it ends with no unit.
    """
    tail = _TAIL.search(text)
    if tail is None or tail.start() == 0:
        return text, None
    words = tail[1]
    value = text[: tail.start()].rstrip()
    is_number = number(value) is not None
    unit = _parse_unit(words)
    separated = text[tail.start() - 1] in " )" or (attached and is_number)
    if unit and _may_have_unit(value, words, separated):
        return value, unit
    if is_number and not _NO_NOUN.search(words):
        return value, Unit()
    return text, None


def _may_have_unit(value: str, words: str, separated: bool) -> bool:
    r"""Return whether ``words`` behind ``value`` may be a unit, and not a variable.

    "s^2-2 s" and "V=\frac{3}{2} W" end in a variable, "3\pi m" in metres.
    """
    one_letter = len(words) == 1 and words.isascii()
    if one_letter and not separated:
        return False
    letters = _LETTER.search(value) if one_letter else _LETTERS.search(value)
    return not letters and _VALUE.search(value) is not None


def same_number(reference: Fraction, candidate: Fraction, decimal: bool) -> bool:
    """Return whether two numbers are equal, or one is a decimal rounding of the other.

    Args:
        reference: one value.
        candidate: the other.
        decimal: whether exactly one of them was written as a decimal.  It may then be off by one part in a
            million if the other has no finite decimal form ("0.333333" for a third).
    """
    if reference == candidate:
        return True
    if not decimal:
        return False
    # A fraction has a finite decimal form if its denominator divides a power of ten, here up to 10**60.
    if all(10**60 % value.denominator == 0 for value in (reference, candidate)):
        return False
    difference = abs(reference - candidate)
    return difference * 1_000_000 <= abs(reference)


def has_unit(raw: str) -> bool:
    """Return whether the answer, as written, has a unit, a counted noun, a degree, percent or currency sign."""
    # In the answer as it is: `clean` removes most of these signs.
    if re.search(r"\\circ|\\degree|°|%|€|£|\\\$|\\textdollar", raw):
        return True
    _, unit = split_unit(clean(raw), attached=True)
    return unit is not None
