"""Count failed verdicts by source, and stop a run when too many fail to learn from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ovr_megatron.errors import UserError
from ovr_megatron.rewards.combination import describe
from ovr_megatron.rewards.verdict import Reason, RewardRule, Verdict

NEARLY_ALL = 0.9
"""Share of failed verdicts that stops a run: the responses that are still graded are then no sample of the source."""
FEWEST = 8
"""Smallest number of verdicts of a source that is judged: a few hostile expressions in a row mean nothing."""


class RewardError(UserError, RuntimeError):
    """Nearly all verdicts of a source failed; the message has the source, its rule and an error of its graders."""


@dataclass
class VerdictCounts:
    """Verdicts of a source, how many of them failed, and the error and reason of one that failed."""

    verdicts: int = 0
    failed: int = 0
    example: str = ""
    reason: Reason | None = None

    def add(self, counts: VerdictCounts) -> None:
        """Add ``counts`` to these."""
        self.verdicts += counts.verdicts
        self.failed += counts.failed
        self.example = self.example or counts.example
        self.reason = self.reason or counts.reason


def count_verdicts(graded: Iterable[tuple[str, Verdict]]) -> dict[str, VerdictCounts]:
    """Count (source of the row, verdict) pairs by source."""
    by_source: dict[str, VerdictCounts] = {}
    for source, verdict in graded:
        counts = by_source.setdefault(source, VerdictCounts())
        if verdict.failed:
            example = ": ".join(filter(None, (verdict.reason.value, verdict.box)))
            counts.add(VerdictCounts(1, 1, example, verdict.reason))
        else:
            counts.add(VerdictCounts(1))
    return by_source


@dataclass
class FailureWatch:
    """Recent verdicts of each source, until there are enough to judge the source by; ``rules`` by source."""

    rules: Mapping[str, RewardRule]
    recent: dict[str, VerdictCounts] = field(default_factory=dict)

    def add(self, parts: Iterable[Mapping[str, VerdictCounts]]) -> None:
        """Add the counts of one rank or several.

        Raises:
            RewardError: at least `NEARLY_ALL` of `FEWEST` or more verdicts of a source failed.
        """
        # All parts first: ranks that add the same parts stop together or not at all.
        for part in parts:
            for source, counts in part.items():
                self.recent.setdefault(source, VerdictCounts()).add(counts)
        for source, counts in list(self.recent.items()):
            if counts.verdicts < FEWEST:
                continue
            if counts.failed >= NEARLY_ALL * counts.verdicts:
                rule = describe(self.rules.get(source, "auto"))
                raise RewardError(
                    f"{counts.failed} of {counts.verdicts} rewards of source {source!r} failed ({counts.example}) "
                    f"by the rule {rule}; {_remedy(counts.reason)}"
                )
            del self.recent[source]


def _remedy(reason: Reason | None) -> str:
    """Return what the user can do about verdicts that failed for ``reason``."""
    if reason is Reason.NO_VERDICT:
        return (
            "correct base_url, key_env or template of the judge, or raise its max_requests or max_total_tokens "
            "(reward.judges); the answers so far are kept"
        )
    if reason is Reason.BAD_REFERENCE:
        return "correct the answers of the source, or give it a rule that reads them (reward.rules)"
    return (
        "each was tried in two workers: repair the rule (reward.rules), or raise reward.timeout_s or "
        "reward.memory_mib if it needs more"
    )
