"""The last stage: write the files that training reads, one source for each group of rows of equal weight.

``groups/NNN.jsonl`` hold the rows, ``groups.json`` their names, weights and shares, ``sources.yaml`` the same as a
``data.sources`` that draws from the files by these shares, and ``set`` the tokens for ``data.tokenised``.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO, TypedDict

import yaml

from ovr_megatron.config import SourceConfig
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.data.tokenising import tokenise

GROUPS = "groups.json"
SOURCES = "sources.yaml"
FOLDER = "groups"
SET = "set"


@dataclass(frozen=True)
class WeightGroup:
    """Rows of equal weight.

    Attributes:
        name: The stratum, or the source if there are no strata.
        path: Path of the rows, relative to the stage's folder.
        rows: Number of rows.
        weight: How often an epoch contains each of them.
        share: Share of the group in the rows of an epoch.
    """

    name: str
    path: str
    rows: int
    weight: float
    share: float


class SourceEntry(TypedDict):
    """An entry of ``sources.yaml``, which training reads as one of ``data.sources``."""

    path: str
    name: str
    weight: float
    image_root: str


def run(work: Work) -> None:
    """Write the rows to the files of their groups, write the lists, and tokenise.

    Rows that a tokenised set cannot hold, for example with images, are counted as skipped and stay in their files.
    """
    groups = write_groups(work)
    group_list = [asdict(group) for group in groups]
    groups_text = json.dumps(group_list, indent=1)
    (work.folder / GROUPS).write_text(f"{groups_text}\n")
    sources: list[SourceEntry] = []
    for group in groups:
        path = work.folder / group.path
        sources.append(
            {
                "path": str(path),
                "name": group.name,
                "weight": group.share,
                "image_root": work.config.dir,
            }
        )
    sources_text = yaml.safe_dump(sources, sort_keys=False, allow_unicode=True)
    (work.folder / SOURCES).write_text(sources_text)
    work.extra["groups"] = len(groups)
    assert work.config.model, "the configuration requires it for this stage"
    # The list above has shares, from which a stream draws; a tokenised set repeats each row by its weight.
    weighted = []
    for source, group in zip(sources, groups, strict=True):
        config = SourceConfig(
            path=source["path"],
            name=source["name"],
            weight=group.weight,
            image_root=source["image_root"],
        )
        weighted.append(config)
    data = replace(work.config.data, sources=weighted, on_error="skip")
    shutil.rmtree(work.folder / SET, ignore_errors=True)  # of an interrupted run
    tokenised = tokenise(
        data,
        work.config.model,
        work.folder / SET,
        work.config.workers,
    )
    for count in ("samples", "tokens", "skipped"):
        source_counts = [getattr(source, count) for source in tokenised.sources]
        work.extra[count] = sum(source_counts)


def write_groups(work: Work) -> list[WeightGroup]:
    """Write every row to the file of its group; return the groups in the order of their names."""
    weights: dict[str, float] = {}
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        files: dict[str, TextIO] = {}
        for line, row in zip(work.lines(), work.rows(), strict=True):
            source = row.get("source", "")
            name = row.get("stratum") or source
            # Files are numbered: a name of a stratum may hold characters that a path must not.
            if name not in files:
                path = _group_path(work.folder, len(files))
                path.parent.mkdir(exist_ok=True)
                files[name] = stack.enter_context(path.open("w", encoding="utf-8"))
                weights[name] = float(row.get("weight", 1.0))
            files[name].write(line)
            counts[name] = counts.get(name, 0) + 1
            work.report.count_kept(source)
    total = sum(weights[name] * counts[name] for name in counts)
    groups = []
    for index, (name, rows) in enumerate(counts.items()):
        path = _group_path(Path(""), index)
        weight = weights[name]
        share = weight * rows / total
        groups.append(WeightGroup(name, str(path), rows, weight, share))
    return sorted(groups, key=lambda group: group.name)


def _group_path(folder: Path, index: int) -> Path:
    return folder / FOLDER / f"{index:03}.jsonl"


def inputs(config: PrepareConfig) -> object:
    """Return a fingerprint of the tokenizer's folder."""
    return listing(config.model or "")


STAGE = PrepareStage(
    "tokenise",
    run,
    lambda config: [config.data],
    inputs,
    (GROUPS, SOURCES, FOLDER, SET),
)
