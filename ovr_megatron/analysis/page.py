"""Fill the template of the report's page: every text in it is escaped unless the template itself is its source.

A page brings its own style sheet and script, and loads nothing from the network.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

Pieces = list[str | dict[str, str]]
"""Parts of a cell: texts, ``{"small": text}``, ``{"href": address, "text": text}`` and ``{"key": colour}``."""

Cell = str | Pieces
"""A table's cell."""

_FOLDER = Path(__file__).parent
_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


def render_page(**content: Any) -> str:
    """Return the page with ``content``, the variables of ``report.html.jinja``."""
    style, script = ((_FOLDER / name).read_text() for name in ("report.css", "browser.js"))
    return _ENVIRONMENT.get_template("report.html.jinja").render(style=style, script=script, **content)


def data_uri(png: bytes) -> str:
    """Return a PNG as an address, so that a picture travels inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
