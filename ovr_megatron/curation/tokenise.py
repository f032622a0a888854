"""The last stage: what training reads, the rows in their order with the weight of each group."""

from __future__ import annotations

import json
from collections import Counter

from ovr_megatron.config import PrepareConfig
from ovr_megatron.curation.stage import Stage, Work, listing

WEIGHTS = "weights.json"


def run(work: Work) -> None:
    """Write the rows and ``weights.json``: rows, weight and share of draws of each group."""
    rows: Counter[str] = Counter()
    weight: dict[str, float] = {}
    for row in work.rows():
        group = row.get("stratum") or row.get("source", "")
        rows[group] += 1
        weight[group] = float(row.get("weight", 1.0))
        work.keep(row, row.get("source", ""))
    total = sum(rows[group] * weight[group] for group in rows)
    told = {
        group: {"rows": rows[group], "weight": weight[group], "share": rows[group] * weight[group] / total}
        for group in sorted(rows)
    }
    (work.folder / WEIGHTS).write_text(json.dumps(told, indent=1) + "\n")


def inputs(config: PrepareConfig) -> object:
    """The files of the tokenizer's folder."""
    return listing(config.model or "")


STAGE = Stage("tokenise", run, lambda config: [config.data], inputs)
