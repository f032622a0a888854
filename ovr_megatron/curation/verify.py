"""The final answer of every response against the row's, in killable graders; rows without an answer pass by default."""

from __future__ import annotations

from ovr_megatron.curation.settings import PrepareConfig
from ovr_megatron.curation.stage import Stage, Work, batches
from ovr_megatron.curation.text import response_text
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.verdict import GradeRequest

_BATCH = 2048  # rows in memory at a time


def run(work: Work) -> None:
    """Grade, and keep what is right."""
    reward = work.config.reward
    with GraderPool(reward.workers, reward.timeout_s) as pool:
        for batch in batches(work.rows(), _BATCH):
            told = [(response_text(row), row.get("answer")) for row in batch]
            gradable = [at for at, (response, answer) in enumerate(told) if response is not None and answer]
            requests = [
                GradeRequest(str(told[at][0]), str(told[at][1]), tuple(batch[at].get("options", ()))) for at in gradable
            ]
            verdicts = dict(zip(gradable, pool.grade(requests), strict=True))
            for at, row in enumerate(batch):
                source, verdict = row.get("source", ""), verdicts.get(at)
                if verdict is None and work.config.verify.need_answer and told[at][0] is not None:
                    work.drop(row, source, "no answer to compare with")
                elif verdict is None:
                    work.keep(row, source)
                elif verdict.correct:
                    work.keep(row, source, verdict=str(verdict.reason))
                else:
                    work.drop(row, source, f"wrong: {verdict.reason}", box=verdict.box)
            work.progress.update(len(batch))


def settings(config: PrepareConfig) -> list[object]:
    """What decides the outcome."""
    return [config.verify, config.reward.timeout_s]


STAGE = Stage("verify", run, settings)
