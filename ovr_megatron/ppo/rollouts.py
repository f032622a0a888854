"""Prompts of an iteration to graded responses on the ranks that train on them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist

from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.data.schema import Row
from ovr_megatron.ppo.batch import Response, balance_prompts, seeds_of
from ovr_megatron.rewards.failures import FailureWatch, VerdictCounts, count_verdicts
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Verdict
from ovr_megatron.rewards.rules import is_plain
from ovr_megatron.rollout.engine import Generation, Prompt, RolloutEngine
from ovr_megatron.rollout.sampling import RolloutError
from ovr_megatron.runtime.distributed import World, default_store
from ovr_megatron.runtime.exchange import exchange
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.stop import StopRequest
from ovr_megatron.runtime.work_barrier import WorkBarrier


class Prompts:
    """The prompts of an iteration; each is encoded once, on the ranks that need it."""

    def __init__(self, rows: Sequence[Row], processor: Processor):
        self.rows, self.processor = list(rows), processor
        self._samples: dict[int, Sample] = {}

    def sample(self, i: int) -> Sample:
        """Prompt ``i`` as a sample."""
        self.encode([i])
        return self._samples[i]

    def encode(self, wanted: Sequence[int]) -> None:
        """Encode those of ``wanted`` that are not yet, their images in one batch."""
        new = [i for i in wanted if i not in self._samples]
        encoded = self.processor.encode([self.rows[i] for i in new], generation=True) if new else []
        self._samples.update(zip(new, encoded, strict=True))


@dataclass
class Rollout:
    """What the engines made of an iteration's prompts.

    ``responses`` are those that this rank's engine gave (none on the followers of a tensor-parallel group), and
    ``kept`` the prompts to train on, the same on all ranks, with the tokens of all their responses together.
    """

    prompts: Prompts
    limit: int
    responses: list[Response] = field(default_factory=list)
    kept: dict[int, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Rollouts:
    """Has prompts answered by the engines of all ranks, and the answers graded while others are still being made.

    With ``endless`` set every response is as long as the limit allows, as a rehearsal wants it.  With ``stop`` set
    generation is left when a signal comes, on any rank.
    """

    endless = False
    stop: StopRequest | None = None

    def __init__(
        self, engine: RolloutEngine, grader: GraderPool, processor: Processor, config: RLConfig, world: World
    ) -> None:
        self.engine, self.grader, self.processor, self.config, self.world = engine, grader, processor, config, world
        self.replicas = world.size // config.rollout.tp
        self.replica, follower = divmod(world.rank, config.rollout.tp)
        self.leads = follower == 0
        self.failures = FailureWatch(config.reward.rules)

    def collect(self, draw: Callable[[int], list[Row]], iteration: int, limit: int) -> Rollout:
        """Draw prompts and answer them; with ``algorithm.dynamic_sampling``, until enough have unequal rewards.

        Where even its last round leaves too few, prompts with equal rewards fill the batch up: they change nothing
        but the number of tokens by which losses are divided.

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
        rollout = Rollout(Prompts([], self.processor), limit)
        unequal: list[int] = []
        tokens: dict[int, int] = {}
        for turn in range(max(config.algorithm.dynamic_sampling, 1)):
            first = len(rollout.prompts.rows)
            rollout.prompts.rows += draw(config.prompts)
            numbers = range(first, len(rollout.prompts.rows))
            found = self._answer(rollout, numbers, iteration, f"{iteration}.{turn}")
            told = self._tell(found, rollout)
            rollout.responses += found
            tokens |= {i: count for i, (count, _) in told.items()}
            unequal += [i for i, (_, differs) in told.items() if differs]
            if not config.algorithm.dynamic_sampling or len(unequal) >= config.prompts:
                break
        if len(tokens) * 2 <= len(rollout.prompts.rows):
            problems = {r.verdict for r in rollout.responses if not r.rewarded}
            raise RolloutError(
                f"{len(tokens)} of {len(rollout.prompts.rows)} prompts were answered and graded: {problems}"
            )
        order = unequal + [i for i in tokens if i not in set(unequal)] if config.algorithm.dynamic_sampling else tokens
        rollout.kept = {i: tokens[i] for i in sorted(list(order)[: config.prompts])}
        if config.algorithm.dynamic_sampling:
            rollout.metrics["data/drawn_prompts"] = len(rollout.prompts.rows)
            rollout.metrics["data/unequal_prompts"] = len(unequal) / len(rollout.prompts.rows)
        return rollout

    def _tell(self, found: Sequence[Response], rollout: Rollout) -> dict[int, tuple[int, bool]]:
        """For each answered and graded prompt of all ranks the tokens to train on, and whether its rewards differ."""
        mine = {}
        for i, group in by_prompt(found).items():
            if all(r.rewarded for r in group):
                own = len(rollout.prompts.sample(i))
                mine[i] = (sum(own + len(r.tokens) for r in group), len({r.reward for r in group}) > 1)
        everyone: list[dict[int, tuple[int, bool]]] = [{} for _ in range(self.world.size)]
        dist.all_gather_object(everyone, mine if self.leads else {})
        together = {i: told for part in everyone for i, told in part.items()}
        return dict(sorted(together.items()))

    def _answer(self, rollout: Rollout, numbers: Sequence[int], iteration: int, name: str) -> list[Response]:
        """This engine's share of the prompts ``numbers``, graded; ``name`` is that of the queue."""
        config, prompts, limit = self.config, rollout.prompts, rollout.limit
        began = time.perf_counter()
        found: dict[tuple[int, int], Response] = {}
        queue = self._queue(numbers, name)
        tally = Tally(f"tally/{name}")
        work = WorkBarrier(name, self.stop)
        graded: list[tuple[str, Verdict]] = []
        total = len(numbers) * config.responses

        def take(outstanding: int) -> list[tuple[int, Prompt]]:
            mine = queue(outstanding)
            prompts.encode(mine)
            return [(i, self._prompt(prompts.sample(i), iteration, i, limit)) for i in mine]

        def finished(number: int, answers: list[Generation]) -> None:
            if not self.leads:
                return
            for k, answer in enumerate(answers):
                text = self.processor.decode(answer.tokens)
                found[number, k] = Response(number, k, answer.tokens, answer.logprobs, answer.stopped, text)
                self._submit(found[number, k], prompts.rows[number])
            tally.add(len(answers), sum(len(answer.tokens) for answer in answers))

        with Progress(total, f"generating {iteration}", "response", self.world.is_main, inner=True) as bar:

            def between() -> bool:
                if self.leads:
                    graded.extend(self._settled(found, prompts.rows, self.grader.collect(wait=False), tally))
                if self.world.is_main:
                    tally.show(bar)
                return work.engine_step(self.engine.agree)

            failed = self.engine.answer(take, finished, config.rollout.temperature, between)
            spent = time.perf_counter() - began
            while self.leads and self.grader.pending and not work.stop_asked():
                graded += self._settled(found, prompts.rows, self.grader.collect(), tally)
                work.step()
            if self.world.is_main:
                tally.show(bar, at_once=True)
        work.wait()
        for number, problem in failed if self.leads else ():
            for k in range(config.responses):
                found[number, k] = _given_up(number, k, problem)
        self._watch_failures(graded)
        self._note_tail(rollout, spent, time.perf_counter() - began, len(failed) if self.leads else 0)
        return [found[key] for key in sorted(found)]

    def _prompt(self, sample: Sample, iteration: int, number: int, limit: int) -> Prompt:
        seeds = seeds_of(self.config.run.seed, iteration, number, self.config.responses)
        return Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, limit - len(sample), self.endless)

    def _queue(self, numbers: Sequence[int], name: str) -> Callable[[int], list[int]]:
        """What this engine is to answer next, given how many responses it still works on.

        ``static``: replica r of R answers every R-th prompt from the r-th, all of them at once.  ``shared``: each takes
        the next prompt from one queue whenever it has room, so that one with short answers takes more of them.  That
        the queue is empty is remembered: asking costs a message to the store and a broadcast before each decoding step.
        """
        if self.config.rollout.schedule == "static":
            mine = list(numbers[self.replica :: self.replicas])

            def all_at_once(outstanding: int) -> list[int]:
                taken, mine[:] = mine[:], []
                return taken

            return all_at_once
        counter = default_store(f"queue/{name}")
        is_empty = False

        def next_one(outstanding: int) -> list[int]:
            nonlocal is_empty
            taken: list[int] = []
            while not is_empty and outstanding + len(taken) * self.config.responses < self.config.rollout.max_num_seqs:
                index = self.engine.agree(lambda: counter.add("next", 1) - 1)
                is_empty = index >= len(numbers)
                if not is_empty:
                    taken.append(numbers[index])
            return taken

        return next_one

    def _submit(self, response: Response, row: Row) -> None:
        """Have ``response`` graded; one that did not stop by itself gets 0 and costs the graders nothing."""
        response.verdict = "not finished"
        if response.stopped:
            thinking = self.config.data.template == "think"
            request = GradeRequest(response.text, row.answer or "", row.options, self._rule(row.source), thinking)
            self.grader.submit((response.prompt, response.sample), request)

    def _settled(
        self, found: Mapping[tuple[int, int], Response], rows: Sequence[Row], verdicts: Iterable[tuple], tally: Tally
    ) -> list[tuple[str, Verdict]]:
        """Write ``verdicts`` into their responses and return them, each with the source of its row."""
        graded = []
        for key, verdict in verdicts:
            source = rows[key[0]].source
            graded.append((source, verdict))
            tally.reward(_settle(found[key], verdict, self._rule(source)))
        return graded

    def _rule(self, source: str) -> str:
        """The rule by which responses to rows of ``source`` are graded."""
        return self.config.reward.rules.get(source, "auto")

    def _watch_failures(self, graded: Sequence[tuple[str, Verdict]]) -> None:
        """Count what failed on all ranks, a collective, so that all stop where one source has hardly any verdict."""
        everyone: list[dict[str, VerdictCounts]] = [{} for _ in range(self.world.size)]
        dist.all_gather_object(everyone, count_verdicts(graded))
        self.failures.add(everyone)

    def _note_tail(self, rollout: Rollout, spent: float, graded: float, failed: int) -> None:
        """How long engines waited for the last one, how long grading took after it, and how many prompts failed."""
        everyone: list[tuple[float, float, int]] = [(0.0, 0.0, 0)] * self.world.size
        dist.all_gather_object(everyone, (spent, graded, failed))
        last = max(one for one, _, _ in everyone)
        metrics = rollout.metrics
        for key, value in {
            "timing/rollout_idle": sum(last - one for one, _, _ in everyone) / self.world.size,
            "timing/grade_after": max(max(whole for _, whole, _ in everyone) - last, 0.0),
            "response/failed_prompts": float(sum(count for _, _, count in everyone)),
        }.items():
            metrics[key] = metrics.get(key, 0.0) + value


def _given_up(prompt: int, sample: int, problem: str) -> Response:
    """Return what stands for a response of a prompt that the engine gave up."""
    nothing = np.zeros(0, np.float32)
    return Response(prompt, sample, [], nothing, False, "", verdict=f"failed: {problem}", rewarded=False)


def _settle(response: Response, verdict: Verdict, rule: str) -> float:
    """Write ``verdict``, made by ``rule``, into its response; returns the reward.

    An expression that two graders cannot finish is no right answer, but of a user's function that fails nothing is
    known, so that there is no reward.
    """
    response.reward, response.verdict, response.failed = verdict.reward, verdict.reason, verdict.failed
    if verdict.failed and not is_plain(rule):
        response.rewarded = False
        response.verdict = ": ".join(filter(None, (verdict.reason, verdict.box)))
    return response.reward


class Tally:
    """What all engines have done so far, counted where every rank can read it."""

    def __init__(self, name: str) -> None:
        self._store = default_store(name)
        self._next_look = 0.0

    def add(self, responses: int, tokens: int) -> None:
        """Count finished responses and their tokens."""
        self._store.add("responses", responses)
        self._store.add("tokens", tokens)

    def reward(self, total: float) -> None:
        """Count rewards, to a thousandth."""
        if total:
            self._store.add("reward", round(1000 * total))

    def show(self, bar: Progress, at_once: bool = False) -> None:
        """Move ``bar`` on to what is finished, with the mean reward and length so far: once a second, or ``at_once``.

        A decoding step takes some 20 ms, and every question to the store a part of one.
        """
        if time.monotonic() < self._next_look and not at_once:
            return
        self._next_look = time.monotonic() + 1.0
        done = self._store.add("responses", 0)
        if done > bar.done:
            reward, tokens = self._store.add("reward", 0) / 1000, self._store.add("tokens", 0)
            bar.update(done - bar.done, reward=f"{reward / done:.3f}", length=f"{tokens / done:.0f}")


def by_prompt(responses: Iterable[Response]) -> dict[int, list[Response]]:
    """The responses to each prompt."""
    groups: dict[int, list[Response]] = defaultdict(list)
    for r in responses:
        groups[r.prompt].append(r)
    return groups


def share(rollout: Rollout, dp_rank: int, dp_size: int) -> list[Response]:
    """The responses that this rank trains on as ``dp_rank`` of ``dp_size``, a collective; in order of their prompts.

    All responses to a prompt go to the same ranks, and every rank gets equally many tokens as nearly as whole prompts
    allow.
    """
    owner = balance_prompts(rollout.kept, dp_size)
    places: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(places, dp_rank)
    mine = [r for r in rollout.responses if r.prompt in owner]
    arrived = exchange({peer: [r for r in mine if owner[r.prompt] == place] for peer, place in enumerate(places)})
    found = sorted((r for part in arrived for r in part), key=lambda r: (r.prompt, r.sample))
    rollout.prompts.encode(sorted({r.prompt for r in found}))
    return found
