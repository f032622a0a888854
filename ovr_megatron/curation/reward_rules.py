"""Check ``reward.rules``, by which rows are graded in preparation as in training."""

from __future__ import annotations

import json
from pathlib import Path

from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.rewards.verdict import RuleError


def check_sources(config: PrepareConfig) -> None:
    """Refuse a rule of a source that no collected row has.

    Raises:
        RuleError: names the source of the rule, and the sources of the rows.
    """
    report = json.loads((Path(config.dir) / "collect/report.json").read_text(encoding="utf-8"))
    for source in config.reward.rules:
        if source not in report["by_source"]:
            sources = ", ".join(sorted(report["by_source"]))
            raise RuleError(
                f"reward.rules has a rule for {source!r}, which is the source of no row; there are {sources}"
            )
