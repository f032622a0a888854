"""Fill the template of the report's page: every text in it is escaped unless the template itself is its source.

A page brings its own style sheet and script, and loads nothing from the network.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from jinja2 import Environment, FileSystemLoader, StrictUndefined

Pieces = list[str | dict[str, str]]
"""Parts of a cell: texts, ``{"small": text}``, ``{"href": address, "text": text}`` and ``{"key": colour}``."""

Cell = str | Pieces
"""A table's cell."""

_FOLDER = Path(__file__).parent
# An undefined variable is an error, since a gap in the page would go unnoticed.
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
# Without spaces: the index has a row for each of thousands of responses.
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


class PageTable(TypedDict):
    """A table of the template; ``title`` is its name where it is folded."""

    title: NotRequired[str]
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


class PageChart(TypedDict):
    """A figure of the template: its caption, and its picture for every width and theme as an address."""

    caption: str
    wide_light: str
    wide_dark: str
    narrow_light: str
    narrow_dark: str


def render_page(**content: object) -> str:
    """Return the page with ``content``, the variables of ``report.html.jinja``."""
    style = (_FOLDER / "report.css").read_text()
    script = (_FOLDER / "browser.js").read_text()
    template = _ENVIRONMENT.get_template("report.html.jinja")
    return template.render(style=style, script=script, **content)


def data_uri(png: bytes) -> str:
    """Return a PNG as an address, so that a picture travels inside the page."""
    text = base64.b64encode(png).decode()
    return f"data:image/png;base64,{text}"
