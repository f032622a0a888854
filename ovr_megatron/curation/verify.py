"""Grade the final answer of every response against the row's answer, in killable graders.

A row is graded as reinforcement learning grades its source (``reward.rules``).  Rows without an answer pass by default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ovr_megatron.curation.reward_rules import check_sources
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, batches
from ovr_megatron.curation.text import response_text
from ovr_megatron.data.row_json import RowJson
from ovr_megatron.rewards.failures import FailureWatch, count_verdicts
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.verdict import GradeRequest, Verdict

_BATCH = 2048  # rows in memory at a time


def run(work: Work) -> None:
    """Grade the responses, and keep the rows with a right one.

    Raises:
        RewardError: nearly all verdicts of a source failed.
    """
    check_sources(work.config)
    reward = work.config.reward
    watch = FailureWatch(reward.rules)
    pool = GraderPool(
        reward.workers,
        reward.timeout_s,
        reward.memory_mib,
        reward.cache,
    )
    with pool:
        for batch in batches(work.rows(), _BATCH):
            verdicts = _grade(pool, batch, reward.rules)
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


def _grade(
    pool: GraderPool,
    batch: Sequence[RowJson],
    rules: Mapping[str, str],
) -> list[Verdict | None]:
    """Return the verdict on each row of a batch, None for a row without a response or an answer."""
    requests = {}
    for index, row in enumerate(batch):
        response = response_text(row)
        answer = row.get("answer")
        if response is not None and answer:
            source = row.get("source", "")
            rule = rules.get(source, "auto")
            options = tuple(row.get("options", ()))
            requests[index] = GradeRequest(
                str(response),
                str(answer),
                options,
                rule,
            )
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
        reward.timeout_s,
        reward.memory_mib,
    ]


STAGE = PrepareStage("verify", run, settings)
