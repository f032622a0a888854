"""Prepare the part of the report in which a reader filters single responses and leafs through them.

The page holds an index of the responses; their texts are in files beside it and are loaded when they are shown.  So
the page opens at once, however long a run was: of every iteration's rollouts and of every evaluation's responses an
even sample is taken, about `MAX_RESPONSES` in all.

The files are scripts, because a browser lets a page that was opened from disk load no other kind of file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path
from typing import Any, TypedDict

from ovr_megatron.analysis.experiment import MODELS, Experiment
from ovr_megatron.analysis.response_card import EMPTY_CARD, ResponseCard
from ovr_megatron.analysis.response_items import IndexRow, ResponseItem, evaluation_items, rollout_items
from ovr_megatron.analysis.samples import LOW_LOGPROB
from ovr_megatron.evaluation.behaviours import BEHAVIOURS
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.json_lines import read_json_lines

FOLDER = "report_files"
MAX_RESPONSES = 20_000  # in the page
MAX_ROLLOUTS = MAX_RESPONSES * 4 // 5  # the rest are responses of evaluations
MIN_PER_ITERATION = 8  # rollouts; of very long runs some iterations are left out instead
RESPONSES_PER_FILE = 50
_FORMAT_VERSION = 2  # of the files; raise it whenever a `ResponseItem` has something else


class IndexEntry(TypedDict):
    """A file of responses in ``index.json``: ``total`` counts its responses, of which ``files`` hold the ``rows``.

    The entry is current as long as its ``mark`` is.
    """

    mark: list[int | str]
    group: str
    title: str
    total: int
    files: list[str]
    rows: list[IndexRow]


class PageFile(TypedDict):
    """A file of responses in the page: in its rows the index of the source stands for its name."""

    group: str
    title: str
    files: list[str]
    rows: list[list[float]]


class PageIndex(TypedDict):
    """The index as browser.js reads it; ``low`` is the probability below which a token is marked."""

    folder: str
    perFile: int
    low: float
    sources: list[str]
    behaviours: list[str]
    files: list[PageFile]


class BrowserSection(TypedDict):
    """The section of the template."""

    note: str
    groups: list[str]
    index: PageIndex
    empty_card: ResponseCard


@dataclass(frozen=True)
class ResponseFile:
    """A file of responses: its name, the page's group that it belongs to, and how many of its rows to show.

    ``make_items(rows, indices)`` returns the item of each of the file's rows at ``indices``.  ``fingerprint`` stands
    for whatever else these are made from, besides the file itself.
    """

    path: Path
    name: str
    group: str
    title: str
    max_responses: int
    make_items: Callable[[Sequence[Any], Sequence[int]], list[ResponseItem]]
    fingerprint: str = ""


def prepare_browser(experiment: Experiment) -> BrowserSection | None:
    """Return the content of the section, or None if there are no responses.

    Files of responses that are missing or outdated are written, and those that the page no longer uses are removed.
    """
    folder = experiment.dir / FOLDER
    old_index = _read_index(folder / "index.json")
    index: dict[str, IndexEntry] = {}
    for file in _response_files(experiment):
        entry = _index_entry(file, folder, old_index.get(file.name))
        if entry["rows"]:
            index[file.name] = entry
    if not index:
        return None
    for name in _script_names(old_index) - _script_names(index):
        # The index is read from disk: `.name` keeps a name with folders in it from removing a file elsewhere.
        script = folder / Path(f"{name}.js").name
        script.unlink(missing_ok=True)
    # Last, so that an index never names files that are not complete.
    write_whole(folder / "index.json", json.dumps(index))
    return _browser_section(index)


def _response_files(experiment: Experiment) -> Iterator[ResponseFile]:
    yield from _rollout_files(experiment)
    yield from _evaluation_files(experiment)


def _rollout_files(experiment: Experiment) -> Iterator[ResponseFile]:
    stage = experiment.stages.get("rl")
    paths = sorted((stage.dir / "rollouts").glob("*.jsonl")) if stage else []
    if not stage or not paths:
        return
    # By the planned number of iterations: the samples of earlier iterations stay as they are while the run goes on.
    iterations = max(stage.total, len(paths))
    per_iteration = max(MIN_PER_ITERATION, MAX_ROLLOUTS // iterations)
    for index in even_indices(len(paths), MAX_ROLLOUTS // per_iteration):
        path = paths[index]
        iteration = int(path.stem)
        yield ResponseFile(
            path,
            name=f"rollouts_{path.stem}",
            group="Rollouts",
            title=f"{stage.title}, iteration {iteration}",
            max_responses=per_iteration,
            make_items=partial(rollout_items, stage, experiment.dir, iteration),
        )


def _evaluation_files(experiment: Experiment) -> Iterator[ResponseFile]:
    paths = sorted((experiment.dir / "eval").glob("*/*.responses.jsonl"))
    per_file = MAX_RESPONSES // 5 // max(1, len(paths))
    for path in paths:
        model = path.parent.name
        set_name = path.name.removesuffix(".responses.jsonl")
        set_title = experiment.sets.get(set_name, set_name)
        title = f"{MODELS.get(model, model)} on {set_title}"
        judge_counts = _judge_counts(experiment, model, path.name)
        # A judge may read the responses after the page was written, which leaves their file as it was.
        digest = hashlib.sha256(json.dumps(judge_counts).encode()).hexdigest()
        yield ResponseFile(
            path,
            name=f"{model}@{set_name}",
            group=title,
            title=title,
            max_responses=per_file,
            make_items=partial(evaluation_items, judge_counts),
            fingerprint=digest[:12],
        )


def _judge_counts(experiment: Experiment, model: str, file_name: str) -> list[dict[str, int | None]]:
    """Return the judge's counts of behaviours in the greedy responses of ``model``, in the order of the responses.

    The list is empty if no judge has read this file.
    """
    behaviours = experiment.behaviours
    if not behaviours or behaviours["approximation"]:
        return []
    checkpoint = behaviours["checkpoints"].get(model)
    if not checkpoint or checkpoint.get("file") != file_name:
        return []
    counts = []
    for line in read_json_lines(experiment.dir / "behaviours/counts.jsonl"):
        if line["checkpoint"] == model:
            counts.append(line["counts"])
    return counts


def _read_index(path: Path) -> dict[str, IndexEntry]:
    # A missing or damaged index only means that every file is written again.
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _script_names(index: Mapping[str, IndexEntry]) -> set[str]:
    names: set[str] = set()
    for entry in index.values():
        names.update(entry["files"])
    return names


def _index_entry(file: ResponseFile, folder: Path, old_entry: IndexEntry | None) -> IndexEntry:
    """Return what the page's index holds of ``file``; its texts are written unless those of ``old_entry`` are current.

    Size and time of change stand for the content of ``file``, which is not read where they are unchanged.
    """
    state = file.path.stat()
    mark: list[int | str] = [
        _FORMAT_VERSION,
        state.st_size,
        state.st_mtime_ns,
        file.max_responses,
        file.title,
        file.fingerprint,
    ]
    if old_entry and old_entry["mark"] == mark and _scripts_exist(folder, old_entry["files"]):
        return old_entry
    rows = read_json_lines(file.path)
    items = file.make_items(rows, even_indices(len(rows), file.max_responses))
    folder.mkdir(exist_ok=True)
    scripts = _write_scripts(file.name, folder, items)
    return {
        "mark": mark,
        "group": file.group,
        "title": file.title,
        "total": len(rows),
        "files": scripts,
        "rows": [item.row for item in items],
    }


def _scripts_exist(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / f"{name}.js").is_file() for name in names)


def _write_scripts(name: str, folder: Path, items: Sequence[ResponseItem]) -> list[str]:
    """Write the texts of ``items``, `RESPONSES_PER_FILE` a script, and return the names of the scripts."""
    names = []
    begins = range(0, len(items), RESPONSES_PER_FILE)
    for index, begin in enumerate(begins):
        script = f"{name}_{index}"
        batch = items[begin : begin + RESPONSES_PER_FILE]
        texts = json.dumps([item.content for item in batch], separators=(",", ":"))
        # `ovrShow` is a function of browser.js, which waits for the texts under this name.
        call = f"ovrShow({json.dumps(script)},{texts})\n"
        write_whole(folder / f"{script}.js", call)
        names.append(script)
    return names


def even_indices(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` of the indices below ``count``, evenly spaced."""
    limit = min(count, limit)
    return [index * count // limit for index in range(limit)]


def _browser_section(index: Mapping[str, IndexEntry]) -> BrowserSection:
    sources = _sources(index)
    groups = [entry["group"] for entry in index.values()]
    count = sum(len(entry["rows"]) for entry in index.values())
    total = sum(entry["total"] for entry in index.values())
    if count < total:
        sample = f"{count:,} of {total:,} responses, evenly sampled"
    else:
        sample = f"All {total:,} responses"
    note = (
        f"{sample}. Their texts are in {FOLDER}/ beside this page and are loaded when they are shown. Behaviours are "
        "found by wording, an approximation, unless a judge has counted them."
    )
    return {
        "note": note,
        "groups": list(dict.fromkeys(groups)),  # the rollouts of all iterations are one group
        "index": _page_index(index, sources),
        "empty_card": EMPTY_CARD,
    }


def _sources(index: Mapping[str, IndexEntry]) -> list[str]:
    sources: set[str] = set()
    for entry in index.values():
        for source, *_ in entry["rows"]:
            sources.add(source)
    return sorted(sources)


def _page_index(index: Mapping[str, IndexEntry], sources: Sequence[str]) -> PageIndex:
    """Return the index as browser.js reads it: the row of a response names its source by its index in ``sources``."""
    source_index = {source: position for position, source in enumerate(sources)}
    files: list[PageFile] = []
    for entry in index.values():
        rows: list[list[float]] = []
        for source, reward, tokens, bits in entry["rows"]:
            rows.append([source_index[source], reward, tokens, bits])
        files.append(
            {
                "group": entry["group"],
                "title": entry["title"],
                "files": entry["files"],
                "rows": rows,
            }
        )
    return {
        "folder": FOLDER,
        "perFile": RESPONSES_PER_FILE,
        "low": round(exp(LOW_LOGPROB), 3),
        "sources": list(sources),
        "behaviours": [behaviour.title for behaviour in BEHAVIOURS.values()],
        "files": files,
    }
