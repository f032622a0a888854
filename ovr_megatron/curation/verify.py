"""Grade the final answer of every response against the row's answer, in killable graders.

A row is graded as reinforcement learning grades its source (``reward.rules``).  Rows without an answer pass by default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ovr_megatron.config import ConfigError
from ovr_megatron.curation import reward_rules
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, batches
from ovr_megatron.curation.text import response_text
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_json import RowJson
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.data.schema import ImageSize, Row
from ovr_megatron.rewards.combination import all_parts, any_part, needs_answer
from ovr_megatron.rewards.failures import FailureWatch, count_verdicts
from ovr_megatron.rewards.judge_client import Judges
from ovr_megatron.rewards.judge_templates import open_templates
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.requests import RequestBuilder
from ovr_megatron.rewards.rules import reads_box, reads_image_size
from ovr_megatron.rewards.verdict import GradeRequest, RewardRule, Verdict

_BATCH = 2048  # rows in memory at a time


def run(work: Work) -> None:
    """Grade the responses, and keep the rows with a right one.

    Raises:
        RewardError: nearly all verdicts of a source failed.
    """
    reward_rules.check_sources(work.config)
    reward = work.config.reward
    watch = FailureWatch(reward.rules)
    requests = _Requests(work.config)
    judges = Judges(reward.judges, Path(work.config.dir) / "judges")
    with GraderPool(reward.workers, reward.timeout_s, reward.memory_mib, reward.cache, judges) as pool:
        for batch in batches(work.rows(), _BATCH):
            verdicts = _grade(pool, batch, requests)
            rows = list(zip(batch, verdicts, strict=True))
            graded = []
            for row, verdict in rows:
                if verdict is not None:
                    source = row.get("source", "")
                    graded.append((source, verdict))
            # Before the rows are written: it stops the stage if nearly all verdicts of a source failed.
            watch.add([count_verdicts(graded)])
            for row, verdict in rows:
                _write(work, row, verdict)
            work.progress.update(len(batch))
        if reward.judges:
            work.extra["judges"] = pool.take_judge_counts()


class _Requests:
    """Makes the requests to the graders for rows in JSON form."""

    def __init__(self, config: PrepareConfig) -> None:
        """Open the processor of ``model``, if a rule scales coordinates.

        Raises:
            ConfigError: there is no ``model``.
            RuleError: the template of a judge cannot be used.
        """
        self._rules = config.reward.rules
        self._templates = open_templates(config.reward.judges)
        self._root = Path(config.dir)
        self._rows = RequestBuilder(self._rules, config.data.template == "think", _measure(config))

    def compares(self, row: RowJson) -> bool:
        """Return whether the rule of a row needs its answer."""
        return needs_answer(self._rule_for(row), self._templates)

    def build(self, row: RowJson, response: str) -> GradeRequest:
        """Return the request for the response of a row."""
        rule = self._rule_for(row)
        answer = str(row.get("answer") or "")
        if all_parts(rule, reads_box):
            # Here a response needs no thought, whatever the template.
            return GradeRequest(response, answer, tuple(row.get("options", ())), rule)
        # `compares` has said whether the rule reads an answer.
        parsed = parse_row(row, str(row.get("id") or "a row"), self._root, needs_answer=False)
        return self._rows.build(parsed, response)

    def _rule_for(self, row: RowJson) -> RewardRule:
        return self._rules.get(row.get("source", ""), "auto")


def _measure(config: PrepareConfig) -> Callable[[Row], ImageSize] | None:
    """Return a function that measures a row's image as ``model`` sees it; None if no rule needs it."""
    rules = config.reward.rules.values()
    if not any(any_part(rule, reads_image_size) for rule in rules):
        return None
    if config.model is None:
        raise ConfigError("a rule of reward.rules scales coordinates to the image of the model: give model=FOLDER")
    # Stages look only at the last reply of a conversation.
    return Processor(config.model, replace(config.data, learn="last")).image_size


def _grade(
    pool: GraderPool,
    batch: Sequence[RowJson],
    builder: _Requests,
) -> list[Verdict | None]:
    """Return the verdict on each row of a batch, None for a row without a response or an answer."""
    requests = {}
    for index, row in enumerate(batch):
        response = response_text(row)
        answer = row.get("answer")
        if response is not None and (answer or not builder.compares(row)):
            requests[index] = builder.build(row, str(response))
    graded = pool.grade(list(requests.values()))
    verdicts = dict(zip(requests, graded, strict=True))
    return [verdicts.get(index) for index in range(len(batch))]


def _write(work: Work, row: RowJson, verdict: Verdict | None) -> None:
    """Keep or drop a row by its verdict."""
    source = row.get("source", "")
    if verdict is None:
        if work.config.verify.need_answer and response_text(row) is not None:
            work.drop(row, source, "no answer to compare with")
        else:
            work.keep(row, source)
    elif verdict.correct:
        work.keep(row, source, verdict=str(verdict.reason))
    elif verdict.failed:
        work.drop(row, source, f"not graded: {verdict.reason}", error=verdict.box)
    elif verdict.score is not None:
        work.drop(row, source, f"less than 1: {verdict.reason}", reward=verdict.score)
    else:
        work.drop(row, source, f"wrong: {verdict.reason}", box=verdict.box)
    if verdict is not None and verdict.score is not None:
        work.report.add_value("reward by a function", verdict.score)


def settings(config: PrepareConfig) -> list[object]:
    """Return the settings on which the verdicts depend."""
    reward = config.reward
    return [
        config.verify,
        reward.rules,
        *reward_rules.judge_settings(reward),
        reward.timeout_s,
        reward.memory_mib,
    ]


STAGE = PrepareStage("verify", run, settings)
