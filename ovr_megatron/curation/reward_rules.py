"""Check ``reward.rules``, by which rows are graded in preparation as in training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ovr_megatron.config import RewardConfig
from ovr_megatron.config.endpoint import TRANSPORT_FIELDS
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.rewards.judge_templates import open_template
from ovr_megatron.rewards.verdict import RuleError


def judge_settings(reward: RewardConfig) -> list[dict[str, object]]:
    """Return of each judge the settings on which its verdicts depend; empty without judges."""
    settings = []
    for name, judge in reward.judges.items():
        template = open_template(name, judge.template, judge.response_characters).text
        dependent = {key: value for key, value in asdict(judge).items() if key not in TRANSPORT_FIELDS}
        settings.append({**dependent, "name": name, "template": template})
    return settings


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
