"""Prompts of an iteration to graded responses on the ranks that train on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.data.schema import Row
from ovr_megatron.ppo.batch import Response, seeds_of
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.rollout.engine import Prompt, RolloutEngine
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.progress import Progress


class Prompts:
    """The prompts of an iteration; each is encoded once, on the ranks that need it."""

    def __init__(self, rows: Sequence[Row], processor: Processor):
        self.rows, self.processor = rows, processor
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


def collect(
    engine: RolloutEngine,
    grader: GraderPool,
    prompts: Prompts,
    config: RLConfig,
    iteration: int,
    limit: int,
    world: World,
) -> list[Response]:
    """Generate and grade; returns the responses that this data-parallel rank trains on, in prompt order.

    Engine replica r of R answers the prompts i with i mod R = r; data-parallel rank d of D trains on those with
    i mod D = d.  Where the two differ, the graded responses are exchanged.
    """
    replicas = world.size // config.rollout.tp
    replica, leads = divmod(world.rank, config.rollout.tp)
    mine = range(replica, len(prompts.rows), replicas)
    prompts.encode(mine)
    answered = generate(engine, prompts, mine, config, iteration, limit)
    if leads == 0:
        grade(grader, prompts, answered)
    if config.rollout.tp == config.parallel.ranks == 1:
        return answered
    everywhere: list[list[Response]] = [[] for _ in range(world.size)]
    dist.all_gather_object(everywhere, answered if leads == 0 else [])
    graded = [r for part in everywhere for r in part if r.prompt % world.dp_size == world.dp_rank]
    prompts.encode(sorted({r.prompt for r in graded}))
    return sorted(graded, key=lambda r: r.prompt)


def generate(
    engine: RolloutEngine, prompts: Prompts, mine: Sequence[int], config: RLConfig, iteration: int, limit: int
) -> list[Response]:
    """``config.responses`` responses to each prompt of ``mine``, at most ``limit`` tokens with the prompt."""
    requests = []
    for i in mine:
        sample = prompts.sample(i)
        seeds = seeds_of(config.run.seed, iteration, i, config.responses)
        requests.append(Prompt(sample.prompt_tokens, sample.images, sample.videos, seeds, limit - len(sample)))
    responses = []
    total = len(requests) * config.responses
    with Progress(total, f"generating {iteration}", "response", dist.get_rank() == 0, inner=True) as bar:
        answered = engine.generate(requests, config.rollout.temperature, bar.update)
    for i, answers in zip(mine, answered, strict=True):
        for answer in answers:
            text = prompts.processor.decode(answer.tokens)
            responses.append(Response(i, answer.tokens, np.asarray(answer.logprobs), answer.stopped, text))
    return responses


def grade(grader: GraderPool, prompts: Prompts, responses: Sequence[Response]) -> None:
    """Fill in rewards: 1 if the last box matches the reference; a response that did not stop by itself gets 0."""
    stopped = [r for r in responses if r.stopped]
    requests = [
        GradeRequest(r.text, prompts.rows[r.prompt].answer or "", prompts.rows[r.prompt].options) for r in stopped
    ]
    for r in responses:
        r.verdict = "not finished"
    for r, verdict in zip(stopped, grader.grade(requests), strict=True):
        r.reward, r.verdict = float(verdict.correct), verdict.reason
