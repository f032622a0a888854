"""Generate the responses of an iteration, grade them, and bring them to the ranks that train on them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from ovr_megatron.config import RLConfig, Sampling
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.data.schema import Row
from ovr_megatron.ppo.batch import Response, balance_prompts, seeds_of
from ovr_megatron.rewards.failures import FailureWatch, VerdictCounts, count_verdicts
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Verdict
from ovr_megatron.rewards.rules import is_plain
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt, RolloutError
from ovr_megatron.runtime.distributed import World, default_store
from ovr_megatron.runtime.exchange import exchange
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.stop import StopRequest
from ovr_megatron.runtime.work_barrier import WorkBarrier


class Prompts:
    """The prompts of an iteration; each is encoded once, on the ranks that need it."""

    def __init__(self, rows: Sequence[Row], processor: Processor):
        self.rows = list(rows)
        self.processor = processor
        self._samples: dict[int, Sample] = {}

    def sample(self, i: int) -> Sample:
        """Return prompt ``i`` as a sample, encoded if it is not yet."""
        self.encode([i])
        return self._samples[i]

    def encode(self, indices: Sequence[int]) -> None:
        """Encode those of the prompts ``indices`` that are not encoded yet, their images in one batch."""
        missing = [i for i in indices if i not in self._samples]
        if missing:
            samples = self.processor.encode([self.rows[i] for i in missing], generation=True)
            self._samples.update(zip(missing, samples, strict=True))


class GroupRewards(NamedTuple):
    """The responses to one prompt, all of them graded.

    Attributes:
        tokens: of all responses, the prompt counted with each.
        differ: whether the rewards are not all the same.
    """

    tokens: int
    differ: bool


@dataclass
class Rollout:
    """The prompts of an iteration with their responses.

    Attributes:
        prompts: all that were drawn, the same on all ranks.
        limit: most tokens of a prompt and its response together.
        responses: those of this rank's engine; none on the followers of a tensor-parallel group.
        train_prompts: the prompts to train on, the same on all ranks, and the tokens of each with all its responses.
        metrics: of generation, the same on all ranks.
    """

    prompts: Prompts
    limit: int
    responses: list[Response] = field(default_factory=list)
    train_prompts: dict[int, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


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

    def collect(self, draw: Callable[[int], list[Row]], iteration: int, limit: int) -> Rollout:
        """Draw prompts, generate and grade; with ``algorithm.dynamic_sampling``, until enough have unequal rewards.

        Where even its last round leaves too few, prompts with equal rewards fill the batch up: they change nothing
        but the number of tokens by which losses are divided.  A collective.

        Args:
            draw: gives the next prompts, the same on every rank.
            iteration: from 0, for the seeds.
            limit: most tokens of a prompt and its response together.

        Raises:
            RolloutError: half of the prompts or more were given up, or have responses without a reward.
            RewardError: nearly all rewards of a source failed.
            StopRequested: on all ranks, as one was asked to stop; what was generated is dropped.
        """
        config = self.config
        dynamic_sampling = config.algorithm.dynamic_sampling
        rollout = Rollout(Prompts([], self.processor), limit)
        rows = rollout.prompts.rows
        tokens: dict[int, int] = {}
        unequal: list[int] = []
        for sampling_round in range(max(dynamic_sampling, 1)):
            first = len(rows)
            rows += draw(config.prompts)
            responses = self._generate(rollout, range(first, len(rows)), iteration, f"{iteration}.{sampling_round}")
            rollout.responses += responses
            for prompt, group in self._group_rewards(responses, rollout).items():
                tokens[prompt] = group.tokens
                if group.differ:
                    unequal.append(prompt)
            # All ranks have gathered the same groups, so that they leave the loop in the same round.
            if not dynamic_sampling or len(unequal) >= config.prompts:
                break
        if len(tokens) * 2 <= len(rows):
            problems = {r.verdict for r in rollout.responses if not r.rewarded}
            raise RolloutError(f"{len(tokens)} of {len(rows)} prompts were answered and graded: {problems}")
        order = list(tokens)
        if dynamic_sampling:
            order = unequal + [i for i in tokens if i not in set(unequal)]
            rollout.metrics["data/drawn_prompts"] = len(rows)
            rollout.metrics["data/unequal_prompts"] = len(unequal) / len(rows)
        # By index again: in `order` those with equal rewards come last.
        rollout.train_prompts = {i: tokens[i] for i in sorted(order[: config.prompts])}
        return rollout

    def _group_rewards(self, responses: Sequence[Response], rollout: Rollout) -> dict[int, GroupRewards]:
        """Gather the groups of all ranks whose responses are all graded, by prompt.  A collective."""
        local_groups = {}
        for prompt, group in group_by_prompt(responses).items():
            if all(r.rewarded for r in group):
                prompt_tokens = len(rollout.prompts.sample(prompt))
                total_tokens = sum(prompt_tokens + len(r.tokens) for r in group)
                distinct_rewards = {r.reward for r in group}
                local_groups[prompt] = GroupRewards(total_tokens, len(distinct_rewards) > 1)
        ranks: list[dict[int, GroupRewards]] = [{} for _ in range(self.world.size)]
        # Every rank takes part, also the followers of an engine, which have no responses.
        dist.all_gather_object(ranks, local_groups if self.leads else {})
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
            name: of the queue, unique in the run.
        """
        config = self.config
        prompts = rollout.prompts
        began = time.perf_counter()
        responses: dict[tuple[int, int], Response] = {}
        queue = self._open_queue(indices, name)
        counters = RolloutCounters(f"counters/{name}")
        barrier = WorkBarrier(name, self.stop)
        graded: list[tuple[str, Verdict]] = []

        def take(outstanding: int) -> list[tuple[int, Prompt]]:
            batch = queue(outstanding)
            prompts.encode(batch)  # together, so that their images are processed in one batch
            return [(i, self._engine_prompt(prompts.sample(i), iteration, i, rollout.limit)) for i in batch]

        def on_result(prompt: int, generations: list[Generation]) -> None:
            if not self.leads:  # the ranks of an engine have the same responses
                return
            for k, generation in enumerate(generations):
                text = self.processor.decode(generation.tokens)
                response = Response(prompt, k, generation.tokens, generation.logprobs, generation.stopped, text)
                responses[prompt, k] = response
                self._submit(response, prompts.rows[prompt])
            counters.add(len(generations), sum(len(generation.tokens) for generation in generations))

        total = len(indices) * config.responses
        with Progress(total, f"generating {iteration}", "response", self.world.is_main, inner=True) as bar:

            def between_steps() -> bool:
                if self.leads:
                    verdicts = self.grader.collect(wait=False)
                    graded.extend(self._write_verdicts(responses, prompts.rows, verdicts, counters))
                if self.world.is_main:
                    counters.show(bar)
                return barrier.engine_step(self.engine.agree)

            failed = self.engine.answer(take, on_result, between_steps)
            generate_s = time.perf_counter() - began
            # Every verdict is reported as a step, so that the ranks that wait at the barrier see this one work.
            while self.leads and self.grader.pending and not barrier.stop_asked():
                graded += self._write_verdicts(responses, prompts.rows, self.grader.collect(), counters)
                barrier.step()
            if self.world.is_main:
                counters.show(bar, at_once=True)
        # Not in the gathers below: a rank may wait here longer than the time-out of an ordinary collective.
        barrier.wait()
        failed_prompts = failed if self.leads else []  # the followers of an engine have the same list
        responses |= _failed_responses(failed_prompts, config.responses)
        self._watch_failures(graded)
        self._record_idle_time(rollout, generate_s, time.perf_counter() - began, len(failed_prompts))
        # By prompt and sample, so that the order does not depend on which response ended first.
        return [responses[key] for key in sorted(responses)]

    def _engine_prompt(self, sample: Sample, iteration: int, index: int, limit: int) -> Prompt:
        seeds = seeds_of(self.config.run.seed, iteration, index, self.config.responses)
        sampling = Sampling(self.config.rollout.temperature, limit - len(sample), self.endless)
        return Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, sampling)

    def _open_queue(self, indices: Sequence[int], name: str) -> Callable[[int], list[int]]:
        """Return a function that gives the engine's next prompts for the number of responses it still works on.

        ``static``: replica r of R answers every R-th prompt from the r-th, all of them at once.  ``shared``: each takes
        the next prompt from one queue whenever it has capacity, so that one with short responses takes more of them.
        """
        if self.config.rollout.schedule == "static":
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
            while not is_empty and outstanding + len(taken) * self.config.responses < self.config.rollout.max_num_seqs:
                # Asked by the leader alone: the ranks of an engine must take the same prompts.
                position = self.engine.agree(lambda: counter.add("next", 1) - 1)
                is_empty = position >= len(indices)
                if not is_empty:
                    taken.append(indices[position])
            return taken

        return take_next

    def _submit(self, response: Response, row: Row) -> None:
        """Have ``response`` graded; one that did not stop by itself gets 0 and costs the graders nothing."""
        response.verdict = "not finished"
        if response.stopped:
            thinking = self.config.data.template == "think"
            request = GradeRequest(response.text, row.answer or "", row.options, self._rule_for(row.source), thinking)
            self.grader.submit((response.prompt, response.sample), request)

    def _write_verdicts(
        self,
        responses: Mapping[tuple[int, int], Response],
        rows: Sequence[Row],
        verdicts: Iterable[tuple[Any, ...]],
        counters: RolloutCounters,
    ) -> list[tuple[str, Verdict]]:
        """Write ``verdicts`` into their responses and return them, each with the source of its row."""
        graded = []
        for key, verdict in verdicts:
            source = rows[key[0]].source
            graded.append((source, verdict))
            counters.add_reward(_write_verdict(responses[key], verdict, self._rule_for(source)))
        return graded

    def _rule_for(self, source: str) -> str:
        """Return the rule by which responses to rows of ``source`` are graded."""
        return self.config.reward.rules.get(source, "auto")

    def _watch_failures(self, graded: Sequence[tuple[str, Verdict]]) -> None:
        """Count what failed on all ranks, so that all stop where one source has hardly any verdict.  A collective."""
        counts: list[dict[str, VerdictCounts]] = [{} for _ in range(self.world.size)]
        dist.all_gather_object(counts, count_verdicts(graded))
        self.failures.add(counts)

    def _record_idle_time(self, rollout: Rollout, generate_s: float, total_s: float, failed_prompts: int) -> None:
        """Add what the ranks waited for, and how many prompts failed, to the metrics of ``rollout``.  A collective.

        ``timing/rollout_idle`` is the mean time that engines waited for the last one, ``timing/grade_after`` the time
        from there to the last verdict.

        Args:
            rollout: gets the metrics; those of several rounds are summed.
            generate_s: seconds until this rank's engine was done.
            total_s: seconds until its responses were graded and all ranks done.
            failed_prompts: prompts that this rank's engine gave up.
        """
        ranks: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * self.world.size
        dist.all_gather_object(ranks, (generate_s, total_s, failed_prompts))
        generate_times = [rank[0] for rank in ranks]
        total_times = [rank[1] for rank in ranks]
        last = max(generate_times)
        idle_s = sum(last - seconds for seconds in generate_times)
        all_failed_prompts = sum(rank[2] for rank in ranks)
        values = {
            "timing/rollout_idle": idle_s / self.world.size,
            "timing/grade_after": max(max(total_times) - last, 0.0),
            "response/failed_prompts": float(all_failed_prompts),
        }
        for key, value in values.items():
            rollout.metrics[key] = rollout.metrics.get(key, 0.0) + value


def _failed_responses(failed: Sequence[tuple[int, str]], count: int) -> dict[tuple[int, int], Response]:
    """Return ``count`` responses without tokens and reward for each prompt (and problem) that the engine gave up."""
    responses = {}
    for prompt, problem in failed:
        for sample in range(count):
            no_logprobs = np.zeros(0, np.float32)
            responses[prompt, sample] = Response(
                prompt, sample, [], no_logprobs, False, "", verdict=f"failed: {problem}", rewarded=False
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
        response.verdict = ": ".join(filter(None, (verdict.reason, verdict.box)))
    return response.reward


class RolloutCounters:
    """Responses, tokens and rewards of all engines so far, in a store that every rank can read."""

    def __init__(self, name: str) -> None:
        self._store = default_store(name)
        self._next_update = 0.0

    def add(self, responses: int, tokens: int) -> None:
        """Count finished responses and their tokens."""
        self._store.add("responses", responses)
        self._store.add("tokens", tokens)

    def add_reward(self, reward: float) -> None:
        """Count a reward, to a thousandth: the store adds integers."""
        if reward:
            self._store.add("reward", round(1000 * reward))

    def show(self, bar: Progress, at_once: bool = False) -> None:
        """Move ``bar`` on to what is finished, with the mean reward and length so far: once a second, or ``at_once``.

        A decoding step takes some 20 ms, and every question to the store a part of one.
        """
        if time.monotonic() < self._next_update and not at_once:
            return
        self._next_update = time.monotonic() + 1.0
        finished = self._store.add("responses", 0)  # adding 0 reads
        if finished > bar.done:
            reward = self._store.add("reward", 0) / 1000
            tokens = self._store.add("tokens", 0)
            bar.update(finished - bar.done, reward=f"{reward / finished:.3f}", length=f"{tokens / finished:.0f}")


def group_by_prompt(responses: Iterable[Response]) -> dict[int, list[Response]]:
    """Group responses by the index of their prompt."""
    groups: dict[int, list[Response]] = defaultdict(list)
    for r in responses:
        groups[r.prompt].append(r)
    return groups


def exchange_responses(rollout: Rollout, dp_rank: int, dp_size: int) -> list[Response]:
    """Send responses to the ranks that train on them, and return this rank's, in order of their prompts.

    All responses to a prompt go to the same data-parallel rank, and every rank gets equally many tokens as nearly as
    this allows.  A collective of all ranks; ranks of the same ``dp_rank`` get the same responses.

    Args:
        rollout: has the responses of this rank's engine; the prompts of those that arrive are encoded.
        dp_rank: of this rank, in the layout of the model that trains.
        dp_size: data-parallel size of that layout.
    """
    # By prompt and not by response: group baselines compare the responses to a prompt on one rank.
    dp_rank_of_prompt = balance_prompts(rollout.train_prompts, dp_size)
    dp_ranks: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(dp_ranks, dp_rank)
    local_responses = [r for r in rollout.responses if r.prompt in dp_rank_of_prompt]
    outgoing = {}
    for peer, peer_dp_rank in enumerate(dp_ranks):
        outgoing[peer] = [r for r in local_responses if dp_rank_of_prompt[r.prompt] == peer_dp_rank]
    responses = list(chain.from_iterable(exchange(outgoing)))
    # They come by rank of the sender, which changes with the number of engines and with who was free first.
    responses.sort(key=lambda r: (r.prompt, r.sample))
    prompt_indices = {r.prompt for r in responses}
    rollout.prompts.encode(sorted(prompt_indices))
    return responses
