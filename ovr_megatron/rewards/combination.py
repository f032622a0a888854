"""Rules with weights: a reward that is the weighted mean of several, each graded by itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ovr_megatron.rewards import rules
from ovr_megatron.rewards.judge_templates import JudgeTemplate, open_templates
from ovr_megatron.rewards.verdict import UNKNOWN, Reason, RewardRule, RuleError, Verdict

if TYPE_CHECKING:  # a program that only grades does not load the settings
    from ovr_megatron.config import RewardConfig


def check_rules(reward: RewardConfig) -> None:
    """Refuse rules that would not work.

    Raises:
        RuleError: names the rule, the reason and the remedy.
    """
    for source, rule in reward.rules.items():
        for name in weights_of(rule):
            if rules.is_judge(name) and name.removeprefix(rules.JUDGE) not in reward.judges:
                judges = ", ".join(reward.judges) or "none"
                raise RuleError(f"reward.rules.{source}={name}: there is no such judge in reward.judges, but {judges}")
            rules.check(name)
    open_templates(reward.judges)
    for name, judge in reward.judges.items():
        if judge.key_env and not os.environ.get(judge.key_env, "").strip():
            raise RuleError(
                f"reward.judges.{name}.key_env={judge.key_env}: this environment variable is not set; export the key"
            )


def weights_of(rule: RewardRule) -> dict[str, float]:
    """Return the weight of each rule in ``rule``; 1 for a single one."""
    return {rule: 1.0} if isinstance(rule, str) else dict(rule)


def any_part(rule: RewardRule, condition: Callable[[str], bool]) -> bool:
    """Return whether ``condition`` holds of one of the rules in ``rule``."""
    return any(map(condition, weights_of(rule)))


def all_parts(rule: RewardRule, condition: Callable[[str], bool]) -> bool:
    """Return whether ``condition`` holds of every rule in ``rule``."""
    return all(map(condition, weights_of(rule)))


def needs_answer(rule: RewardRule, judges: Mapping[str, JudgeTemplate]) -> bool:
    """Return whether one of the rules in ``rule`` reads the reference answer; ``judges`` are the templates by name."""

    def part_needs_answer(name: str) -> bool:
        if rules.is_judge(name):
            return judges[name.removeprefix(rules.JUDGE)].needs_answer
        return not rules.ignores_answer(name)

    return any_part(rule, part_needs_answer)


def describe(rule: RewardRule) -> str:
    """Return a rule as messages name it: ``math``, or ``math 0.9 + format 0.1``."""
    if isinstance(rule, str):
        return rule
    return " + ".join(f"{name} {weight:g}" for name, weight in rule.items())


def is_unknown(verdict: Verdict, rule: RewardRule) -> bool:
    """Return whether the reward of a response is unknown.

    An expression that two graders cannot finish is no right answer.  But of a user's function that fails, of a judge
    without a verdict (and without `no_verdict`) and of an unusable reference nothing is known.
    """
    if not verdict.failed or verdict.score is not None:
        return False
    return verdict.reason in UNKNOWN or not all_parts(rule, rules.is_plain)


def combine(weights: Mapping[str, float], verdicts: Mapping[str, Verdict]) -> Verdict:
    """Return the verdict of weighted rules from that of each.

    It is the first one whose reward is unknown, if there is one, and else the weighted sum, with the reason of the
    first that failed.
    """
    notes = []
    reason = Reason.WEIGHTED
    for name in weights:
        verdict = verdicts[name]
        note = f"{name} {verdict.reward:.4g} ({verdict.box or verdict.reason})"
        if is_unknown(verdict, name):
            return Verdict(verdict.reason, note)
        if verdict.failed and reason is Reason.WEIGHTED:
            reason = verdict.reason
        notes.append(note)
    score = math.fsum(weight * verdicts[name].reward for name, weight in weights.items())
    # Weights such as 0.7, 0.2 and 0.1 do not add up to 1 in binary.
    if all(verdict.reward == 1.0 for verdict in verdicts.values()):
        score = 1.0
    return Verdict(reason, ", ".join(notes), min(max(score, 0.0), 1.0))
