"""Generate the responses of an iteration on all replicas, and grade them."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from ovr_megatron.config import RLConfig, Sampling
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import RowPosition
from ovr_megatron.ppo.batch import Response, group_by_prompt, seeds_of
from ovr_megatron.ppo.counters import RolloutCounters
from ovr_megatron.ppo.engine_round import EngineRound
from ovr_megatron.ppo.grading import RoundGrading
from ovr_megatron.ppo.parts import PartSender, count_tokens
from ovr_megatron.ppo.prompts import Prompts, PromptStream
from ovr_megatron.ppo.round_cut import RoundCut
from ovr_megatron.ppo.round_responses import RoundResponses
from ovr_megatron.ppo.round_work import PromptQueue, RoundWork, assign, assign_continued
from ovr_megatron.ppo.timeline import Timeline
from ovr_megatron.ppo.unfinished import UnfinishedResponses
from ovr_megatron.rewards.failures import FailureWatch
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt, RolloutError
from ovr_megatron.runtime.distributed import World
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
        restarted: in a round that goes on with unfinished responses, indices in the queue of unfinished prompts of
            those that began again; None in any other round.
        unfinished: the prompts whose responses the next round goes on with, the same on all ranks.
        mixed: by prompt whose responses are all graded, whether their rewards differ, the same on all ranks.
        timeline: of this rank; generation adds what it does.
    """

    prompts: Prompts
    limit: int
    responses: list[Response] = field(default_factory=list)
    train_prompts: dict[int, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    long: bool = False
    postponed: list[int] = field(default_factory=list)
    restarted: list[int] | None = None
    unfinished: list[int] = field(default_factory=list)
    mixed: dict[int, bool] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response of this rank's engine, without those that were given up."""
        return [len(r.tokens) for r in self.responses if r.tokens]


class Rollouts:
    """Generate on all replicas and grade finished responses meanwhile.

    Attributes:
        unfinished: the responses that this rank keeps for the next round.
        endless: makes every response as long as the limit allows, as a rehearsal needs it.
        stop: ends generation when a signal comes, on any rank; None generates to the end.
        version: the iteration whose weights the engine has; None: that of the round.
        part_sender: sends the responses of an iteration in parts as they come; None: the `Rollout` alone has them.
    """

    endless = False
    stop: StopRequest | None = None
    version: int | None = None
    part_sender: PartSender | None = None

    def __init__(
        self,
        engine: RolloutEngine,
        grader: GraderPool,
        processor: Processor,
        config: RLConfig,
        world: World,
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
        self.unfinished = UnfinishedResponses()

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
        positions: list[RowPosition] = []
        for sampling_round in range(max(dynamic_sampling, 1)):
            first = len(rows)
            work = self._draw(prompts, rollout, iteration)
            positions += prompts.round_positions
            indices = range(first, len(rows))
            # A name of its own: the store keeps the counters of earlier queues, also of another run in this process.
            name = f"{iteration}.{sampling_round}#{next(_rounds)}"
            rollout.timeline.end("draw")
            responses = self._generate(rollout, indices, work, iteration, name)
            rollout.responses += responses
            groups = self._group_rewards(responses, rollout)
            for prompt, group in groups.items():
                tokens[prompt] = group.tokens
                rollout.mixed[prompt] = group.differ
            # All ranks have gathered the same groups, so that they leave the loop in the same round.
            if not dynamic_sampling or sum(rollout.mixed.values()) >= config.prompts:
                break
        asked = len(rows) - len(rollout.postponed) - len(rollout.unfinished)
        if len(tokens) * 2 <= asked:
            problems = {r.verdict for r in rollout.responses if not r.rewarded}
            raise RolloutError(
                f"{len(tokens)} of {asked} prompts were answered and graded: {problems}; where a judge gives no "
                "verdict on some responses, reward.judges.NAME.no_verdict gives them a reward"
            )
        self._choose_prompts(rollout, tokens)
        self._leave_to_later(prompts, rollout)
        # Last: prompts that wait for a later round have no rewards yet.
        rollout.metrics |= prompts.observe(positions, rollout.mixed)
        return rollout

    def _choose_prompts(self, rollout: Rollout, tokens: dict[int, int]) -> None:
        """Choose the prompts that the iteration trains on, those of equal rewards last; ``tokens`` are by prompt."""
        order = list(tokens)
        if self.config.algorithm.dynamic_sampling:
            unequal = [prompt for prompt in tokens if rollout.mixed[prompt]]
            equal = [prompt for prompt in tokens if not rollout.mixed[prompt]]
            order = unequal + equal
            drawn = len(rollout.prompts.rows)
            rollout.metrics["data/drawn_prompts"] = drawn
            rollout.metrics["data/unequal_prompts"] = len(unequal) / drawn
        # By index again: in `order` those with equal rewards come last.
        for prompt in sorted(order[: self.config.prompts]):
            rollout.train_prompts[prompt] = tokens[prompt]

    def _leave_to_later(self, prompts: PromptStream, rollout: Rollout) -> None:
        """Put what the iteration does not train on into the queues of ``prompts``, and count it."""
        metrics = rollout.metrics
        if rollout.restarted is not None:
            prompts.keep_unfinished(rollout.unfinished)
            metrics["rollout/unfinished_prompts"] = float(prompts.unfinished)
            return
        self.unfinished.groups = {}  # their prompts began again
        if self.config.rollout.oversample or rollout.long:
            prompts.postpone(rollout.postponed)
            metrics["rollout/long_round"] = float(rollout.long)
            metrics["rollout/postponed_prompts"] = float(prompts.postponed)

    def _draw(self, prompts: PromptStream, rollout: Rollout, iteration: int) -> RoundWork:
        """Draw the prompts of a round into ``rollout``; return what this rank's engine does.  A collective.

        Prompts may wait for a long round, or have unfinished responses, although the settings have no such rounds any
        more, where a run goes on with others.

        Raises:
            RolloutError: with ``algorithm.dynamic_sampling``, which has no long rounds.
        """
        config = self.config
        rows = rollout.prompts.rows
        if config.rollout.continues_responses:
            return self._draw_continued(prompts, rollout, iteration)
        prompts.restart(range(prompts.unfinished))
        first = len(rows)
        if config.algorithm.dynamic_sampling:
            if prompts.postponed:
                raise RolloutError(
                    f"{prompts.postponed} prompts of the checkpoint wait for a long round, which "
                    "algorithm.dynamic_sampling does not have; set it to 0 until they are trained on"
                )
            rows += prompts.draw(config.prompts)
        else:
            round_rows, rollout.long = prompts.draw_round(config.prompts, config.rollout.oversample)
            rows += round_rows
        return assign(range(first, len(rows)), self.replica, self.replicas, config.rollout.schedule == "static")

    def _draw_continued(self, prompts: PromptStream, rollout: Rollout, iteration: int) -> RoundWork:
        """Draw a round that goes on with unfinished responses, but for those that would be too old.  A collective."""
        config = self.config
        states = self.unfinished.states(rollout.limit, config.responses)
        oldest = iteration - config.rollout.max_staleness
        continued = [position for position, state in states.items() if state.oldest >= oldest]
        # Also the prompts that no engine has begun, and those that have another number of responses.
        rollout.restarted = sorted(set(range(prompts.unfinished)) - set(continued))
        rollout.metrics["rollout/dropped_for_age"] = float(len(states) - len(continued))
        count = config.prompts + math.ceil(config.prompts * config.rollout.oversample)
        rollout.prompts.rows += prompts.continue_round(count, rollout.restarted)
        complete = {index for index, position in enumerate(continued) if states[position].is_complete}
        total = len(rollout.prompts.rows)
        shares, replica_of_prompt = assign_continued(
            len(continued), complete, total, self.replicas, config.rollout.schedule == "static"
        )
        work = shares[self.replica]
        ranks_of_group = {}
        for index, replica in replica_of_prompt.items():
            first_rank = replica * config.rollout.tp
            ranks_of_group[continued[index]] = range(first_rank, first_rank + config.rollout.tp)
        groups = self.unfinished.send(ranks_of_group)
        for index, position in enumerate(continued):
            if position in groups:
                work.groups[index] = groups[position].cut(rollout.limit)
        return work

    def _group_rewards(self, responses: Sequence[Response], rollout: Rollout) -> dict[int, GroupRewards]:
        """Gather the groups of all ranks whose responses are all graded, by prompt.  A collective."""
        groups_of_responses = group_by_prompt(responses)
        local_groups = {}
        for prompt, tokens in count_tokens(responses, rollout.prompts).items():
            rewards = {r.reward for r in groups_of_responses[prompt]}
            local_groups[prompt] = GroupRewards(tokens, len(rewards) > 1)
        # Every rank takes part, also the followers of an engine, which have no responses.
        ranks = gather_objects(local_groups if self.leads else {})
        groups: dict[int, GroupRewards] = {}
        for rank_groups in ranks:
            groups |= rank_groups
        return dict(sorted(groups.items()))  # the same order for any number of ranks

    def _generate(
        self, rollout: Rollout, indices: Sequence[int], work: RoundWork, iteration: int, name: str
    ) -> list[Response]:
        """Generate this engine's share of the prompts ``indices`` and grade it.  A collective.

        Args:
            rollout: has the prompts; metrics are added to it.
            indices: the prompts of all ranks.
            work: this engine's share.
            iteration: from 0, for the seeds.
            name: of the queue, unique in the process group.
        """
        config = self.config
        began = time.perf_counter()
        counters = RolloutCounters(f"counters/{name}")
        grading = self._grading(rollout, counters)
        responses = RoundResponses(config.responses, self._version_of(iteration), work.groups)
        barrier = WorkBarrier(name, self.stop)
        needed = min(len(indices), config.prompts)
        continues = rollout.restarted is not None
        cut = self._cut(name, needed, continues) if needed < len(indices) else None
        engine_round = EngineRound(self.engine, responses, grading, cut, barrier, iteration, self.leads, continues)
        queue = self._open_queue(work, name)

        def take_requests(unfinished: int) -> list[tuple[int, Prompt]]:
            requests = []
            taken = queue.take(unfinished)
            if self.part_sender:
                self.part_sender.begin(len(taken))
            for prompt, template in self._engine_prompts(taken, rollout, iteration):
                prompt_tokens = len(rollout.prompts.sample(prompt))
                requests += responses.requests(prompt, template, rollout.limit, prompt_tokens)
            return requests

        title = f"generating {iteration}"
        with Progress(needed * config.responses, title, "response", self.world.is_main, inner=True) as bar:

            def show(at_once: bool = False) -> None:
                if self.world.is_main:
                    counters.show(bar, at_once)

            problems = engine_round.run(work.complete, take_requests, show)
            generate_s = rollout.timeline.end("engine")
            engine_round.wait(rollout.timeline)
            show(at_once=True)
        grading.add_failed(list(problems.items()), config.responses)
        if self.part_sender and not barrier.stopped and not grading.pending:
            self.part_sender.finish(grading, rollout.prompts)
        # Not in the gathers below: a rank may wait here longer than the time-out of an ordinary collective.
        barrier.wait()
        rollout.timeline.end("wait")
        if cut:
            self._leave_out(rollout, cut.postponed(indices, list(problems), self.leads), cut, responses)
        left_out = set(rollout.postponed + rollout.unfinished)
        # All ranks, so that all stop where one source has hardly any verdict.
        self.failures.add(gather_objects(grading.count_verdicts(left_out)))
        self._record_judges(rollout)
        self._record_idle_time(rollout, RankTimes(generate_s, time.perf_counter() - began, len(problems)))
        return grading.responses_without(left_out)

    def _grading(self, rollout: Rollout, counters: RolloutCounters) -> RoundGrading:
        """Return the grading of a round, which sends parts as they are graded where there is a sender."""
        grading = RoundGrading(self.grader, self.processor, self.config, rollout.prompts.rows, counters)
        if self.part_sender:
            grading.after_verdicts = partial(self.part_sender.send_graded, grading, rollout.prompts)
        return grading

    def _open_queue(self, work: RoundWork, name: str) -> PromptQueue:
        """Open the queue from which this rank's engine takes its prompts of a round."""
        rollout = self.config.rollout
        started_responses = self.config.responses + rollout.extra_responses
        return PromptQueue(work, name, started_responses, rollout.max_num_seqs, self.replicas, self.engine.agree)

    def _cut(self, name: str, needed: int, continues: bool) -> RoundCut:
        """Return the cut of a round that trains on ``needed`` prompts; ``continues``: the next one goes on with it."""
        token_counts = self.engine.token_counts if continues and self.leads else None
        return RoundCut(name, needed, self.replica, self.replicas, token_counts)

    def _version_of(self, iteration: int) -> int:
        """Return the iteration whose weights the engine has in the round of ``iteration``."""
        return iteration if self.version is None else self.version

    def _leave_out(self, rollout: Rollout, prompts: list[int], cut: RoundCut, round_responses: RoundResponses) -> None:
        """Leave ``prompts`` to a later round, and keep what there is of their responses where that round goes on."""
        if rollout.restarted is None:
            rollout.postponed = prompts
            return
        rollout.unfinished = prompts
        groups = {}
        if self.leads:
            groups = round_responses.unfinished(prompts, cut.unfinished_counts())
        queue_position = {prompt: position for position, prompt in enumerate(prompts)}
        # Replaced at the end of the round alone: a checkpoint of a run that stops within it has the groups before it.
        self.unfinished.groups = {queue_position[prompt]: group for prompt, group in groups.items()}

    def _engine_prompts(self, indices: Sequence[int], rollout: Rollout, iteration: int) -> list[tuple[int, Prompt]]:
        """Return each of the prompts ``indices`` as the engine takes it, with seeds and length limit."""
        config = self.config
        rollout.prompts.encode(indices)  # together, so that their images are processed in one batch
        prompts = []
        for i in indices:
            sample = rollout.prompts.sample(i)
            extra = config.rollout.extra_responses
            seeds = seeds_of(config.run.seed, iteration, i, config.responses + extra)
            response_limit = rollout.limit - len(sample)
            sampling = Sampling(config.rollout.temperature, response_limit, self.endless)
            prompt = Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, sampling)
            if extra:
                prompt = replace(prompt, enough=config.responses)
            prompts.append((i, prompt))
        return prompts

    def _record_judges(self, rollout: Rollout) -> None:
        """Add what judges were asked and how they replied to the metrics of ``rollout``.  A collective."""
        if not self.config.reward.judges:
            return
        for counts in gather_objects(self.grader.take_judge_counts()):
            for name, value in counts.items():
                key = f"grading/judge_{name}"
                rollout.metrics[key] = rollout.metrics.get(key, 0.0) + value

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
