"""Iterations of reinforcement learning in each way of generating, simulated: seconds, idle shares, gain.

Engines decode by `ovr_megatron.plan.decoding`; a response is graded as soon as it ends; training takes the plan's
seconds a token.  All ways see the same prompts in the same order, and a prompt that is generated again has the same
lengths again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ovr_megatron.config import ConfigError, RLConfig
from ovr_megatron.plan import cost
from ovr_megatron.plan.decoding import decode_rates
from ovr_megatron.plan.lengths import LengthSource, LogNormalLengths, MeasuredLengths, read_lengths
from ovr_megatron.plan.memory import cache_bytes_per_token, engine_memory
from ovr_megatron.plan.modes import Mode, Setup, SimulatedRound, generate
from ovr_megatron.plan.plan_json import PlannedMode, PlannedRound, PlannedSimulation
from ovr_megatron.plan.scenario import Scenario, Span

ITERATIONS = 4  # of ways in which every iteration begins anew
_STEADY_ITERATIONS = 8  # the same where prompts go over from one iteration to a later one
_SHOWN_ROUNDS = 3  # of the timeline
_PROMPT_SHARE = 8  # a prompt takes an eighth of the mean of prompt and response, where none is measured
_VERDICT_S = 0.0003  # of a worker: docs/algorithms.md, "What an iteration costs"
_STREAM_PARTS = 8  # where the recipe has no value
OVERSAMPLE = (0.25, 0.5, 1.0)
STALENESS = (1, 2)


@dataclass(frozen=True)
class SimulationOptions:
    """What is simulated; empty sequences stand for the recipe's values, or for some to choose from.

    Attributes:
        lengths: as `source_of` takes it.
        oversample: values of ``rollout.oversample``.
        staleness: values of ``rollout.max_staleness`` with ``rollout.oversample``; with ``rollout.ranks`` those above
            1, and without oversampling 0 and 1.
        generators: values of ``rollout.ranks``.
    """

    lengths: str = ""
    oversample: Sequence[float] = ()
    staleness: Sequence[int] = ()
    generators: Sequence[int] = ()


def simulate(scenario: Scenario, options: SimulationOptions) -> PlannedSimulation:
    """Simulate iterations of the curriculum's last stage in every way of generating.

    Raises:
        ConfigError: the run generates nothing, the lengths cannot be read, or an option is impossible.
    """
    config = scenario.config
    if not isinstance(config, RLConfig):
        raise ConfigError("--simulate: supervised training generates nothing; give a recipe of reinforcement learning")
    if not config.generates:
        raise ConfigError(f"--simulate: only={config.only} generates nothing; leave one of the two out")
    span = scenario.spans[-1]
    lengths = source_of(options.lengths, config, span)
    setup = _setup(scenario, span, lengths)
    modes = _modes(config, scenario.world, options)
    planned: list[PlannedMode] = []
    rounds_of_generators: dict[int, list[SimulatedRound]] = {}
    for mode in modes:
        if mode.generators and not mode.oversample:
            # How far generation runs ahead changes when a round begins, and nothing within it.
            if mode.generators not in rounds_of_generators:
                rounds_of_generators[mode.generators] = list(generate(setup, mode, _iterations(mode)))
            rounds = rounds_of_generators[mode.generators]
        else:
            rounds = list(generate(setup, mode, _iterations(mode)))
        planned.append(summarise_mode(setup, mode, rounds))
    shared = next(mode["iteration_s"] for mode in planned if mode["name"] == Mode("shared").name)
    for mode_summary in planned:
        mode_summary["gain"] = shared / mode_summary["iteration_s"]
    rates = setup.rates
    return {
        "lengths": lengths.basis,
        "limit": span.limit,
        "prompts": setup.prompts,
        "responses": config.responses,
        "slots": setup.slots,
        "tp": setup.tp,
        "rates": {
            "step_s": rates.step_s,
            "sequence_s": rates.sequence_s,
            "context_s": rates.context_s,
            "prefill_s": rates.prefill_s,
        },
        "modes": planned,
    }


def source_of(text: str, config: RLConfig, span: Span) -> LengthSource:
    """Return the lengths that ``--lengths`` names.

    Args:
        text: a file or run folder (`ovr_megatron.plan.lengths.read_lengths`); ``MEAN:LONGEST`` tokens of log-normal
            responses; empty: log-normal by the recipe's mean and limit.
        config: the recipe.
        span: iterations that are simulated.
    """
    prompt_tokens = max(1, min(round(span.load.tokens / _PROMPT_SHARE), config.data.max_prompt_tokens))
    mean = span.load.tokens - prompt_tokens
    longest = span.limit - prompt_tokens
    numbers = text.split(":")
    if text and not (len(numbers) == 2 and all(number.isdecimal() for number in numbers)):
        groups, measured_prompt = read_lengths(Path(text))
        responses = sum(map(len, groups))
        measured_mean = sum(map(sum, groups)) / responses
        basis = f"{responses:,} responses of {text}, mean {measured_mean:,.0f} tokens"
        prompt_tokens = measured_prompt or prompt_tokens
        return MeasuredLengths(groups, config.responses, prompt_tokens, span.limit, config.run.seed, basis)
    if text:
        mean = float(numbers[0])
        longest = int(numbers[1])
    if not 1 <= mean < longest:
        raise ConfigError(
            f"--lengths {text or 'of the recipe'}: a mean of {mean:,.0f} tokens and longest responses of {longest:,}; "
            "the mean must be at least 1 and below the longest"
        )
    return LogNormalLengths(mean, longest, config.responses, prompt_tokens, config.run.seed)


def _setup(scenario: Scenario, span: Span, lengths: LengthSource) -> Setup:
    """Return what all ways of generating have in common."""
    config = scenario.config
    assert isinstance(config, RLConfig)
    rollout = config.rollout
    problems = [lengths.problem(index) for index in range(config.prompts)]
    sizes: list[int] = []
    for problem in problems:
        sizes += [problem.prompt_tokens + length for length in problem.lengths]
    tokens = sum(sizes)
    squares = sum(size * size for size in sizes)
    mean_tokens = tokens / len(sizes)
    attended_length = squares / tokens
    load = replace(span.load, tokens=mean_tokens, attended_length=attended_length)
    span = replace(span, load=load)
    parts = cost.seconds(scenario, span).parts
    update_s = parts["sync"] + parts.get("offload", 0.0)
    training_s = sum(parts.values()) - parts["generate"] - update_s
    engine = engine_memory(rollout, scenario.shape, scenario.gpu, config.model.dtype, config.offload)
    cache_tokens = engine["vLLM cache"] / cache_bytes_per_token(scenario.shape, rollout, config.model.dtype)
    return Setup(
        world=scenario.world,
        tp=rollout.tp,
        rates=decode_rates(scenario, span),
        # vLLM would preempt what its cache has no room for; here it does not start.
        slots=max(1, min(rollout.max_num_seqs, int(cache_tokens / mean_tokens))),
        max_num_seqs=rollout.max_num_seqs,
        prompts=config.prompts,
        lengths=lengths,
        train_s=training_s / scenario.tokens(span),
        update_s=update_s,
        workers=config.reward.workers,
        verdict_s=_VERDICT_S,
    )


def _modes(config: RLConfig, world: int, options: SimulationOptions) -> list[Mode]:
    """Return the ways to simulate."""
    rollout = config.rollout
    shares = list(options.oversample)
    if not shares:
        shares = [rollout.oversample] if rollout.oversample else list(OVERSAMPLE)
    staleness = list(options.staleness)
    if not staleness:
        staleness = [rollout.max_staleness] if rollout.continues_responses else list(STALENESS)
    generators = list(options.generators or filter(None, [rollout.ranks]))
    if not generators:
        parts = {world // part // rollout.tp * rollout.tp for part in (4, 2)}
        generators = sorted(ranks for ranks in parts if 0 < ranks < world)
    for ranks in generators:
        if ranks >= world or ranks % rollout.tp:
            raise ConfigError(
                f"--ranks {ranks}: must be below the {world} processes and a multiple of rollout.tp={rollout.tp}"
            )
    stream_parts = rollout.stream_parts
    if not stream_parts and config.learns_in_parts:
        stream_parts = _STREAM_PARTS
    modes = [Mode("static"), Mode("shared")]
    modes += [Mode("shared", share) for share in shares]
    # The share in the middle: more of them would double the table.
    share = shares[len(shares) // 2]
    modes += [Mode("shared", share, staleness=updates) for updates in staleness if updates]
    for ranks in generators:
        modes += [Mode("shared", staleness=updates, generators=ranks) for updates in (0, 1)]
        if stream_parts:
            modes.append(Mode("shared", generators=ranks, parts=stream_parts))
        modes += [Mode("shared", share, staleness=updates, generators=ranks) for updates in staleness if updates > 1]
    return modes


def _iterations(mode: Mode) -> int:
    """Return how many iterations of a way are simulated, whole cycles of short and long rounds where it has any."""
    if mode.continues:
        return _STEADY_ITERATIONS + mode.staleness + 1
    if mode.generators and not mode.oversample:
        return ITERATIONS + 2  # the first two start generation that runs ahead
    if not mode.oversample:
        return ITERATIONS
    cycle = 1 + math.ceil(1 / mode.oversample)
    return cycle * max(2, round(_STEADY_ITERATIONS / cycle))


def summarise_mode(setup: Setup, mode: Mode, rounds: Sequence[SimulatedRound]) -> PlannedMode:
    """Return the means of a way of generating, without iterations that start it or end within a cycle.

    ``gain`` is 1; `simulate` knows the shared queue.
    """
    timeline = _timeline(setup, mode, rounds)
    first = mode.staleness + 1 if mode.staleness or mode.generators else 0
    last = _last_of_cycle(rounds)
    totals: defaultdict[str, float] = defaultdict(float)
    for generated, entry in zip(rounds[first:last], timeline[first:last], strict=True):
        totals["generate_s"] += generated.round.seconds
        totals["idle_s"] += generated.round.idle_s
        totals["engine_s"] += sum(generated.round.engine_s)
        totals["train_s"] += _train_s(setup, mode, generated.tokens) + setup.update_s
        totals["tokens"] += generated.response_tokens
        totals["generated"] += generated.round.generated
        totals["discarded"] += generated.discarded
        # Weights of an earlier update draw all tokens of a round that runs ahead.
        totals["stale"] += generated.response_tokens if entry["updates_behind"] else generated.stale_tokens
    began = timeline[first - 1]["train_end_s"] if first else 0.0
    seconds = timeline[last - 1]["train_end_s"] - began
    busy = totals["engine_s"] * setup.tp + totals["train_s"] * (setup.world - mode.generators)
    count = last - first
    return {
        "name": mode.name,
        "schedule": mode.schedule,
        "oversample": mode.oversample,
        "staleness": mode.staleness,
        "generators": mode.generators,
        "parts": mode.parts,
        "world": setup.world,
        "engines": len(rounds[0].round.engine_s),
        "iterations": count,
        "generate_s": totals["generate_s"] / count,
        "engine_idle": totals["idle_s"] / totals["generate_s"],
        "iteration_s": seconds / count,
        "gpu_idle": 1 - busy / (setup.world * seconds),
        "stale": totals["stale"] / totals["tokens"],
        "discarded": totals["discarded"] / totals["generated"],
        "gain": 1.0,
        "rounds": timeline[max(first, last - _SHOWN_ROUNDS) : last],
    }


def _last_of_cycle(rounds: Sequence[SimulatedRound]) -> int:
    """Return the number of rounds up to the last long one, all of them where none is long."""
    last = len(rounds)
    while any(generated.long for generated in rounds) and not rounds[last - 1].long:
        last -= 1
    return last


def _timeline(setup: Setup, mode: Mode, rounds: Sequence[SimulatedRound]) -> list[PlannedRound]:
    """Return when each round is generated and trained on.

    A round begins when the engines are free and have the weights of the update ``mode.staleness`` before it; without
    ranks that generate only, training takes the place of generation.
    """
    entries: list[PlannedRound] = []
    for index, generated in enumerate(rounds):
        begin = 0.0
        behind = 0
        if entries:
            begin = max(entries[-1]["begin_s"] + rounds[index - 1].round.seconds, entries[-1]["graded_s"])
            awaited = index - 1 - mode.rounds_ahead
            if awaited >= 0:
                begin = max(begin, entries[awaited]["train_end_s"])
            behind = sum(entry["train_end_s"] > begin for entry in entries)
        graded = begin + generated.graded_s
        train_begin = max(graded, entries[-1]["train_end_s"] if entries else 0.0)
        spans = [(train_begin, train_begin + _train_s(setup, mode, generated.tokens))]
        if mode.parts:
            # Without staleness the trainers wait for the first part.
            spans = [(begin + first, begin + last) for first, last in _part_spans(setup, mode, generated)]
        spans[-1] = (spans[-1][0], spans[-1][1] + setup.update_s)
        entries.append(
            {
                "begin_s": begin,
                "engine_end_s": [begin + seconds for seconds in generated.round.engine_s],
                "graded_s": graded,
                "train_begin_s": spans[0][0],
                "train_end_s": spans[-1][1],
                "train_s": spans,
                "updates_behind": behind,
                "long": generated.long,
            }
        )
    return entries


def _train_s(setup: Setup, mode: Mode, tokens: int) -> float:
    """Return the seconds of training on so many tokens of prompts and responses."""
    return tokens * setup.train_s * setup.world / (setup.world - mode.generators)


def _part_spans(setup: Setup, mode: Mode, generated: SimulatedRound) -> list[tuple[float, float]]:
    """Return begin and end of the training on each part, in seconds of the round.

    As `ovr_megatron.ppo.parts`: an engine sends its prompts in the order of its answers; part k is what the k-th
    messages of all engines have.
    """
    positions = sorted(generated.trained)
    answers = generated.round.answers
    prompts_of_part = -(-len(positions) // (len(answers) * mode.parts))
    spans: list[tuple[float, float]] = []
    arrival_s = end_s = 0.0
    for first in range(0, max(map(len, answers)), prompts_of_part):
        tokens = 0
        for engine_answers in answers:
            part = engine_answers[first : first + prompts_of_part]
            for prompt, answer_s in part:
                arrival_s = max(arrival_s, answer_s)
                tokens += setup.problem(positions[prompt]).tokens
        begin_s = max(arrival_s, end_s)
        end_s = begin_s + _train_s(setup, mode, tokens)
        spans.append((begin_s, end_s))
    return spans
