"""How many verdicts of each source failed, and when there are so many that nothing can be learnt from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ovr_megatron.errors import UserError
from ovr_megatron.rewards.verdict import Verdict

NEARLY_ALL = 0.9
"""Share of failed verdicts that stops a run: what is graded still is then no sample of the source."""
FEWEST = 8
"""Verdicts of a source that are looked at together: a few hostile expressions in a row mean nothing."""


class RewardError(UserError, RuntimeError):
    """Nearly all verdicts of a source failed; says which source, its rule and what its graders said."""


@dataclass
class Count:
    """Verdicts of a source, those of them that failed, and how one of them did."""

    verdicts: int = 0
    failed: int = 0
    example: str = ""

    def add(self, other: Count) -> None:
        """Add what another has counted."""
        self.verdicts += other.verdicts
        self.failed += other.failed
        self.example = self.example or other.example


def counts(graded: Iterable[tuple[str, Verdict]]) -> dict[str, Count]:
    """Count verdicts, each with the source of its row, by source."""
    by_source: dict[str, Count] = {}
    for source, verdict in graded:
        example = ": ".join(filter(None, (verdict.reason.value, verdict.box))) if verdict.failed else ""
        by_source.setdefault(source, Count()).add(Count(1, int(verdict.failed), example))
    return by_source


@dataclass
class FailureWatch:
    """Verdicts of each source since there were last enough to judge by; ``rules`` are those of the sources."""

    rules: Mapping[str, str]
    recent: dict[str, Count] = field(default_factory=dict)

    def add(self, parts: Iterable[Mapping[str, Count]]) -> None:
        """Add what one rank or several have counted.

        Raises:
            RewardError: at least `NEARLY_ALL` of `FEWEST` or more verdicts of a source failed.
        """
        for part in parts:
            for source, count in part.items():
                self.recent.setdefault(source, Count()).add(count)
        for source, count in list(self.recent.items()):
            if count.verdicts < FEWEST:
                continue
            if count.failed >= NEARLY_ALL * count.verdicts:
                rule = self.rules.get(source, "auto")
                raise RewardError(
                    f"{count.failed} of {count.verdicts} rewards of source {source!r} failed, each in two workers "
                    f"({count.example}); repair its rule {rule} (reward.rules), or raise reward.timeout_s or "
                    "reward.memory_mib if it needs more"
                )
            del self.recent[source]
