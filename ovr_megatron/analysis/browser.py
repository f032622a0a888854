"""Prepare the part of the report in which a reader filters single responses and leafs through them.

The page holds an index of the responses; their texts are in files beside it and are loaded when they are shown.  So
the page opens at once, however long a run was: of every iteration's rollouts and of every evaluation's responses an
even sample is taken, about `MAX_RESPONSES` in all.

The files are scripts, because a browser lets a page that was opened from disk load no other kind of file.
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
from ovr_megatron.analysis.response_card import EMPTY_CARD, card_texts
from ovr_megatron.analysis.samples import LOW_LOGPROB, MAX_TOKENS, Token, read_tokens, shade
from ovr_megatron.evaluation import lexical
from ovr_megatron.evaluation.behaviours import BEHAVIOURS
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.json_lines import read_json_lines

FOLDER = "report_files"
MAX_RESPONSES = 20_000  # in the page
MAX_ROLLOUTS = MAX_RESPONSES * 4 // 5  # the rest are responses of evaluations
MIN_PER_ITERATION = 8  # rollouts; of very long runs some iterations are left out instead
RESPONSES_PER_FILE = 50
MAX_CHARACTERS = 20_000  # of one response
_FORMAT_VERSION = 2  # of the files; raise it whenever `_item` writes something else
_BITS = {name: 1 << index for index, name in enumerate(BEHAVIOURS)}


@dataclass(frozen=True)
class ResponseFile:
    """A file of responses: its name, the page's group that it belongs to, and how many of its rows to show.

    ``make_items(rows, indices)`` returns the index entry and the text of each row at ``indices``.  ``fingerprint``
    stands for whatever else these are made from, besides the file itself.
    """

    path: Path
    name: str
    group: str
    title: str
    max_responses: int
    make_items: Callable[[Sequence[dict[str, Any]], Sequence[int]], list[dict[str, Any]]]
    fingerprint: str = ""


def prepare_browser(experiment: Experiment) -> dict[str, Any] | None:
    """Return the content of the section, or None if there are no responses.

    Files of responses that are missing or outdated are written, and those that the page no longer uses are removed.
    """
    folder = experiment.dir / FOLDER
    old_index = _read_index(folder / "index.json")
    index = {}
    for file in _response_files(experiment):
        entry = _index_entry(file, folder, old_index.get(file.name))
        if entry["rows"]:
            index[file.name] = entry
    if not index:
        return None
    for name in _script_names(old_index) - _script_names(index):
        # The index is read from disk: `.name` keeps a name with folders in it from removing a file elsewhere.
        (folder / Path(f"{name}.js").name).unlink(missing_ok=True)
    # Last, so that an index never names files that are not complete.
    write_whole(folder / "index.json", json.dumps(index))
    return _browser_content(index)


def _response_files(experiment: Experiment) -> Iterator[ResponseFile]:
    yield from _rollout_files(experiment)
    yield from _evaluation_files(experiment)


def _rollout_files(experiment: Experiment) -> Iterator[ResponseFile]:
    stage = experiment.stages.get("rl")
    paths = sorted((stage.dir / "rollouts").glob("*.jsonl")) if stage else []
    if not stage or not paths:
        return
    # By the planned number of iterations: the samples of earlier iterations stay as they are while the run goes on.
    per_iteration = max(MIN_PER_ITERATION, MAX_ROLLOUTS // max(stage.total, len(paths)))
    for index in even_indices(len(paths), MAX_ROLLOUTS // per_iteration):
        path = paths[index]
        iteration = int(path.stem)
        make_items = partial(_rollout_items, stage, experiment.dir, iteration)
        title = f"{stage.title}, iteration {iteration}"
        yield ResponseFile(path, f"rollouts_{path.stem}", "Rollouts", title, per_iteration, make_items)


def _evaluation_files(experiment: Experiment) -> Iterator[ResponseFile]:
    paths = sorted((experiment.dir / "eval").glob("*/*.responses.jsonl"))
    per_file = MAX_RESPONSES // 5 // max(1, len(paths))
    for path in paths:
        model = path.parent.name
        set_name = path.name.removesuffix(".responses.jsonl")
        title = f"{MODELS.get(model, model)} on {experiment.sets.get(set_name, set_name)}"
        judge_counts = _judge_counts(experiment, model, path.name)
        fingerprint = hashlib.sha256(json.dumps(judge_counts).encode()).hexdigest()[:12]
        make_items = partial(_evaluation_items, judge_counts)
        yield ResponseFile(path, f"{model}@{set_name}", title, title, per_file, make_items, fingerprint)


def _judge_counts(experiment: Experiment, model: str, file_name: str) -> list[dict[str, int | None]]:
    """Return the judge's counts of behaviours in the greedy responses of ``model``, in the order of the responses.

    The list is empty if no judge has read this file.
    """
    behaviours = experiment.behaviours
    if not behaviours or behaviours["approximation"]:
        return []
    if behaviours["checkpoints"].get(model, {}).get("file") != file_name:
        return []
    lines = read_json_lines(experiment.dir / "behaviours/counts.jsonl")
    return [line["counts"] for line in lines if line["checkpoint"] == model]


def _read_index(path: Path) -> dict[str, Any]:
    # A missing or damaged index only means that every file is written again.
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _script_names(index: Mapping[str, Any]) -> set[str]:
    names: set[str] = set()
    for entry in index.values():
        names.update(entry["files"])
    return names


def _index_entry(file: ResponseFile, folder: Path, old_entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the page's index holds of ``file``; its texts are written unless those of ``old_entry`` are current.

    Size and time of change stand for the content of ``file``, which is not read where they are unchanged.
    """
    state = file.path.stat()
    mark = [_FORMAT_VERSION, state.st_size, state.st_mtime_ns, file.max_responses, file.title, file.fingerprint]
    if old_entry and old_entry["mark"] == mark and _scripts_exist(folder, old_entry["files"]):
        return dict(old_entry)
    rows = read_json_lines(file.path)
    items = file.make_items(rows, even_indices(len(rows), file.max_responses))
    folder.mkdir(exist_ok=True)
    names = _write_scripts(file.name, folder, items)
    facts = [item["facts"] for item in items]
    entry = {"group": file.group, "title": file.title, "total": len(rows), "files": names, "rows": facts}
    return {"mark": mark} | entry


def _scripts_exist(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / f"{name}.js").is_file() for name in names)


def _write_scripts(name: str, folder: Path, items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the texts of ``items``, `RESPONSES_PER_FILE` a script, and return the names of the scripts."""
    names = []
    for index, batch in enumerate(_batches(items, RESPONSES_PER_FILE)):
        script = f"{name}_{index}"
        texts = json.dumps([item["content"] for item in batch], separators=(",", ":"))
        # `ovrShow` is a function of browser.js, which waits for the texts under this name.
        write_whole(folder / f"{script}.js", f"ovrShow({json.dumps(script)},{texts})\n")
        names.append(script)
    return names


def _batches(items: Sequence[Mapping[str, Any]], size: int) -> Iterator[Sequence[Mapping[str, Any]]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def even_indices(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` of the indices below ``count``, evenly spaced."""
    limit = min(count, limit)
    return [index * count // limit for index in range(limit)]


def _rollout_items(
    stage: Stage, root: Path, iteration: int, rollouts: Sequence[dict[str, Any]], indices: Sequence[int]
) -> list[dict[str, Any]]:
    rows = [rollouts[index] for index in indices]
    # Long responses are shown as text: a page with an element for each of their tokens is slow.
    short_rows = [row for row in rows if row["tokens"] <= MAX_TOKENS]
    tokens_of_short = iter(read_tokens(stage.dir, iteration, short_rows))
    items = []
    for row in rows:
        tokens = next(tokens_of_short) if row["tokens"] <= MAX_TOKENS else []
        image = row.get("image")
        texts: dict[str, Any] = {**card_texts(row)}
        texts["image"] = _image_address(stage.dir, image, root) if image else None
        items.append(_item(row, row["reward"], row["response"], tokens, texts, {}))
    return items


def _image_address(run: Path, name: str, root: Path) -> str | None:
    """Return the address of the image ``name`` of the run folder, relative to the page in ``root``.

    None if the image lies outside the run folder.
    """
    path = (run / name).resolve()
    return quote(os.path.relpath(path, root.resolve())) if path.is_relative_to(run.resolve()) else None


def _evaluation_items(
    judge_counts: Sequence[Mapping[str, int | None]], rows: Sequence[dict[str, Any]], indices: Sequence[int]
) -> list[dict[str, Any]]:
    greedy = [index for index, row in enumerate(rows) if row["sample"] is None and row["response"] is not None]
    counts_by_row = dict(zip(greedy, judge_counts, strict=False))  # a judge may have read only the first ones
    items = []
    for index in indices:
        row = rows[index]
        reward = float(row["correct"])
        names = {"prompt": row["question"], "answer": row["reference"], "verdict": row["reason"], "reward": reward}
        counts = counts_by_row.get(index, {})
        items.append(_item(row, reward, row["response"] or "", [], card_texts(row | names, row["sample"]), counts))
    return items


def _item(
    row: Mapping[str, Any],
    reward: float,
    response: str,
    tokens: Sequence[Token],
    texts: Mapping[str, Any],
    judge_counts: Mapping[str, int | None],
) -> dict[str, Any]:
    """Return ``facts``, the entry of a response in the index, and ``content``, its text and the card's other ``texts``.

    The text is marked by wording in any case; which behaviours the response counts for, the judge decides if it has
    read the response.
    """
    text = "".join(token.text for token in tokens) if tokens else response
    characters_cut = len(text) - MAX_CHARACTERS
    text = text[:MAX_CHARACTERS]
    acts = lexical.acts(text)
    content = _pieces(text, tokens, acts) | {"cut": characters_cut if characters_cut > 0 else None} | dict(texts)
    if judge_counts:
        behaviours = {name for name, count in judge_counts.items() if count}
    else:
        behaviours = {act.behaviour for act in acts}
    bits = sum(bit for name, bit in _BITS.items() if name in behaviours)
    return {
        "facts": [row["source"], reward, row["tokens"], bits],
        "content": {key: value for key, value in content.items() if value is not None},
    }


def _pieces(text: str, tokens: Sequence[Token], acts: Sequence[lexical.Act]) -> dict[str, Any]:
    """Split ``text`` into its tokens, or, if there are none, at the ends of ``acts``.

    Keys have one letter, as files hold thousands of responses.

    Returns:
        ``x``: the pieces.  ``b``: for each piece one bit for each behaviour that it overlaps; absent if all are 0.  If
        there are tokens, ``p``: their probabilities.  If the policy learned from them, ``a``: their advantages, and
        ``s``: their shades, -3 to 3.
    """
    if not tokens:
        cuts = {0, len(text)}
        for act in acts:
            cuts |= {act.begin, act.end}
        parts = [text[begin:end] for begin, end in itertools.pairwise(sorted(cuts))]
        return {"x": parts} | _behaviour_bits(parts, acts)
    tokens = _tokens_within(tokens, len(text))
    pieces: dict[str, Any] = {
        "x": [token.text for token in tokens],
        "p": [round(exp(token.logprob), 3) for token in tokens],
    }
    if any(token.advantage is not None for token in tokens):
        pieces["a"] = [None if token.advantage is None else round(token.advantage, 3) for token in tokens]
        pieces["s"] = shade(tokens)
    return pieces | _behaviour_bits(pieces["x"], acts)


def _tokens_within(tokens: Sequence[Token], characters: int) -> list[Token]:
    """Return the first tokens, as many as lie within so many characters altogether."""
    within: list[Token] = []
    length = 0
    for token in tokens:
        length += len(token.text)
        if length > characters:
            break
        within.append(token)
    return within


def _behaviour_bits(parts: Sequence[str], acts: Sequence[lexical.Act]) -> dict[str, Any]:
    bits = []
    begin = 0
    for part in parts:
        # A token that crosses the end of an act belongs to it if its middle does.
        middle = begin + len(part) / 2
        bits.append(sum(_BITS[act.behaviour] for act in acts if act.begin <= middle < act.end))
        begin += len(part)
    return {"b": bits} if any(bits) else {}


def _browser_content(index: Mapping[str, Any]) -> dict[str, Any]:
    sources = _sources(index)
    count = sum(len(entry["rows"]) for entry in index.values())
    total = sum(entry["total"] for entry in index.values())
    sample = f"{count:,} of {total:,} responses, evenly sampled" if count < total else f"All {total:,} responses"
    note = (
        f"{sample}. Their texts are in {FOLDER}/ beside this page and are loaded when they are shown. Behaviours are "
        "found by wording, an approximation, unless a judge has counted them."
    )
    return {
        "note": note,
        "groups": list(dict.fromkeys(entry["group"] for entry in index.values())),
        "index": _page_index(index, sources),
        "empty_card": EMPTY_CARD,
    }


def _sources(index: Mapping[str, Any]) -> list[str]:
    sources: set[str] = set()
    for entry in index.values():
        sources.update(source for source, *_ in entry["rows"])
    return sorted(sources)


def _page_index(index: Mapping[str, Any], sources: Sequence[str]) -> dict[str, Any]:
    """Return the index as browser.js reads it: the row of a response names its source by its index in ``sources``."""
    source_index = {source: position for position, source in enumerate(sources)}
    files = []
    for entry in index.values():
        file = {key: entry[key] for key in ("group", "title", "files")}
        file["rows"] = [[source_index[source], *facts] for source, *facts in entry["rows"]]
        files.append(file)
    return {
        "folder": FOLDER,
        "perFile": RESPONSES_PER_FILE,
        "low": round(exp(LOW_LOGPROB), 3),
        "sources": sources,
        "behaviours": [behaviour.title for behaviour in BEHAVIOURS.values()],
        "files": files,
    }
