"""Responses to leaf through: an index of them inside the page, their texts in files beside it, loaded when shown.

However long a run was, the page opens at once: of every iteration's rollouts and every evaluation's responses an even
sample is taken, `MOST` in all.  The files are scripts, since a page that was opened from disk may load nothing else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.analysis.page import Html, section, tag
from ovr_megatron.analysis.samples import LOW, MAX_TOKENS, Token, shade, tokens
from ovr_megatron.evaluation import lexical
from ovr_megatron.evaluation.behaviours import BEHAVIOURS
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.json_lines import read_json_lines

FOLDER = "report_files"
MOST = 20_000  # responses in the page, four fifths of them rollouts
FEWEST = 8  # of an iteration; of very long runs not every iteration is shown
PER_FILE = 50
MAX_CHARACTERS = 20_000  # of one response
_FORM = 1  # of the files
_SCRIPT = Path(__file__).with_name("browser.js")
_BITS = {name: 1 << at for at, name in enumerate(BEHAVIOURS)}


@dataclass(frozen=True)
class Origin:
    """A file of responses: what to call it, which group of the page it belongs to, and how many to take of it.

    ``items`` makes what the page has of the chosen of all its rows; ``depends`` is what else they are made from.
    """

    path: Path
    name: str
    group: str
    title: str
    most: int
    items: Callable[[Sequence[dict[str, Any]], Sequence[int]], list[dict[str, Any]]]
    depends: str = ""


def browser(experiment: Experiment) -> Html | None:
    """The section of the page, None where there is nothing to show; writes the files that are not there yet."""
    folder = experiment.dir / FOLDER
    known = _read_index(folder / "index.json")
    index = {origin.name: _entry(origin, folder, known.get(origin.name)) for origin in _origins(experiment)}
    index = {name: entry for name, entry in index.items() if entry["rows"]}
    if not index:
        return None
    kept = {name for entry in index.values() for name in entry["files"]}
    written = {name for entry in known.values() for name in entry["files"]}
    for name in written - kept:
        (folder / Path(f"{name}.js").name).unlink(missing_ok=True)
    write_whole(folder / "index.json", json.dumps(index))
    return _section(index)


def _origins(experiment: Experiment) -> Iterator[Origin]:
    stage = experiment.stages.get("rl")
    files = sorted((stage.dir / "rollouts").glob("*.jsonl")) if stage else []
    if stage and files:
        places = MOST * 4 // 5
        most = max(FEWEST, places // max(stage.total, len(files)))
        for path in (files[at] for at in even(len(files), places // most)):
            items = partial(_rollouts, stage, experiment.dir, int(path.stem))
            title = f"{stage.title}, iteration {int(path.stem)}"
            yield Origin(path, f"rollouts_{path.stem}", "Rollouts", title, most, items)
    answered = sorted((experiment.dir / "eval").glob("*/*.responses.jsonl"))
    most = MOST // 5 // max(1, len(answered))
    for path in answered:
        model, name = path.parent.name, path.name.removesuffix(".responses.jsonl")
        title = f"{MODELS.get(model, model)} on {experiment.sets.get(name, name)}"
        judged = _judged(experiment, model, path.name)
        depends = hashlib.sha256(json.dumps(judged).encode()).hexdigest()[:12]
        yield Origin(path, f"{model}@{name}", title, title, most, partial(_answers, judged), depends)


def _judged(experiment: Experiment, model: str, file: str) -> list[dict[str, int | None]]:
    """What a judge counted in the greedy responses of ``model``, in their order; nothing where wording decided."""
    found = experiment.behaviours
    if not found or found["approximation"] or found["checkpoints"].get(model, {}).get("file") != file:
        return []
    lines = read_json_lines(experiment.dir / "behaviours/counts.jsonl")
    return [line["counts"] for line in lines if line["checkpoint"] == model]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _entry(origin: Origin, folder: Path, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the page has to know of a file of responses; its texts are written unless ``known`` fits it."""
    state = origin.path.stat()
    mark = [_FORM, state.st_size, state.st_mtime_ns, origin.most, origin.title, origin.depends]
    if known and known["mark"] == mark and all((folder / f"{name}.js").is_file() for name in known["files"]):
        return dict(known)
    rows = read_json_lines(origin.path)
    chosen = origin.items(rows, even(len(rows), origin.most))
    names = []
    folder.mkdir(exist_ok=True)
    for at, begin in enumerate(range(0, len(chosen), PER_FILE)):
        names.append(f"{origin.name}_{at}")
        told = json.dumps([item["shown"] for item in chosen[begin : begin + PER_FILE]], separators=(",", ":"))
        write_whole(folder / f"{names[-1]}.js", f"ovrShow({json.dumps(names[-1])},{told})\n")
    facts = [item["facts"] for item in chosen]
    entry = {"group": origin.group, "title": origin.title, "total": len(rows), "files": names, "rows": facts}
    return {"mark": mark} | entry


def even(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spaced."""
    most = min(count, most)
    return [at * count // most for at in range(most)]


def _rollouts(
    stage: Stage, root: Path, iteration: int, everything: Sequence[dict[str, Any]], chosen: Sequence[int]
) -> list[dict[str, Any]]:
    rows = [everything[at] for at in chosen]
    short = [row for row in rows if row["tokens"] <= MAX_TOKENS]
    spelled = iter(tokens(stage.dir, iteration, short))
    found = []
    for row in rows:
        pieces = next(spelled) if row["tokens"] <= MAX_TOKENS else []
        image = row.get("image")
        item = {
            "prompt": row["prompt"],
            "answer": row["answer"],
            "verdict": row.get("verdict"),
            "stopped": row["stopped"],
            "advantage": row.get("advantage_mean"),
            "image": _inside(stage.dir, image, root) if image else None,
        }
        found.append(_item(row, row["reward"], row["response"], pieces, item, {}))
    return found


def _inside(run: Path, name: str, root: Path) -> str | None:
    """Address of an image of the run folder, seen from the page; None for one that lies elsewhere."""
    path = (run / name).resolve()
    return quote(os.path.relpath(path, root.resolve())) if path.is_relative_to(run.resolve()) else None


def _answers(
    judged: Sequence[Mapping[str, int | None]], rows: Sequence[dict[str, Any]], chosen: Sequence[int]
) -> list[dict[str, Any]]:
    greedy = [at for at, row in enumerate(rows) if row["sample"] is None and row["response"] is not None]
    counts = dict(zip(greedy, judged, strict=False))  # a judge may have seen the first ones only
    found = []
    for at in chosen:
        row = rows[at]
        item = {name: row[name] for name in ("id", "sample", "stopped")}
        item |= {"prompt": row["question"], "answer": row["reference"], "verdict": row["reason"]}
        found.append(_item(row, float(row["correct"]), row["response"] or "", [], item, counts.get(at, {})))
    return found


def _item(
    row: Mapping[str, Any],
    reward: float,
    response: str,
    spelled: Sequence[Token],
    item: dict[str, Any],
    counts: Mapping[str, int | None],
) -> dict[str, Any]:
    """What the index has of a response, and what is shown of it."""
    text = "".join(token.text for token in spelled) if spelled else response
    cut = len(text) - MAX_CHARACTERS
    acts = lexical.acts(text[:MAX_CHARACTERS])
    shown = _pieces(text[:MAX_CHARACTERS], spelled, acts) | {"cut": cut if cut > 0 else None} | item
    occurs = {act.behaviour for act in acts} if not counts else {name for name, n in counts.items() if n}
    bits = sum(bit for name, bit in _BITS.items() if name in occurs)
    return {
        "facts": [row["source"], reward, row["tokens"], bits],
        "shown": {key: value for key, value in shown.items() if value is not None},
    }


def _pieces(text: str, spelled: Sequence[Token], acts: Sequence[lexical.Act]) -> dict[str, Any]:
    """The text in pieces: tokens where they are known, else as the acts cut it.

    ``x`` the pieces, ``b`` the bits of the behaviours that each shows; of tokens ``p`` percent of probability, ``a``
    the advantage and ``s`` its shade, -3 to 3.
    """
    if not spelled:
        cuts = sorted({0, len(text), *(act.begin for act in acts), *(act.end for act in acts)})
        parts = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
        return {"x": parts} | _bits(parts, acts)
    shown: list[Token] = []
    length = 0
    for token in spelled:
        length += len(token.text)
        if length > len(text):
            break
        shown.append(token)
    found: dict[str, Any] = {"x": [token.text for token in shown], "p": [round(100 * exp(t.logprob), 1) for t in shown]}
    if any(token.advantage is not None for token in shown):
        found["a"] = [None if t.advantage is None else round(t.advantage, 3) for t in shown]
        found["s"] = shade(shown)
    return found | _bits(found["x"], acts)


def _bits(parts: Sequence[str], acts: Sequence[lexical.Act]) -> dict[str, Any]:
    found, begin = [], 0
    for part in parts:
        middle = begin + len(part) / 2
        found.append(sum(_BITS[act.behaviour] for act in acts if act.begin <= middle < act.end))
        begin += len(part)
    return {"b": found} if any(found) else {}


def _section(index: Mapping[str, Any]) -> Html:
    sources = sorted({fact[0] for entry in index.values() for fact in entry["rows"]})
    places = {source: at for at, source in enumerate(sources)}
    told = {
        "folder": FOLDER,
        "perFile": PER_FILE,
        "low": round(100 * exp(LOW)),
        "sources": sources,
        "behaviours": [behaviour.title for behaviour in BEHAVIOURS.values()],
        "files": [
            {key: entry[key] for key in ("group", "title", "files")}
            | {"rows": [[places[source], *rest] for source, *rest in entry["rows"]]}
            for entry in index.values()
        ],
    }
    shown, total = (sum(counts) for counts in zip(*((len(e["rows"]), e["total"]) for e in index.values()), strict=True))
    groups = list(dict.fromkeys(entry["group"] for entry in index.values()))
    part = f"{shown:,} of {total:,} responses, evenly sampled" if shown < total else f"All {total:,} responses"
    note = (
        f"{part}. Their texts are in {FOLDER}/ beside this page and are loaded when they are shown. Behaviours are "
        "found by wording, an approximation, unless a judge has counted them."
    )
    data = json.dumps(told, separators=(",", ":")).replace("<", "\\u003c")
    controls = tag(
        "div",
        _choice("From", "from", "Everything", groups),
        _choice("Source", "source", "All", sources),
        _choice("Verdict", "verdict", "All", ["Right", "Wrong"]),
        _choice("Behaviour", "behaviour", "All", [behaviour.title for behaviour in BEHAVIOURS.values()]),
        _number("Tokens, at least", "least"),
        _number("Tokens, at most", "most"),
        _choice("Order", "order", "First to last", ["Last to first", "Longest first", "Shortest first"]),
        class_="filters",
    )
    buttons = [tag("button", text, id=f"browse-{name}", type="button") for name, text in _BUTTONS.items()]
    return section(
        "Browse the responses",
        tag("p", note, class_="note"),
        tag("noscript", tag("p", "This part needs JavaScript.", class_="note")),
        tag(
            "div",
            controls,
            tag("p", tag("span", id="browse-count", role="status"), *buttons, class_="pager"),
            tag("div", id="browse-list"),
            id="browser",
            hidden="",
        ),
        tag("script", Html(data), id="browse-index", type="application/json"),
        tag("script", Html(_SCRIPT.read_text())),
    )


_BUTTONS = {"back": "Back", "next": "Next"}


def _choice(title: str, name: str, every: str, options: Sequence[str]) -> Html:
    found = (tag("option", option, value=option) for option in options)
    return tag("label", title, tag("select", tag("option", every, value=""), *found, id=f"browse-{name}"))


def _number(title: str, name: str) -> Html:
    return tag("label", title, tag("input", id=f"browse-{name}", type="number", min="0", inputmode="numeric"))
