"""Generate the responses of an iteration on all replicas, and grade them."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ovr_megatron.config import RLConfig, Sampling
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row
from ovr_megatron.ppo.batch import Response, seeds_of
from ovr_megatron.ppo.counters import RolloutCounters
from ovr_megatron.ppo.prompts import Prompts, PromptStream
from ovr_megatron.ppo.round_cut import RoundCut
from ovr_megatron.ppo.timeline import Timeline
from ovr_megatron.rewards.failures import FailureWatch, count_verdicts
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Verdict
from ovr_megatron.rewards.rules import is_plain
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt, RolloutError
from ovr_megatron.runtime.distributed import World, default_store
from ovr_megatron.runtime.exchange import gather_objects
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.stop import StopRequest
from ovr_megatron.runtime.work_barrier import WorkBarrier

_rounds = itertools.count()  # of this process; ranks open rounds together, and so count alike


class GroupRewards(NamedTuple):
    """The responses to one prompt, all of them graded.

    Attributes:
        tokens: of all responses, the prompt counted with each.
        differ: whether the rewards are not all the same.
    """

    tokens: int
    differ: bool


class RankTimes(NamedTuple):
    """Seconds of a rank from the begin of an iteration's generation, and its failures.

    Attributes:
        generate_s: until its engine was done.
        total_s: until its responses were graded and all ranks done.
        failed_prompts: prompts that its engine gave up.
    """

    generate_s: float
    total_s: float
    failed_prompts: int


@dataclass
class Rollout:
    """The prompts of an iteration with their responses.

    Attributes:
        prompts: all that were drawn, the same on all ranks.
        limit: most tokens of a prompt and its response together.
        responses: those of this rank's engine; none on the followers of a tensor-parallel group.
        train_prompts: the prompts to train on, the same on all ranks, and the tokens of each with all its responses.
        metrics: of generation, the same on all ranks.
        long: whether the prompts are those that oversampled rounds postponed.
        postponed: the prompts that an oversampled round left to a long one, the same on all ranks.
        timeline: of this rank; generation adds what it does.
    """

    prompts: Prompts
    limit: int
    responses: list[Response] = field(default_factory=list)
    train_prompts: dict[int, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    long: bool = False
    postponed: list[int] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response of this rank's engine, without those that were given up."""
        return [len(r.tokens) for r in self.responses if r.tokens]


class Rollouts:
    """Generate on all replicas and grade finished responses meanwhile.

    Attributes:
        endless: makes every response as long as the limit allows, as a rehearsal needs it.
        stop: ends generation when a signal comes, on any rank; None generates to the end.
    """

    endless = False
    stop: StopRequest | None = None

    def __init__(
        self, engine: RolloutEngine, grader: GraderPool, processor: Processor, config: RLConfig, world: World
    ) -> None:
        self.engine = engine
        self.grader = grader
        self.processor = processor
        self.config = config
        self.world = world
        self.replicas = world.size // config.rollout.tp
        self.replica, tp_rank = divmod(world.rank, config.rollout.tp)
        self.leads = tp_rank == 0
        self.failures = FailureWatch(config.reward.rules)

    def collect(self, prompts: PromptStream, iteration: int, limit: int, timeline: Timeline | None = None) -> Rollout:
        """Draw prompts, generate and grade; with ``algorithm.dynamic_sampling``, until enough have unequal rewards.

        Where even its last round leaves too few, prompts with equal rewards fill the batch up: they change nothing
        but the number of tokens by which losses are divided.  A collective.

        Args:
            prompts: gives the next prompts, the same on every rank.
            iteration: from 0, for the seeds.
            limit: most tokens of a prompt and its response together.
            timeline: of this rank's iteration so far; None starts one.

        Raises:
            RolloutError: half of the prompts or more were given up, or have responses without a reward.
            RewardError: nearly all rewards of a source failed.
            StopRequested: on all ranks, as one was asked to stop; what was generated is dropped.
        """
        config = self.config
        dynamic_sampling = config.algorithm.dynamic_sampling
        rollout = Rollout(Prompts([], self.processor), limit, timeline=timeline or Timeline())
        rows = rollout.prompts.rows
        tokens: dict[int, int] = {}
        unequal: list[int] = []
        for sampling_round in range(max(dynamic_sampling, 1)):
            first = len(rows)
            drawn_rows, rollout.long = self._draw(prompts)
            rows += drawn_rows
            indices = range(first, len(rows))
            # A name of its own: the store keeps the counters of earlier queues, also of another run in this process.
            name = f"{iteration}.{sampling_round}#{next(_rounds)}"
            rollout.timeline.end("draw")
            responses = self._generate(rollout, indices, iteration, name)
            rollout.responses += responses
            groups = self._group_rewards(responses, rollout)
            for prompt, group in groups.items():
                tokens[prompt] = group.tokens
                if group.differ:
                    unequal.append(prompt)
            # All ranks have gathered the same groups, so that they leave the loop in the same round.
            if not dynamic_sampling or len(unequal) >= config.prompts:
                break
        asked = len(rows) - len(rollout.postponed)
        if len(tokens) * 2 <= asked:
            problems = {r.verdict for r in rollout.responses if not r.rewarded}
            raise RolloutError(f"{len(tokens)} of {asked} prompts were answered and graded: {problems}")
        order = list(tokens)
        if dynamic_sampling:
            unequal_prompts = set(unequal)
            equal = [prompt for prompt in tokens if prompt not in unequal_prompts]
            order = unequal + equal
            rollout.metrics["data/drawn_prompts"] = len(rows)
            rollout.metrics["data/unequal_prompts"] = len(unequal) / len(rows)
        # By index again: in `order` those with equal rewards come last.
        for prompt in sorted(order[: config.prompts]):
            rollout.train_prompts[prompt] = tokens[prompt]
        if config.rollout.oversample or rollout.long:
            prompts.postpone(rollout.postponed)
            rollout.metrics["rollout/long_round"] = float(rollout.long)
            rollout.metrics["rollout/postponed_prompts"] = float(prompts.postponed)
        return rollout

    def _draw(self, prompts: PromptStream) -> tuple[list[Row], bool]:
        """Return the prompts of a round, and whether it is a long one.

        Prompts may wait for a long round although ``rollout.oversample`` is 0, where a run goes on with this setting.

        Raises:
            RolloutError: with ``algorithm.dynamic_sampling``, which has no long rounds.
        """
        if self.config.algorithm.dynamic_sampling:
            if prompts.postponed:
                raise RolloutError(
                    f"{prompts.postponed} prompts of the checkpoint wait for a long round, which "
                    "algorithm.dynamic_sampling does not have; set it to 0 until they are trained on"
                )
            return prompts.draw(self.config.prompts), False
        return prompts.draw_round(self.config.prompts, self.config.rollout.oversample)

    def _group_rewards(self, responses: Sequence[Response], rollout: Rollout) -> dict[int, GroupRewards]:
        """Gather the groups of all ranks whose responses are all graded, by prompt.  A collective."""
        local_groups = {}
        responses_of_prompt = group_by_prompt(responses)
        for prompt, group in responses_of_prompt.items():
            if not all(r.rewarded for r in group):
                continue
            prompt_tokens = len(rollout.prompts.sample(prompt))
            total_tokens = 0
            distinct_rewards = set()
            for r in group:
                total_tokens += prompt_tokens + len(r.tokens)
                distinct_rewards.add(r.reward)
            differ = len(distinct_rewards) > 1
            local_groups[prompt] = GroupRewards(total_tokens, differ)
        # Every rank takes part, also the followers of an engine, which have no responses.
        ranks = gather_objects(local_groups if self.leads else {})
        groups: dict[int, GroupRewards] = {}
        for rank_groups in ranks:
            groups |= rank_groups
        return dict(sorted(groups.items()))  # the same order for any number of ranks

    def _generate(self, rollout: Rollout, indices: Sequence[int], iteration: int, name: str) -> list[Response]:
        """Generate this engine's share of the prompts ``indices`` and grade it.  A collective.

        Args:
            rollout: has the prompts; metrics are added to it.
            indices: the prompts of all ranks.
            iteration: from 0, for the seeds.
            name: of the queue, unique in the process group.
        """
        config = self.config
        rows = rollout.prompts.rows
        began = time.perf_counter()
        responses: dict[tuple[int, int], Response] = {}
        queue = self._open_queue(indices, name)
        take = partial(self._take_prompts, queue, rollout, iteration)
        counters = RolloutCounters(f"counters/{name}")
        barrier = WorkBarrier(name, self.stop)
        needed = min(len(indices), config.prompts)
        cut = RoundCut(name, needed, self.replica, self.replicas) if needed < len(indices) else None
        graded: dict[tuple[int, int], tuple[str, Verdict]] = {}

        def on_result(prompt: int, generations: list[Generation]) -> None:
            if cut:
                cut.answer(prompt)
            if not self.leads:  # the ranks of an engine have the same responses
                return
            responses.update(self._submit_all(prompt, generations, rows[prompt]))
            token_count = sum(len(generation.tokens) for generation in generations)
            counters.add(len(generations), token_count)

        def take_verdicts(wait: bool) -> None:
            graded.update(self._write_verdicts(responses, rows, self.grader.collect(wait), counters))

        title = f"generating {iteration}"
        with Progress(needed * config.responses, title, "response", self.world.is_main, inner=True) as bar:

            def between_steps() -> bool:
                if self.leads:
                    take_verdicts(False)
                if self.world.is_main:
                    counters.show(bar)
                stops = barrier.engine_step(self.engine.agree)
                return stops or (cut is not None and cut.engine_step(self.engine.agree))

            failed = self.engine.answer(take, on_result, between_steps)
            generate_s = rollout.timeline.end("engine")
            self._finish_round(barrier, cut, take_verdicts, rollout.timeline)
            if self.world.is_main:
                counters.show(bar, at_once=True)
        # Not in the gathers below: a rank may wait here longer than the time-out of an ordinary collective.
        barrier.wait()
        rollout.timeline.end("wait")
        failed_prompts = failed if self.leads else []  # the followers of an engine have the same list
        responses |= _failed_responses(failed_prompts, config.responses)
        if cut:
            rollout.postponed = cut.postponed(indices, [prompt for prompt, _ in failed_prompts], self.leads)
        self._watch_failures(graded, rollout.postponed)
        self._record_idle_time(rollout, RankTimes(generate_s, time.perf_counter() - began, len(failed_prompts)))
        return self._in_round(responses, rollout.postponed)

    def _in_round(self, responses: Mapping[tuple[int, int], Response], postponed: Sequence[int]) -> list[Response]:
        """Return the responses to prompts that are not postponed."""
        left_out = set(postponed)
        # By prompt and sample, so that the order does not depend on which response ended first.
        return [responses[key] for key in sorted(responses) if key[0] not in left_out]

    def _finish_round(
        self, barrier: WorkBarrier, cut: RoundCut | None, take_verdicts: Callable[[bool], None], timeline: Timeline
    ) -> None:
        """Wait for the other engines where the round is cut, then for the verdicts, or until a stop is asked for."""
        if cut:
            cut.wait(barrier, lambda: take_verdicts(False), self.leads)
            timeline.end("wait")
        # Every verdict is reported as a step, so that the ranks that wait at the barrier see this one work.
        while self.leads and self.grader.pending and not barrier.stop_asked():
            take_verdicts(True)
            barrier.step()
        timeline.end("grade")

    def _take_prompts(
        self, queue: Callable[[int], list[int]], rollout: Rollout, iteration: int, outstanding: int
    ) -> list[tuple[int, Prompt]]:
        """Return the engine's next prompts, where it still works on ``outstanding`` responses."""
        return self._engine_prompts(queue(outstanding), rollout, iteration)

    def _engine_prompts(self, indices: Sequence[int], rollout: Rollout, iteration: int) -> list[tuple[int, Prompt]]:
        """Return each of the prompts ``indices`` as the engine takes it, with seeds and length limit."""
        config = self.config
        rollout.prompts.encode(indices)  # together, so that their images are processed in one batch
        prompts = []
        for i in indices:
            sample = rollout.prompts.sample(i)
            seeds = seeds_of(config.run.seed, iteration, i, config.responses)
            response_limit = rollout.limit - len(sample)
            sampling = Sampling(config.rollout.temperature, response_limit, self.endless)
            prompt = Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, sampling)
            prompts.append((i, prompt))
        return prompts

    def _open_queue(self, indices: Sequence[int], name: str) -> Callable[[int], list[int]]:
        """Return a function that gives the engine's next prompts for the number of responses it still works on.

        ``static``: replica r of R answers every R-th prompt from the r-th, all of them at once.  ``shared``: each takes
        the next prompt from one queue whenever it has capacity, so that one with short responses takes more of them.
        """
        config = self.config
        if config.rollout.schedule == "static":
            remaining = list(indices[self.replica :: self.replicas])

            def take_all(outstanding: int) -> list[int]:
                taken = list(remaining)
                remaining.clear()
                return taken

            return take_all
        counter = default_store(f"queue/{name}")
        # Remembered, as asking costs a message to the store and a broadcast before each decoding step.
        is_empty = False

        def take_next(outstanding: int) -> list[int]:
            nonlocal is_empty
            taken: list[int] = []
            while not is_empty and outstanding < config.rollout.max_num_seqs:
                # Asked by the leader alone: the ranks of an engine must take the same prompts.  The store adds for one
                # rank at a time, so that no position is given to two engines.
                position = self.engine.agree(lambda: counter.add("next", 1) - 1)
                is_empty = position >= len(indices)
                if not is_empty:
                    taken.append(indices[position])
                    outstanding += config.responses
            return taken

        return take_next

    def _submit_all(self, prompt: int, generations: Sequence[Generation], row: Row) -> dict[tuple[int, int], Response]:
        """Have all responses to ``prompt`` graded; return them by prompt and sample."""
        responses = {}
        for k, generation in enumerate(generations):
            text = self.processor.decode(generation.tokens)
            response = Response(
                prompt,
                k,
                generation.tokens,
                generation.logprobs,
                generation.stopped,
                text,
            )
            self._submit(response, row)
            responses[prompt, k] = response
        return responses

    def _submit(self, response: Response, row: Row) -> None:
        """Have ``response`` graded; one that did not stop by itself gets 0 and costs the graders nothing."""
        response.verdict = "not finished"
        if response.stopped:
            thinking = self.config.data.template == "think"
            rule = self._rule_for(row.source)
            request = GradeRequest(
                response.text,
                row.answer or "",
                row.options,
                rule,
                thinking,
            )
            self.grader.submit((response.prompt, response.sample), request)

    def _write_verdicts(
        self,
        responses: Mapping[tuple[int, int], Response],
        rows: Sequence[Row],
        verdicts: Iterable[tuple[Any, Verdict]],
        counters: RolloutCounters,
    ) -> dict[tuple[int, int], tuple[str, Verdict]]:
        """Write ``verdicts`` into their responses and return them by prompt and sample, with the source of the row."""
        graded = {}
        for key, verdict in verdicts:
            response = responses[key]
            source = rows[response.prompt].source
            graded[key] = (source, verdict)
            reward = _write_verdict(response, verdict, self._rule_for(source))
            counters.add_reward(reward)
        return graded

    def _rule_for(self, source: str) -> str:
        """Return the rule by which responses to rows of ``source`` are graded."""
        return self.config.reward.rules.get(source, "auto")

    def _watch_failures(self, graded: Mapping[tuple[int, int], tuple[str, Verdict]], postponed: Sequence[int]) -> None:
        """Count what failed on all ranks, so that all stop where one source has hardly any verdict.  A collective."""
        # Without postponed prompts: how many of these are graded depends on the clock.
        left_out = set(postponed)
        verdicts = [verdict for (prompt, _), verdict in graded.items() if prompt not in left_out]
        local_counts = count_verdicts(verdicts)
        self.failures.add(gather_objects(local_counts))

    def _record_idle_time(self, rollout: Rollout, times: RankTimes) -> None:
        """Add what the ranks waited for, and how many prompts failed, to the metrics of ``rollout``.  A collective.

        ``timing/rollout_idle`` is the mean time that engines waited for the last one, ``timing/grade_after`` the time
        from there to the last verdict.

        Args:
            rollout: gets the metrics; those of several rounds are summed.
            times: of this rank.
        """
        ranks = gather_objects(times)
        last_generate_s = max(rank.generate_s for rank in ranks)
        last_total_s = max(rank.total_s for rank in ranks)
        idle_s = sum(last_generate_s - rank.generate_s for rank in ranks)
        failed_prompts = sum(rank.failed_prompts for rank in ranks)
        # Each rank counts from its own begin, so that the difference may come out a little below 0.
        grade_after_s = max(last_total_s - last_generate_s, 0.0)
        values = {
            "timing/rollout_idle": idle_s / self.world.size,
            "timing/grade_after": grade_after_s,
            "response/failed_prompts": float(failed_prompts),
        }
        for key, value in values.items():
            rollout.metrics[key] = rollout.metrics.get(key, 0.0) + value


def _failed_responses(failed: Sequence[tuple[int, str]], count: int) -> dict[tuple[int, int], Response]:
    """Return ``count`` responses without tokens and reward for each prompt (and problem) that the engine gave up."""
    responses = {}
    for prompt, problem in failed:
        for sample in range(count):
            responses[prompt, sample] = Response(
                prompt,
                sample,
                tokens=[],
                logprobs=np.zeros(0, np.float32),
                stopped=False,
                text="",
                verdict=f"failed: {problem}",
                rewarded=False,
            )
    return responses


def _write_verdict(response: Response, verdict: Verdict, rule: str) -> float:
    """Write ``verdict``, made by ``rule``, into its response; return the reward.

    An expression that two graders cannot finish is no right answer, but of a user's function that fails nothing is
    known, so that there is no reward.
    """
    response.reward = verdict.reward
    response.verdict = verdict.reason
    response.failed = verdict.failed
    if verdict.failed and not is_plain(rule):
        response.rewarded = False
        parts = filter(None, (verdict.reason, verdict.box))
        response.verdict = ": ".join(parts)
    return response.reward


def group_by_prompt(responses: Iterable[Response]) -> dict[int, list[Response]]:
    """Group responses by the index of their prompt."""
    groups: dict[int, list[Response]] = defaultdict(list)
    for r in responses:
        groups[r.prompt].append(r)
    return groups
