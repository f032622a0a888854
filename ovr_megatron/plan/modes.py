"""Ways of generating, simulated iteration by iteration: which prompts a round has, and what of it is trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ovr_megatron.plan.decoding import DecodeRates, Piece, SimulatedEngine
from ovr_megatron.plan.lengths import LengthSource, Problem
from ovr_megatron.plan.rounds import Cut, RoundResult, Schedule, last_verdict, run_round


@dataclass(frozen=True)
class Mode:
    """A way of generating.

    Attributes:
        schedule: ``rollout.schedule``.
        oversample: ``rollout.oversample``.
        staleness: ``rollout.max_staleness``, the most updates between the policy that draws a token and the one that
            learns from it.  Without ``generators`` unfinished responses of an oversampled round continue in the next
            one, instead of beginning anew in a long round; with them generation runs ahead by so many updates.
        generators: ``rollout.ranks``, ranks that generate only, while the others train; 0: every rank does both in
            turn.
    """

    schedule: Schedule
    oversample: float = 0.0
    staleness: int = 0
    generators: int = 0

    @property
    def name(self) -> str:
        """The settings as text."""
        parts = ["static" if self.schedule == "static" else "shared queue"]
        if self.oversample:
            parts.append(f"oversample={self.oversample:g}")
        if self.generators:
            parts.append(f"ranks={self.generators}")
        if self.staleness or self.generators:
            parts.append(f"max_staleness={self.staleness}")
        return ", ".join(parts)

    @property
    def continues(self) -> bool:
        """Whether unfinished responses continue in the next round."""
        return bool(self.staleness and not self.generators)


@dataclass(frozen=True)
class Setup:
    """What is the same for all ways of generating.

    Attributes:
        world: ranks.
        tp: ranks of an engine.
        rates: of an engine.
        slots: responses that an engine runs at once: ``rollout.max_num_seqs``, or fewer where its cache is full.
        max_num_seqs: responses of an engine beyond which it takes no prompt from the shared queue.
        prompts: of an iteration.
        lengths: of the responses.
        train_s: seconds in which all ranks train on a token of prompt or response.
        update_s: seconds of an iteration that do not depend on its tokens: new weights to the engines, offloading.
        workers: graders of an engine.
        verdict_s: seconds of a verdict.
    """

    world: int
    tp: int
    rates: DecodeRates
    slots: int
    max_num_seqs: int
    prompts: int
    lengths: LengthSource
    train_s: float = 0.0
    update_s: float = 0.0
    workers: int = 2
    verdict_s: float = 0.0
    _problems: dict[int, Problem] = field(default_factory=dict, repr=False)  # drawn so far: every way has the same

    def problem(self, index: int) -> Problem:
        """Return prompt ``index`` of the stream."""
        if index not in self._problems:
            self._problems[index] = self.lengths.problem(index)
        return self._problems[index]

    def engines(self, mode: Mode) -> list[SimulatedEngine]:
        """Return the engines of a round."""
        ranks = mode.generators or self.world
        return [SimulatedEngine(self.rates, self.slots) for _ in range(ranks // self.tp)]


@dataclass(frozen=True)
class SimulatedRound:
    """What a round came to, for the iteration that trains on it.

    Attributes:
        round: the simulated engines.
        graded_s: seconds until the last verdict.
        trained: indices of the prompts that are trained on.
        tokens: of these with all their responses, the prompt counted with each.
        response_tokens: of their responses alone.
        stale_tokens: those of the response tokens that earlier rounds generated.
        discarded: tokens of responses that begin anew, and those that were generated after the cut.
        long: whether it is a round of postponed prompts.
    """

    round: RoundResult
    graded_s: float
    trained: Sequence[int]
    tokens: int
    response_tokens: int
    stale_tokens: int = 0
    discarded: int = 0
    long: bool = False


@dataclass
class _Entry:
    """A prompt that is generated: its index, the round in which it began, and the tokens of each response so far."""

    index: int
    problem: Problem
    begun: int
    done: list[int] = field(default_factory=list)

    @property
    def is_answered(self) -> bool:
        return tuple(self.done) == self.problem.lengths

    def pieces(self, position: int) -> list[Piece]:
        """Return what is left of it, as prompt ``position`` of a round."""
        pieces = []
        # The responses to a prompt share its keys and values; after an update these are computed anew.
        prefill = self.problem.prompt_tokens
        for sample, (length, done) in enumerate(zip(self.problem.lengths, self.done, strict=True)):
            if done < length:
                context = self.problem.prompt_tokens + done
                pieces.append(Piece((position, sample), length - done, context, prefill + done))
                prefill = 0
        return pieces


def generate(setup: Setup, mode: Mode, iterations: int) -> Iterator[SimulatedRound]:
    """Yield the rounds of ``iterations`` iterations."""
    if mode.continues:
        yield from _continuing_rounds(setup, mode, iterations)
        return
    drawn = 0
    postponed: list[int] = []
    for iteration in range(iterations):
        # As `PromptStream.draw_round`: a long round as soon as enough prompts wait.
        long = bool(mode.oversample) and len(postponed) >= setup.prompts
        if long:
            indices = postponed[: setup.prompts]
            postponed = postponed[setup.prompts :]
        else:
            count = setup.prompts + math.ceil(setup.prompts * mode.oversample)
            indices = list(range(drawn, drawn + count))
            drawn += count
        entries = [_begin(setup, index, iteration) for index in indices]
        cut = Cut(setup.prompts) if len(entries) > setup.prompts else None
        generated = _run(setup, mode, entries, cut)
        trained = set(generated.trained)
        left_over = [entry for entry in entries if entry.index not in trained]
        postponed += [entry.index for entry in left_over]
        # They begin anew: nothing of them is kept.
        discarded = generated.discarded + sum(sum(entry.done) for entry in left_over)
        yield replace(generated, discarded=discarded, long=long)


def _continuing_rounds(setup: Setup, mode: Mode, iterations: int) -> Iterator[SimulatedRound]:
    """Yield rounds whose unfinished responses go on in the next one, but for those that would become too old.

    These begin anew, before further prompts are drawn.
    """
    drawn = 0
    entries: list[_Entry] = []
    for iteration in range(iterations):
        continued = [e for e in entries if any(e.done) and iteration - e.begun <= mode.staleness]
        continued_indices = {entry.index for entry in continued}
        begun_anew = [entry for entry in entries if entry.index not in continued_indices]
        discarded = sum(sum(entry.done) for entry in begun_anew)
        begins = [entry.index for entry in begun_anew]
        missing = setup.prompts + math.ceil(setup.prompts * mode.oversample) - len(continued) - len(begins)
        begins += range(drawn, drawn + missing)
        drawn += missing
        entries = continued + [_begin(setup, index, iteration) for index in begins]
        answered = frozenset(i for i, entry in enumerate(continued) if entry.is_answered)
        generated = _run(setup, mode, entries, Cut(setup.prompts, answered), len(continued))
        trained = set(generated.trained)
        entries = [entry for entry in entries if entry.index not in trained]
        yield replace(generated, discarded=generated.discarded + discarded)


def _begin(setup: Setup, index: int, iteration: int) -> _Entry:
    problem = setup.problem(index)
    return _Entry(index, problem, iteration, [0] * len(problem.lengths))


def _run(setup: Setup, mode: Mode, entries: Sequence[_Entry], cut: Cut | None, continued: int = 0) -> SimulatedRound:
    """Simulate a round of ``entries``, the first of them ``continued``, and write into them what it generated."""
    groups = [entry.pieces(position) for position, entry in enumerate(entries)]
    done_before = [sum(entry.done) for entry in entries]
    result = run_round(groups, setup.engines(mode), mode.schedule, setup.max_num_seqs, cut, continued)
    for group in groups:
        for piece in group:
            position, sample = piece.key
            entries[position].done[sample] += result.unfinished.get(piece.key, piece.tokens)
    selected = range(len(entries)) if cut is None else result.selected(cut)
    problems = [entries[position].problem for position in selected]
    graded_s = max(last_verdict(ends, setup.workers, setup.verdict_s) for ends in result.end_s)
    return SimulatedRound(
        round=result,
        graded_s=max(graded_s, result.seconds),
        trained=[entries[position].index for position in selected],
        tokens=sum(problem.tokens for problem in problems),
        response_tokens=sum(sum(problem.lengths) for problem in problems),
        stale_tokens=sum(done_before[position] for position in selected),
        # What engines generated after the step of the cut.
        discarded=result.generated - (sum(sum(entry.done) for entry in entries) - sum(done_before)),
    )
