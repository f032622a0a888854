"""Have the responses of a round graded while others are generated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.counters import RolloutCounters
from ovr_megatron.ppo.unfinished import ResponseSoFar
from ovr_megatron.rewards.combination import is_unknown
from ovr_megatron.rewards.failures import VerdictCounts, count_verdicts
from ovr_megatron.rewards.pool import GraderPool, Verdict
from ovr_megatron.rewards.requests import RequestBuilder
from ovr_megatron.rewards.verdict import RewardRule


class RoundGrading:
    """The responses of this rank's engine to the prompts that it has answered in a round, and their verdicts.

    Attributes:
        responses: by prompt and sample; those whose verdict is missing have none yet.
        answered: the prompts, in the order in which the engine has answered them.
        after_verdicts: called when verdicts may have come.
    """

    after_verdicts: Callable[[], None] | None = None

    def __init__(
        self,
        grader: GraderPool,
        processor: Processor,
        config: RLConfig,
        rows: Sequence[Row],
        counters: RolloutCounters,
    ) -> None:
        self.responses: dict[tuple[int, int], Response] = {}
        self.answered: list[int] = []
        self._grader = grader
        self._processor = processor
        self._config = config
        self._rows = rows
        self._requests = RequestBuilder(config.reward.rules, config.data.template == "think", processor.image_size)
        self._counters = counters
        self._verdicts: dict[tuple[int, int], tuple[str, Verdict]] = {}  # with the source of the row

    def submit(self, prompt: int, group: Sequence[ResponseSoFar], iteration: int) -> None:
        """Have all responses to ``prompt`` graded, on which ``iteration`` trains."""
        for k, finished in enumerate(group):
            tokens: list[int] = finished.tokens.tolist()
            is_current = bool((finished.versions == iteration).all())
            response = Response(
                prompt,
                k,
                tokens,
                finished.logprobs,
                finished.stopped,
                self._processor.decode(tokens),
                versions=None if is_current else finished.versions,
            )
            self._submit(response)
            self.responses[prompt, k] = response
        self.answered.append(prompt)
        token_count = sum(map(len, group))
        self._counters.add(len(group), token_count)

    def _submit(self, response: Response) -> None:
        """Have ``response`` graded; one that did not stop by itself gets 0 and costs the graders nothing."""
        response.verdict = "not finished"
        if response.stopped:
            request = self._requests.build(self._rows[response.prompt], response.text)
            self._grader.submit((response.prompt, response.sample), request)

    def add_failed(self, failed: Sequence[tuple[int, str]], count: int) -> None:
        """Add ``count`` responses without tokens and reward for each prompt (and problem) that the engine gave up."""
        for prompt, problem in failed:
            for sample in range(count):
                self.responses[prompt, sample] = Response(
                    prompt,
                    sample,
                    tokens=[],
                    logprobs=np.zeros(0, np.float32),
                    stopped=False,
                    text="",
                    verdict=f"failed: {problem}",
                    rewarded=False,
                )

    def group(self, prompt: int) -> list[Response]:
        """Return the responses to a prompt that was answered or given up."""
        return [self.responses[prompt, sample] for sample in range(self._config.responses)]

    def is_graded(self, prompt: int) -> bool:
        """Return whether no verdict on the responses to an answered prompt is missing."""
        for response in self.group(prompt):
            # Those that did not stop by themselves are graded by nobody.
            if response.stopped and (prompt, response.sample) not in self._verdicts:
                return False
        return True

    @property
    def pending(self) -> int:
        """Number of verdicts that are missing."""
        return self._grader.pending

    def take_verdicts(self, wait: bool) -> None:
        """Write the verdicts that are there into their responses; ``wait`` for at least one."""
        reward = 0.0
        for key, verdict in self._grader.collect(wait):
            reward += self._write(key, verdict)
        # Once for all of them: the store may be on another node, and the engine waits meanwhile.
        self._counters.add_reward(reward)
        if self.after_verdicts:
            self.after_verdicts()

    def _write(self, key: Any, verdict: Verdict) -> float:
        """Write a verdict into its response; return the reward."""
        response = self.responses[key]
        source = self._rows[response.prompt].source
        self._verdicts[key] = (source, verdict)
        return write_verdict(response, verdict, self._rule_for(source))

    def _rule_for(self, source: str) -> RewardRule:
        """Return the rule by which responses to rows of ``source`` are graded."""
        return self._config.reward.rules.get(source, "auto")

    def responses_without(self, left_out: set[int]) -> list[Response]:
        """Return the responses to the prompts that are not in ``left_out``."""
        # By prompt and sample, so that the order does not depend on which response ended first.
        return [self.responses[key] for key in sorted(self.responses) if key[0] not in left_out]

    def count_verdicts(self, left_out: set[int]) -> dict[str, VerdictCounts]:
        """Count verdicts by source, and the failed ones, without the prompts in ``left_out``.

        How many of these are graded depends on the clock.
        """
        verdicts = [verdict for (prompt, _), verdict in self._verdicts.items() if prompt not in left_out]
        return count_verdicts(verdicts)


def write_verdict(response: Response, verdict: Verdict, rule: RewardRule) -> float:
    """Write ``verdict``, made by ``rule``, into its response; return the reward.

    There is no reward where it is unknown (`ovr_megatron.rewards.combination.is_unknown`).
    """
    response.reward = verdict.reward
    response.verdict = verdict.reason
    response.failed = verdict.failed
    if is_unknown(verdict, rule):
        response.rewarded = False
    # The box of a rule without a score is in the response, where people read it.
    if verdict.box and (verdict.score is not None or not response.rewarded):
        response.verdict = f"{verdict.reason}: {verdict.box}"
    return response.reward
