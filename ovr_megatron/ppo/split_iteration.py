"""Run one iteration on the ranks that train, with responses of ranks that only generate."""

from __future__ import annotations

from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import (
    Experience,
    Models,
    build_local_batch,
    compute_experience,
    join_experiences,
)
from ovr_megatron.ppo.generators import Generators
from ovr_megatron.ppo.iteration import Clock, IterationResult, learn, response_metrics
from ovr_megatron.ppo.parts import EnginePart
from ovr_megatron.ppo.prompts import Prompts, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.ppo.sources import source_names
from ovr_megatron.ppo.update import PolicyStep
from ovr_megatron.runtime.exchange import gather_objects
from ovr_megatron.runtime.stop import StopRequested


def iterate_split(
    models: Models,
    generators: Generators,
    prompts: PromptStream,
    iteration: int,
    goes_on: bool,
) -> IterationResult:
    """Run iteration ``iteration`` (from 0) with responses of the generators.  A collective of the trainers.

    ``timing/generate`` is what the trainers waited for responses.

    Args:
        models: those of the trainers.
        generators: the other ranks.
        prompts: the same on every trainer.
        iteration: from 0.
        goes_on: whether the generators may begin to generate ahead before the next call, as they have nothing to
            evaluate.

    Raises:
        StopRequested: a signal came before all responses were received; with parts, also while the gradients of an
            earlier part were computed.
    """
    clock = Clock()
    if models.config.rollout.stream_parts:
        result = learn_in_parts(models, generators, prompts, iteration, clock)
    else:
        with clock("generate"):
            rollout = generators.collect(prompts, iteration)
        result = learn(models, rollout, iteration, clock)
        with clock("generate"):
            generators.wait(iteration)
    with clock("sync"):
        traffic = generators.update(models, iteration + 1)
        if goes_on:
            generators.go_on()
    metrics = result.metrics
    metrics |= traffic.metrics()
    # Again: those of `learn` do not have the seconds of these phases yet.
    metrics |= clock.metrics(result.experience.batch, models.world)
    metrics["perf/generate_tokens_per_second"] *= metrics["timing/generate"] / metrics["timing/rollout"]
    return result


def learn_in_parts(
    models: Models, generators: Generators, prompts: PromptStream, iteration: int, clock: Clock
) -> IterationResult:
    """Add up the gradients of each part of the responses as it comes, and take one step.  A collective.

    Arguments and errors as of `iterate_split`; ``clock`` times the phases.
    """
    config = models.config
    rollout = Rollout(Prompts([], models.processor), max_tokens(config.curriculum, iteration))
    experiences: list[Experience] = []
    with clock("generate"):
        generators.begin(iteration, prompts.state())
        # The same prompts as those of the generators, which report theirs only at the end of the round.
        prompts.restart(range(prompts.unfinished))
        rows, rollout.long = prompts.draw_round(config.prompts, 0.0)
        rollout.prompts.rows += rows
        step = PolicyStep(models, source_names(rows))
    is_last = False
    is_cancelled = False
    while not is_last:
        with clock("generate"):
            engine_part = generators.receive_part()
        is_last = engine_part.is_last
        is_cancelled |= engine_part.is_cancelled
        if is_cancelled:
            continue  # the other parts, too, are only received
        with clock("value"):
            experiences.append(_part_experience(models, rollout, engine_part, iteration))
        with clock("update"):
            step.add(experiences[-1], is_last)
    with clock("generate"):
        received = generators.finish()
    if is_cancelled:
        raise StopRequested  # the request came when the engines had ended
    # By prompt again: parts come in the order of the answers.
    rollout.responses.sort(key=lambda response: (response.prompt, response.sample))
    rollout.train_prompts = dict(sorted(rollout.train_prompts.items()))
    if received.saved.train_prompts != rollout.train_prompts:
        raise RuntimeError(
            f"iteration {iteration}: the received parts have the prompts {sorted(rollout.train_prompts)}, but the "
            f"generators report {sorted(received.saved.train_prompts)}"
        )
    rollout.metrics = received.metrics
    rollout.mixed = dict(received.saved.mixed)
    prompts.observe(prompts.round_positions, rollout.mixed)
    with clock("update"):
        metrics = step.finish()
    experience = join_experiences(models, rollout, experiences)
    metrics = {
        "curriculum/max_tokens": rollout.limit,
        **response_metrics(rollout),
        **metrics,
        **clock.metrics(experience.batch, models.world),
        **rollout.metrics,
    }
    return IterationResult(metrics, rollout, experience, clock.timeline)


def _part_experience(models: Models, rollout: Rollout, engine_part: EnginePart, iteration: int) -> Experience:
    """Add a part to ``rollout``, and compute what the policy learns from it on this rank.  A collective."""
    part_prompts: dict[int, int] = {}
    # Every trainer computes the same balance, so that it needs the tokens of all prompts of the part.
    for tokens in gather_objects(engine_part.tokens):
        part_prompts |= tokens
    part = Rollout(rollout.prompts, rollout.limit, engine_part.responses, dict(sorted(part_prompts.items())))
    rollout.responses += part.responses
    rollout.train_prompts |= part.train_prompts
    responses, batch = build_local_batch(models, part, models.policy)
    experience, _ = compute_experience(models, part, responses, batch, iteration)
    return experience
