"""Run one engine through a round: give it requests, put responses together, and have them graded meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ovr_megatron.ppo.grading import RoundGrading
from ovr_megatron.ppo.round_cut import RoundCut
from ovr_megatron.ppo.round_responses import RoundResponses
from ovr_megatron.ppo.timeline import Timeline
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime.work_barrier import WorkBarrier


class EngineRound:
    """The part of this rank's engine in a round.

    Args:
        engine: of this rank.
        responses: what earlier rounds have left, and what comes.
        grading: of the round.
        cut: ends a round that has more prompts than it trains on; None in any other round.
        barrier: of the round.
        iteration: that trains on the responses.
        leads: whether this rank speaks for its engine, whose other ranks have the same responses.
        keeps_unfinished: whether unfinished responses go on in a later round.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        responses: RoundResponses,
        grading: RoundGrading,
        cut: RoundCut | None,
        barrier: WorkBarrier,
        iteration: int,
        leads: bool,
        keeps_unfinished: bool,
    ) -> None:
        self._engine = engine
        self._responses = responses
        self._grading = grading
        self._cut = cut
        self._barrier = barrier
        self._iteration = iteration
        self._leads = leads
        self._keeps_unfinished = keeps_unfinished

    def run(
        self,
        complete: Sequence[int],
        take: Callable[[int], list[tuple[int, Prompt]]],
        show: Callable[[], None],
    ) -> dict[int, str]:
        """Answer all prompts, or until the round ends.

        Args:
            complete: indices of prompts to which earlier rounds have finished all responses.
            take: returns requests of `RoundResponses` for the number of responses the engine works on.
            show: called between two steps.

        Returns:
            By prompt the problem of those that the engine gave up; nothing on a rank that does not lead.
        """
        for prompt in complete:
            self._answer(prompt)

        def on_result(request: int, generations: list[Generation]) -> None:
            prompt = self._responses.finish(request, generations)
            if prompt is not None:
                self._answer(prompt)

        def between_steps() -> bool:
            if self._leads:
                self._grading.take_verdicts(False)
            show()
            stops = self._barrier.engine_step(self._engine.agree)
            return stops or (self._cut is not None and self._cut.engine_step(self._engine.agree))

        keeps_unfinished = self._keeps_unfinished and self._leads
        interrupt = self._responses.interrupt if keeps_unfinished else None
        failed = self._engine.answer(take, on_result, between_steps, interrupt)
        if not self._leads:
            return {}
        # Of a prompt with several requests the first problem.
        return {self._responses.prompt_of(request): problem for request, problem in reversed(failed)}

    def _answer(self, prompt: int) -> None:
        """Record that all responses to ``prompt`` are finished, and have them graded."""
        if self._cut:
            self._cut.answer(prompt)
        if self._leads:
            self._grading.submit(prompt, self._responses.group(prompt), self._iteration)

    def wait(self, timeline: Timeline) -> None:
        """Wait for the other engines of a round that has an end, then for this engine's verdicts.  A collective.

        ``timeline`` gets the ends of both.
        """
        if self._cut:
            self._cut.wait(self._barrier, lambda: self._grading.take_verdicts(False), self._leads)
            timeline.end("wait")
        # Every verdict is reported as a step, so that the ranks that wait at the barrier see this one work.
        while self._leads and self._grading.pending and not self._barrier.stop_asked():
            before = self._grading.pending
            self._grading.take_verdicts(True)
            if self._grading.pending < before:  # it also returns after a second without a verdict
                self._barrier.step()
        timeline.end("grade")
