"""Build HTML: every text that is not `Html` is escaped on its way into a page.

A page brings its own style sheet, and loads nothing from the network.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

Content = object  # Html is taken as it is, None is left out, anything else is escaped text
NARROW, DARK = "(max-width: 640px)", "(prefers-color-scheme: dark)"


class Html(str):
    """Markup that is safe to place in a page; only the functions of this module make it."""

    __slots__ = ()


def tag(name: str, /, *content: Content, **attributes: str | None) -> Html:
    """Return ``<name attributes>content</name>``.

    A trailing underscore of an attribute's name is dropped (``class_``); an attribute that is None is left out.
    """
    opening = name
    for key, value in attributes.items():
        if value is not None:
            opening += f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
    # Void elements of HTML have neither content nor a closing tag.
    if name in ("img", "source", "meta", "input"):
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(content)}</{name}>")


def join(content: Iterable[Content]) -> Html:
    """Join pieces, and escape those that are not markup."""
    return Html("".join(_markup(piece) for piece in content))


def _markup(piece: Content) -> str:
    if piece is None:
        return ""
    return piece if isinstance(piece, Html) else html.escape(str(piece))


def data_uri(data: bytes, kind: str = "image/png") -> str:
    """Return ``data`` as an address, so that a picture travels inside the page."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(looks: Sequence[bytes], alt: str) -> Html:
    """Return a PNG that fits the reader's screen and theme.

    ``looks`` are four pictures: wide light, wide dark, narrow light, narrow dark.
    """
    light, dark, narrow_light, narrow_dark = map(data_uri, looks)
    # A browser takes the first source that fits: the strictest condition comes first.
    return tag(
        "picture",
        tag("source", srcset=narrow_dark, media=f"{NARROW} and {DARK}"),
        tag("source", srcset=narrow_light, media=NARROW),
        tag("source", srcset=dark, media=DARK),
        tag("img", src=light, alt=alt),
    )


def section(title: str, *content: Content) -> Html:
    """Return a card with a heading."""
    return tag("section", tag("h2", title), *content)


def table(head: Sequence[Content], rows: Iterable[Sequence[Content]]) -> Html:
    """Return a table that scrolls by itself where it is too wide; the first cell of each row is its heading."""
    top = tag("tr", *(tag("th", cell, scope="col") for cell in head))
    body = map(_table_row, rows)
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body)), class_="scroll", tabindex="0")


def _table_row(cells: Sequence[Content]) -> Html:
    title, *values = cells
    return tag("tr", tag("th", title, scope="row"), *(tag("td", value) for value in values))


def details(title: str, *content: Content) -> Html:
    """Return content that is folded behind a line to click."""
    return tag("details", tag("summary", title), *content)


def document(title: str, *content: Content, refresh: int = 0) -> str:
    """Return a page, which a browser loads again every ``refresh`` seconds unless that is 0."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        Html(f'<meta http-equiv="refresh" content="{refresh:d}">') if refresh else None,
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", tag("main", *content)), lang="en") + "\n"


STYLE = """
:root {
  --page: #f5f3ee; --card: #ffffff; --ink: #1d2127; --muted: #626975; --line: #e4e2dc; --soft: #f5f3ee;
  --good: #1d7a46; --good-soft: #e2f2e8; --bad: #b3372b; --bad-soft: #fae7e4;
  --base: #9aa0a8; --cold_start: #3a7cbd; --rl: #d9652b; --average: #8660b3;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131519; --card: #1b1e24; --ink: #e9e7e2; --muted: #a2a8b3; --line: #333842; --soft: #252931;
    --good: #7ed3a1; --good-soft: #1d3529; --bad: #f0998e; --bad-soft: #412421;
    --base: #868d98; --cold_start: #69a6e3; --rl: #f0905a; --average: #b596dd;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(26px, 5vw, 34px); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 8px;
  overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 0 0 14px; }
h3 { font-size: 14px; color: var(--muted); margin: 26px 0 10px; font-weight: 600; }
p { margin: 0 0 12px; }
.lead { font-size: 18px; max-width: 62ch; }
.note, figcaption, footer { color: var(--muted); font-size: 14px; }
section, .missing { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 24px;
  margin-top: 20px; }
.missing { border-left: 4px solid var(--rl); padding-block: 16px; }
.missing ul { margin: 6px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 24px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 14px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.25; letter-spacing: -.02em; white-space: nowrap; }
.tile span { display: block; color: var(--muted); font-size: 13px; }
.tile[class*=" "] { border-top: 4px solid; }
.base { border-top-color: var(--base) !important; } .cold_start { border-top-color: var(--cold_start) !important; }
.rl { border-top-color: var(--rl) !important; } .average { border-top-color: var(--average) !important; }
figure { margin: 0 0 28px; } figure:last-child { margin-bottom: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { margin-top: 8px; }
.scroll { overflow-x: auto; margin: 0 -24px; padding: 0 24px; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 0 9px 18px; border-top: 1px solid var(--line); vertical-align: baseline; }
td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th { border-top: 0; color: var(--muted); font-size: 13px; font-weight: 500; white-space: nowrap; }
table small { display: block; color: var(--muted); font-size: 12px; }
.phases { display: flex; height: 26px; border-radius: 7px; overflow: hidden; gap: 2px; margin: 6px 0 12px; }
.phases i { display: block; min-width: 2px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
.p0 { background: var(--cold_start); } .p1 { background: var(--average); } .p2 { background: var(--rl); }
.p3 { background: var(--good); } .p4 { background: var(--base); }
.rollout { border-top: 1px solid var(--line); padding: 16px 0; display: grid; gap: 4px 18px;
  grid-template-columns: 112px minmax(0, 1fr); }
.rollout img { width: 100%; height: auto; border-radius: 8px; }
.rollout img.small { image-rendering: pixelated; }
.rollout.photo { grid-template-columns: 220px minmax(0, 1fr); }
.rollout.text { grid-template-columns: minmax(0, 1fr); }
.rollout pre { margin: 0 0 8px; }
pre { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space:
  pre-wrap; overflow-wrap: anywhere; margin: 0; }
.response { background: var(--soft); border-radius: 8px; padding: 10px 12px; max-height: 420px; overflow-y: auto; }
.up1, .up2, .up3 { background: color-mix(in srgb, var(--good) var(--shade), transparent); border-radius: 3px; }
.down1, .down2, .down3 { background: color-mix(in srgb, var(--bad) var(--shade), transparent); border-radius: 3px; }
.up1, .down1 { --shade: 14%; } .up2, .down2 { --shade: 28%; } .up3, .down3 { --shade: 44%; }
.unlikely { text-decoration: underline dotted; text-underline-offset: 3px; }
.badge { display: inline-block; border-radius: 99px; padding: 1px 10px; font-size: 13px; font-weight: 600;
  margin-right: 8px; }
.right { color: var(--good); background: var(--good-soft); } .wrong { color: var(--bad); background: var(--bad-soft); }
.filters { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; margin: 16px 0; }
.filters label { display: grid; gap: 4px; color: var(--muted); font-size: 13px; }
.filters select, .filters input, .pager button { font: inherit; font-size: 15px; color: var(--ink); width: 100%;
  background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: 6px 10px; min-width: 0; }
.pager { display: flex; align-items: center; gap: 10px; } .pager span { flex: 1; }
.pager button { width: auto; cursor: pointer; } .pager button:disabled { opacity: .45; cursor: default; }
.act { background: color-mix(in srgb, var(--average) 22%, transparent); border-radius: 3px; }
.badge.act { border-radius: 99px; font-weight: 500; }
details { border-top: 1px solid var(--line); padding: 10px 0; } details[open] { padding-bottom: 14px; }
summary { cursor: pointer; } details pre { margin-top: 10px; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .92em;
  overflow-wrap: anywhere; }
footer { margin-top: 28px; }
@media (max-width: 640px) {
  main { padding: 24px 12px 40px; }
  section, .missing { padding: 18px 16px; border-radius: 12px; }
  .scroll { margin: 0 -16px; padding: 0 16px; }
  .tiles { grid-template-columns: repeat(2, 1fr); }
  table { font-size: 13px; } th, td { padding-left: 8px; } table small { font-size: 11px; }
  .rollout { grid-template-columns: 84px minmax(0, 1fr); } .rollout.photo { grid-template-columns: 1fr; }
}
"""
