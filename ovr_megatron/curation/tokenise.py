"""The last stage: what training reads, one source for each group of equal weight.

``groups/NNN.jsonl`` hold the rows, ``groups.json`` their names, weights and shares, ``sources.yaml`` the same as a
``data.sources`` that draws from the files by these shares, and ``set`` the tokens for ``data.tokenised``.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from ovr_megatron.config import SourceConfig
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.data.tokenising import tokenise

GROUPS, SOURCES, FOLDER, SET = "groups.json", "sources.yaml", "groups", "set"


@dataclass(frozen=True)
class Group:
    """Rows of one weight.

    Attributes:
        name: The stratum, or the source where there are no strata.
        path: Of the rows, relative to the stage's folder.
        rows: Their number.
        weight: How often an epoch has each of them.
        share: Of all rows that an epoch has.
    """

    name: str
    path: str
    rows: int
    weight: float
    share: float


def run(work: Work) -> None:
    """Deal the rows out to their groups, write the lists, and tokenise.

    What cannot be in a tokenised set, a picture for example, is counted there and stays in its group's file.
    """
    groups = write_groups(work)
    (work.folder / GROUPS).write_text(json.dumps([asdict(group) for group in groups], indent=1) + "\n")
    sources: list[dict[str, Any]] = [
        {
            "path": str(work.folder / group.path),
            "name": group.name,
            "weight": group.share,
            "image_root": work.config.dir,
        }
        for group in groups
    ]
    (work.folder / SOURCES).write_text(yaml.safe_dump(sources, sort_keys=False, allow_unicode=True))
    work.extra["groups"] = len(groups)
    assert work.config.model, "the configuration asks for it where this stage is"
    listed = [SourceConfig(**{**source, "weight": group.weight}) for source, group in zip(sources, groups, strict=True)]
    shutil.rmtree(work.folder / SET, ignore_errors=True)
    data = replace(work.config.data, sources=listed, on_error="skip")
    written = tokenise(data, work.config.model, work.folder / SET, work.config.workers)
    for count in ("samples", "tokens", "skipped"):
        work.extra[count] = sum(getattr(source, count) for source in written.sources)


def write_groups(work: Work) -> list[Group]:
    """Write every row to the file of its group; the groups come in the order of their names."""
    weights: dict[str, float] = {}
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for line, row in zip(work.lines(), work.rows(), strict=True):
            name = row.get("stratum") or row.get("source", "")
            if name not in files:
                path = _path(work.folder, len(files))
                path.parent.mkdir(exist_ok=True)
                files[name] = stack.enter_context(path.open("w", encoding="utf-8"))
                weights[name] = float(row.get("weight", 1.0))
            files[name].write(line)
            counts[name] = counts.get(name, 0) + 1
            work.report.count_kept(row.get("source", ""))
    total = sum(weights[name] * counts[name] for name in counts)
    found = []
    for number, name in enumerate(counts):
        path = _path(Path(""), number)
        found.append(Group(name, str(path), counts[name], weights[name], weights[name] * counts[name] / total))
    return sorted(found, key=lambda group: group.name)


def _path(folder: Path, number: int) -> Path:
    return folder / FOLDER / f"{number:03}.jsonl"


def inputs(config: PrepareConfig) -> object:
    """The files of the tokenizer's folder."""
    return listing(config.model or "")


STAGE = PrepareStage("tokenise", run, lambda config: [config.data], inputs, (GROUPS, SOURCES, FOLDER, SET))
