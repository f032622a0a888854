"""The final answer of every response against the row's, in killable graders; rows without an answer pass by default.

A row is graded as reinforcement learning grades its source (``reward.rules``).
"""

from __future__ import annotations

from ovr_megatron.curation.reward_rules import check_sources
from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work, batches
from ovr_megatron.curation.text import response_text
from ovr_megatron.rewards.failures import FailureWatch, counts
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.verdict import GradeRequest

_BATCH = 2048  # rows in memory at a time


def run(work: Work) -> None:
    """Grade, and keep what is right.

    Raises:
        RewardError: nearly all verdicts of a source failed.
    """
    check_sources(work.config)
    reward = work.config.reward
    watch = FailureWatch(reward.rules)
    with GraderPool(reward.workers, reward.timeout_s, reward.memory_mib, reward.cache) as pool:
        for batch in batches(work.rows(), _BATCH):
            requests = {}
            for number, row in enumerate(batch):
                response, answer, source = response_text(row), row.get("answer"), row.get("source", "")
                if response is not None and answer:
                    rule = reward.rules.get(source, "auto")
                    requests[number] = GradeRequest(str(response), str(answer), tuple(row.get("options", ())), rule)
            verdicts = dict(zip(requests, pool.grade(list(requests.values())), strict=True))
            watch.add([counts((batch[number].get("source", ""), verdict) for number, verdict in verdicts.items())])
            for number, row in enumerate(batch):
                source, verdict = row.get("source", ""), verdicts.get(number)
                if verdict is None and work.config.verify.need_answer and response_text(row) is not None:
                    work.drop(row, source, "no answer to compare with")
                elif verdict is None:
                    work.keep(row, source)
                elif verdict.correct:
                    work.keep(row, source, verdict=str(verdict.reason))
                elif verdict.failed:
                    work.drop(row, source, f"not graded: {verdict.reason}", error=verdict.box)
                else:
                    work.drop(row, source, f"wrong: {verdict.reason}", box=verdict.box)
            work.progress.update(len(batch))


def settings(config: PrepareConfig) -> list[object]:
    """Return what decides the outcome."""
    return [config.verify, config.reward.rules, config.reward.timeout_s, config.reward.memory_mib]


STAGE = PrepareStage("verify", run, settings)
