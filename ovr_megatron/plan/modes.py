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
            learns from it.  Unfinished responses of an oversampled round continue in the next one, instead of
            beginning anew in a long round; ``generators`` run ahead by so many updates, or oversampled ones by one.
        generators: ``rollout.ranks``, ranks that generate only, while the others train; 0: every rank does both in
            turn.
        parts: ``rollout.stream_parts``, in which the others train on the responses of a round while it goes on.
    """

    schedule: Schedule
    oversample: float = 0.0
    staleness: int = 0
    generators: int = 0
    parts: int = 0

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
        if self.parts:
            parts.append(f"stream_parts={self.parts}")
        return ", ".join(parts)

    @property
    def rounds_ahead(self) -> int:
        """Updates by which generation runs ahead: ``RolloutConfig.rounds_ahead``."""
        if not self.generators:
            return 0
        return min(self.staleness, 1) if self.oversample else self.staleness

    @property
    def continues(self) -> bool:
        """Whether unfinished responses continue in the next round: ``RolloutConfig.continues_responses``."""
        return self.oversample > 0 and self.staleness > self.rounds_ahead


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
    trained: frozenset[int]
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

    @property
    def tokens_done(self) -> int:
        return sum(self.done)

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
        cut = None
        if len(entries) > setup.prompts:
            cut = Cut(setup.prompts)
        generated = _run(setup, mode, entries, cut)
        discarded = generated.discarded
        for entry in entries:
            if entry.index not in generated.trained:
                postponed.append(entry.index)
                # It begins anew: nothing of it is kept.
                discarded += entry.tokens_done
        yield replace(generated, discarded=discarded, long=long)


def _continuing_rounds(setup: Setup, mode: Mode, iterations: int) -> Iterator[SimulatedRound]:
    """Yield rounds whose unfinished responses go on in the next one, but for those that would become too old.

    These begin anew, before further prompts are drawn.
    """
    drawn = 0
    unfinished: list[_Entry] = []
    for iteration in range(iterations):
        entries: list[_Entry] = []
        restarted: list[_Entry] = []
        discarded = 0
        for entry in unfinished:
            # The weights of its first tokens: there are none before the first update.
            version = max(entry.begun - mode.rounds_ahead, 0)
            if entry.tokens_done and iteration - version <= mode.staleness:
                entries.append(entry)
            else:
                discarded += entry.tokens_done
                restarted.append(_begin(setup, entry.index, iteration))
        continued = len(entries)
        answered = frozenset(position for position, entry in enumerate(entries) if entry.is_answered)
        entries += restarted
        # As `PromptStream.continue_round`: so many prompts as a short round has.
        while len(entries) < setup.prompts + math.ceil(setup.prompts * mode.oversample):
            entries.append(_begin(setup, drawn, iteration))
            drawn += 1
        generated = _run(setup, mode, entries, Cut(setup.prompts, answered), continued)
        unfinished = [entry for entry in entries if entry.index not in generated.trained]
        yield replace(generated, discarded=generated.discarded + discarded)


def _begin(setup: Setup, index: int, iteration: int) -> _Entry:
    problem = setup.problem(index)
    return _Entry(index, problem, iteration, [0] * len(problem.lengths))


def _run(setup: Setup, mode: Mode, entries: Sequence[_Entry], cut: Cut | None, continued: int = 0) -> SimulatedRound:
    """Simulate a round of ``entries``, the first of them ``continued``, and write into them what it generated."""
    groups = [entry.pieces(position) for position, entry in enumerate(entries)]
    done_before = [entry.tokens_done for entry in entries]
    result = run_round(groups, setup.engines(mode), mode.schedule, setup.max_num_seqs, cut, continued)
    counted = 0
    for group in groups:
        for piece in group:
            position, sample = piece.key
            tokens = result.unfinished.get(piece.key, piece.tokens)
            entries[position].done[sample] += tokens
            counted += tokens
    selected = list(range(len(entries)))
    if cut is not None:
        selected = result.selected(cut)
    graded_s = result.seconds
    for end_s in result.end_s:
        graded_s = max(graded_s, last_verdict(end_s, setup.workers, setup.verdict_s))
    trained = []
    tokens_with_prompts = 0
    response_tokens = 0
    stale_tokens = 0
    for position in selected:
        entry = entries[position]
        trained.append(entry.index)
        tokens_with_prompts += entry.problem.tokens
        response_tokens += entry.tokens_done
        stale_tokens += done_before[position]
    # The rest of what was generated came after the step of the cut.
    discarded = result.generated - counted
    return SimulatedRound(
        result, graded_s, frozenset(trained), tokens_with_prompts, response_tokens, stale_tokens, discarded
    )
