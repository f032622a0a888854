r"""Find the last ``\boxed{}`` of a response, and reduce the many spellings of LaTeX to one plain form.

Everything here is string work in linear or bounded time; nothing is evaluated.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

MAX_ANSWER = 1000
"""Characters of a box at most; a longer one is no final answer."""

START_OF_THOUGHT = "<think>"
END_OF_THOUGHT = "</think>"
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
# Without braces TeX boxes one character only; authors mean the number or the letter.
_BARE = r"(?P<bare>(?>[+-]?(?:\d[\d.,]*|\.\d+)(?:/\d+)?)|[A-Z])(?!\s*[{^\\+\-*/=<>]|\w)"
_BRACES = re.compile(
    rf"(?P<box>{BOX.pattern}\s*\{{)|{BOX.pattern}\s*{_BARE}|\\\\(?=[{{}}])|\\[{{}}]|(?P<open>\{{)|(?P<close>\}})"
)
_STYLES = r"rm|bf|it|sf|tt|em|displaystyle|textstyle|limits|nolimits|left|right|[bB]igg?[lrm]?"
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|bb|cal|normal)|operatorname\*?|mbox|hbox"
    r"|boldsymbol|bm|boxed|fbox|emph|underline)\s*\{"
)
_FUNCTIONS = r"arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp"
_DEGREE = r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z]))"
# The degree sign of an angle may be left out; in the argument of a function it is the factor pi / 180.
_TRIGONOMETRIC = re.compile(r"(?<![a-zA-Z])(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_ANGLE = re.compile(rf"(\d+(?:\.\d+)?|\\?[a-zA-Z]+)\s*{_DEGREE}(?!\s*[CF](?![a-zA-Z]))")

_SYMBOLS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ",  # noqa: RUF001
        "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "∈": r"\in ",  # noqa: RUF001
        "±": r"\pm ", "≈": r"\approx ", "°": r"^\circ ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4",
        "€": "", "£": "", "¥": "", "`": "", '"': "", "“": "", "”": "", "。": ".", "、": ",",
    }
)  # fmt: skip

# Applied in this order: first formatting is removed, then each operator gets one spelling.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\),\s*\\!\s*", ","),
        (r"(?<!\\)\\!", ""),
        (r"\\hspace\*?\{[^{}]*\}|\\q?quad(?![a-zA-Z])|(?<!\\)\\[,;:> ]|~|\s+", " "),
        (rf"\\(?:{_STYLES})(?![a-zA-Z])", " "),
        (r"\\\$|\$|\\textdollar(?![a-zA-Z])|(?<!\\)\\[()\[\]]", " "),
        (rf"{_DEGREE}\s*C(?![a-zA-Z])", " celsius"),
        (rf"{_DEGREE}\s*F(?![a-zA-Z])", " fahrenheit"),
        (_DEGREE, " "),
        (r"\\(?:approxeq|thickapprox|simeq|doteq)(?![a-zA-Z])", r"\\approx "),
        (r"\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?", r"\\overline{\1\2\3}"),
        (r"(?<=[\d.])\s*\\(?:bar|dot|overline)\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\\overline{\1\2}"),
        (r"\\%|(?<![a-zA-Z])per ?cent(?:age)?(?: points?)?(?![a-zA-Z])", "%"),
        (r"\*\*(?=\w)(?<=\w\*\*)", "^"),
        (r"\*\*", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"√ ?(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"(?:√|(?<![\\a-zA-Z])sqrt) ?\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(pi|infty)(?![a-zA-Z])", r"\\\1 "),
        (rf"(?<![\\a-zA-Z])({_FUNCTIONS})(?![a-zA-Z])", r"\\\1 "),
        (r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![a-zA-Z])", r"\\ln "),
        (r"\\lg(?![a-zA-Z])", r"\\log_{10} "),
        (r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])", r"\\infty "),
        (r"\\times(?![a-zA-Z])|\*", r"\\cdot "),
        (r"\\leq(?:slant)?(?![a-zA-Z])|<=", r"\\le "),
        (r"\\geq(?:slant)?(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\{\s*,\s*\}", ","),
        (r"\s*([\^_])\s*", r"\1"),
        (r"([\^_])\{\s*(\w)\s*\}", r"\1\2"),
        (r"\s+", " "),
    )
]
_THOUSANDS = re.compile(
    r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,])"  # 10,080 but no pair (1,234)
    r"|(?<![\d.] )(?<![\d.])\d{1,3}(?: \d{3})+(?! ?[\d/])"  # 12 000
)
_LIST_OR_NUMBER = re.compile(r"[1-9]\d\d(?:,[1-9]\d\d)+")  # 100,200
_SPACES = re.compile(r"(?<!\d) +| +(?!\d)")
_DOLLARS = re.compile(r"\$([^$]*)\$")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹]+")


def final_part(response: str, thinking: bool = False) -> str | None:
    """Return the text after the last ``</think>``; without one the response, or None where it is all a thought.

    ``thinking`` says whether the prompt opened a thought; a response may also open one itself.
    """
    answer = response.rpartition(END_OF_THOUGHT)[2]
    if len(answer) == len(response) and (thinking or START_OF_THOUGHT in answer):
        return None
    return answer


def last_box(response: str, thinking: bool = False) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` after the thought.

    Braces are balanced and escaped braces skipped.  Of nested boxes the outer one counts.  ``\fbox{5}`` and
    ``\boxed 5`` are boxes, too.

    Args:
        response: the response of a model.
        thinking: whether the prompt opened a thought.  Text before ``</think>`` is then no answer, as in
            Open-Reasoner-Zero (``orz/ppo``), even if the response never ends the thought.

    Returns:
        the content, or None if there is no box or the last one is never closed.
    """
    answer = final_part(response, thinking)
    first = None if answer is None else BOX.search(answer)
    if answer is None or first is None:
        return None
    stack: list[int] = []  # for each open brace the start of the content of its box, or -1 for a brace of no box
    boxes: list[tuple[int, int]] = []  # start and end of the content of each closed box
    last_start = -1
    for token in _BRACES.finditer(answer, first.start()):
        if token["bare"] is not None:
            last_start = token.start("bare")
            boxes.append(token.span("bare"))
        elif token["box"]:
            last_start = token.end()
            stack.append(last_start)
        elif token["open"]:
            stack.append(-1)
        elif token["close"] and stack:
            content_start = stack.pop()
            if content_start >= 0:
                boxes.append((content_start, token.start()))
    enclosing = [(start, end) for start, end in boxes if 0 <= start <= last_start <= end]
    if not enclosing:
        return None
    outer_start, outer_end = min(enclosing)
    return answer[outer_start:outer_end]


def closing(text: str, start: int) -> int:
    """Return the index of the brace that closes the group whose content begins at ``start``, or -1."""
    depth = 1
    for token in _BRACES.finditer(text, start):
        depth += bool(token["box"] or token["open"]) - bool(token["close"])
        if depth == 0:
            return token.start()
    return -1


def _unwrap(text: str) -> str:
    r"""Replace every ``\text{...}`` and the like by its content; a group that is never closed reaches to the end."""
    while wrapper := _WRAPPER.search(text):
        end = closing(text, wrapper.end())
        if end < 0:
            end = len(text)
        text = f"{text[: wrapper.start()]} {text[wrapper.end() : end]} {text[end + 1 :]}"
    return text


@lru_cache(maxsize=8192)
def clean(text: str) -> str:
    r"""Remove what does not change the value: ``\text{}`` and fonts, spacing, ``$``, degrees, thousands commas.

    Each fraction, root, product sign and comparison gets one spelling.  Single spaces stay, because they separate a
    number from its unit.  Percent signs stay too: `ovr_megatron.rewards.quantity` reads them.  ``100,200`` may be two
    numbers or one, and stays; `joined` reads it as one.
    """
    ambiguous = is_list_or_number(_DOLLARS.sub(r"\1", text.strip()).strip())
    text = _SUPERSCRIPT.sub(lambda power: f"^{{{power.group()}}}", text.translate(_SYMBOLS))
    # Superscripts are rewritten before: NFKC makes plain digits of them.  Its fractions have U+2044 as their slash.
    text = _unwrap(unicodedata.normalize("NFKC", text).replace("\u2044", "/"))
    if _TRIGONOMETRIC.search(text):
        text = _ANGLE.sub(r"(\\frac{\1 \\pi}{180})", text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = text.lstrip(" ,;:=").rstrip(" .,;:")
    if text.startswith("{") and closing(text, 1) == len(text) - 1:
        text = text[1:-1].strip()
    if not ambiguous and not text.startswith(("(", "[", "\\{")):
        text = _THOUSANDS.sub(lambda number: re.sub("[, ]", "", number.group()), text)
    return text


def key(text: str) -> str:
    """Return `clean` without spaces, except those between digits: equal keys mean the same text."""
    return squeeze(clean(text))


def squeeze(text: str) -> str:
    """Remove the spaces of cleaned ``text``; "1 2" stays two numbers."""
    return _SPACES.sub("", text)


def is_list_or_number(text: str) -> bool:
    """Return whether ``text`` is only groups of three digits, joined by commas, of which none begins with a 0."""
    return _LIST_OR_NUMBER.fullmatch(text) is not None


def joined(text: str) -> str:
    """Read cleaned ``text`` such as ``100,200`` as one number."""
    return text.replace(",", "") if is_list_or_number(text) else text
