"""Check whether the rule of a row's source can verify the row's reference answer."""

from __future__ import annotations

from collections.abc import Mapping

from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.rewards.choice import verifiable
from ovr_megatron.rewards.rules import is_plain


def check_reference(row: Row, rules: Mapping[str, str]) -> None:
    """Refuse a prompt row with an answer that no grader can verify; a user's function takes any answer.

    Args:
        row: A prompt row.
        rules: The rule of each source; ``auto`` for a source without one.

    Raises:
        RowError: names the row, the reason and the remedy.
    """
    problem = verifiable(row.answer or "", row.options)
    rule = rules.get(row.source, "auto")
    if problem and is_plain(rule):
        raise RowError(row.where, "answer", problem, "give the bare final answer or remove the row")
