"""Simulated rounds: equal to a literal simulation of every step, and to cases computed by hand; nothing is lost."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ovr_megatron import cli
from ovr_megatron.config import ConfigError
from ovr_megatron.launch import compose
from ovr_megatron.plan.cost import generation_seconds
from ovr_megatron.plan.decoding import DecodeRates, Piece, SimulatedEngine, decode_rates
from ovr_megatron.plan.hardware import find_gpu
from ovr_megatron.plan.lengths import LogNormalLengths, MeasuredLengths, Problem, read_lengths
from ovr_megatron.plan.modes import Mode, Setup, generate
from ovr_megatron.plan.report import read_shape
from ovr_megatron.plan.rounds import INTERVAL, Cut, RoundResult, last_verdict, run_round
from ovr_megatron.plan.scenario import build_scenario
from ovr_megatron.plan.simulation import SimulationOptions, simulate, summarise_mode

# Whole numbers, so that sums of steps are exact.
RATES = DecodeRates(step_s=1000, sequence_s=17, context_s=3, prefill_s=5)
STEPS = DecodeRates(step_s=1)


@dataclass
class LiteralEngine:
    """An engine whose every step is made."""

    rates: DecodeRates
    slots: int
    clock: float = 0
    step: int = 0
    generated: int = 0
    running: list[list] = field(default_factory=list)  # key, tokens left, context
    starts: dict[tuple[int, int], int] = field(default_factory=dict)
    waiting: list[Piece] = field(default_factory=list)
    outstanding: int = 0
    stopped: bool = False

    def fill(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            piece = self.waiting.pop(0)
            self.running.append([piece.key, piece.tokens, piece.context])
            self.starts[piece.key] = self.step
            self.clock += self.rates.prefill_s * piece.prefill

    @property
    def next_clock(self) -> float:
        rates = self.rates
        context = sum(entry[2] for entry in self.running)
        return self.clock + rates.step_s + rates.sequence_s * len(self.running) + rates.context_s * context

    def make_step(self) -> list[tuple[int, int]]:
        self.clock = self.next_clock
        self.step += 1
        self.generated += len(self.running)
        for entry in self.running:
            entry[1] -= 1
            entry[2] += 1
        ended = [entry[0] for entry in self.running if entry[1] == 0]
        self.running = [entry for entry in self.running if entry[1]]
        self.fill()
        return ended


def literal_round(
    groups: Sequence[Sequence[Piece]],
    engines: list[LiteralEngine],
    schedule: str,
    max_num_seqs: int,
    cut: Cut | None,
    continued: int,
) -> RoundResult:
    """Make every step of every engine in the order of the clock, and compare counts as `RoundCut` does."""
    result = RoundResult([], [[] for _ in engines], dict.fromkeys(cut.answered if cut else (), 0))
    result.answers = [[] for _ in engines]
    missing = {index: len(group) for index, group in enumerate(groups)}
    queue = [index for index, group in enumerate(groups) if group]

    def take(engine: LiteralEngine) -> None:
        prompt = queue.pop(0)
        engine.waiting += groups[prompt]
        engine.outstanding += len(groups[prompt])
        engine.fill()

    dealt = queue if schedule == "static" else [prompt for prompt in queue if prompt < continued]
    for index, engine in enumerate(engines):
        for prompt in dealt[index :: len(engines)]:
            engine.waiting += groups[prompt]
            engine.outstanding += len(groups[prompt])
        engine.fill()
    queue = [prompt for prompt in queue if prompt not in dealt]
    while queue and any(engine.outstanding < max_num_seqs for engine in engines):
        for engine in engines:
            if queue and engine.outstanding < max_num_seqs:
                take(engine)
    decided: tuple[int, float] | None = None
    published = [math.inf if not engine.running else 0 for engine in engines]
    now = 0.0
    while True:
        if cut and decided is None:
            for step in range(INTERVAL, max([1, *result.answer_steps.values()]) + INTERVAL, INTERVAL):
                early = {prompt for prompt, last in result.answer_steps.items() if last <= step}
                if min(published) >= step and len(early) >= cut.needed:
                    decided = step, now
                    break
        for engine in engines:
            if decided and engine.step % INTERVAL == 0 and engine.step >= decided[0] and engine.clock >= decided[1]:
                engine.stopped = True
        working = [engine for engine in engines if engine.running and not engine.stopped]
        if not working:
            break
        engine = min(working, key=lambda engine: (engine.next_clock, engines.index(engine)))
        index = engines.index(engine)
        now = engine.next_clock
        for key in engine.make_step():
            result.end_s[index].append(now)
            missing[key[0]] -= 1
            engine.outstanding -= 1
            if not missing[key[0]]:
                result.answer_steps[key[0]] = engine.step
                result.answers[index].append((key[0], now))
        while schedule == "shared" and not decided and queue and engine.outstanding < max_num_seqs:
            take(engine)
        if not engine.running:
            published[index] = math.inf
        elif engine.step % INTERVAL == 0:
            published[index] = engine.step
    for engine in engines:
        result.engine_s.append(engine.clock)
        result.generated += engine.generated
    for group in groups if decided else []:
        for piece in group:
            starts = [engine.starts[piece.key] for engine in engines if piece.key in engine.starts]
            done = max(decided[0] - starts[0], 0) if starts else 0
            if done < piece.tokens:
                result.unfinished[piece.key] = done
    return result


def random_groups(draw: random.Random, count: int, responses: int) -> list[list[Piece]]:
    groups = []
    for prompt in range(count):
        context = draw.randint(1, 30)
        group = []
        for k in range(responses):
            length = 1 + int(draw.lognormvariate(3, 0.8))
            group.append(Piece((prompt, k), length, context, context if k == 0 else 0))
        groups.append(group)
    return groups


@pytest.mark.parametrize("schedule", ["static", "shared"])
@pytest.mark.parametrize("seed", range(30))
def test_from_end_to_end_is_step_by_step(seed: int, schedule: str) -> None:
    draw = random.Random(seed)
    count, responses, engine_count = draw.randint(2, 12), draw.randint(1, 4), draw.randint(1, 4)
    groups = random_groups(draw, count, responses)
    slots, max_num_seqs = draw.randint(1, 6), draw.randint(1, 8)
    cut = None
    if seed % 3:
        answered = frozenset({0}) if seed % 5 == 0 else frozenset()
        groups = [[] if prompt in answered else group for prompt, group in enumerate(groups)]
        cut = Cut(draw.randint(1, count), answered)
    continued = draw.choice((0, count // 2))
    engines = [SimulatedEngine(RATES, slots) for _ in range(engine_count)]
    literal_engines = [LiteralEngine(RATES, slots) for _ in range(engine_count)]
    found = run_round(groups, engines, schedule, max_num_seqs, cut, continued)
    assert found == literal_round(groups, literal_engines, schedule, max_num_seqs, cut, continued)
    whole = sum(piece.tokens for group in groups for piece in group)
    tokens = {piece.key: piece.tokens for group in groups for piece in group}
    left_over = sum(tokens[key] - done for key, done in found.unfinished.items())
    if cut is None:
        assert found.generated == whole and not found.unfinished
    else:
        # Until an engine hears of the cut it goes on for some steps.
        assert whole - left_over <= found.generated <= whole
        assert len(found.selected(cut)) == min(cut.needed, len(found.answer_steps))


class ListedLengths:
    """Prompts as they are listed, without tokens of their own."""

    basis = "listed"

    def __init__(self, problems: Sequence[tuple[int, ...]]):
        self.problems = problems

    def problem(self, index: int) -> Problem:
        return Problem(0, self.problems[index])


def setup(problems: Sequence[tuple[int, ...]], prompts: int, world: int = 2, **more: float) -> Setup:
    return Setup(world, 1, STEPS, 64, 1, prompts, ListedLengths(problems), **more)


def test_a_static_round_by_hand() -> None:
    """Two engines: 30 and 10 one after the other's start, against 20 and 40; training takes a second for ten tokens."""
    (found,) = generate(setup([(30,), (20,), (10,), (40,)], 4), Mode("static"), 1)
    assert found.round.engine_s == [30, 40]
    assert found.round.idle_s == 5
    summary = summarise_mode(setup([], 4, train_s=0.1), Mode("static"), [found])
    assert (summary["generate_s"], summary["engine_idle"]) == (40, 5 / 40)
    assert summary["iteration_s"] == 40 + 10
    assert summary["gpu_idle"] == pytest.approx(10 / (2 * 50))


def test_a_shared_queue_by_hand() -> None:
    """One prompt an engine: the second is done first and takes the third and the fourth."""
    (found,) = generate(setup([(50,), (10,), (20,), (25,)], 4), Mode("shared"), 1)
    assert found.round.engine_s == [50, 55]
    assert found.round.end_s == [[50], [10, 30, 55]]


def test_oversampled_rounds_by_hand() -> None:
    """Four prompts for two: those that the first two rounds do not wait for make the third."""
    problems = [(5,), (100,), (16,), (90,), (10,), (12,), (80,), (70,)]
    rounds = list(generate(setup(problems, 2, world=4), Mode("shared", oversample=1.0), 2))
    assert [sorted(found.trained) for found in rounds] == [[0, 2], [1, 3]]
    # The first ends with step 16, the last of an interval; 16 tokens each of 100 and 90 are lost.
    assert rounds[0].round.engine_s == [5, 16, 16, 16]
    assert (rounds[0].discarded, rounds[0].response_tokens, rounds[0].round.generated) == (32, 21, 53)
    assert rounds[1].long and rounds[1].round.engine_s == [100, 90, 0, 0]


def test_rounds_that_continue_by_hand() -> None:
    """What is left of two prompts goes on in the second round, and would be too old in the third: it begins anew."""
    problems = [(5,), (100,), (16,), (90,), (10,), (12,), (40,), (15,)]
    mode = Mode("shared", oversample=1.0, staleness=1)
    first, second, third = generate(setup(problems, 2, world=4), mode, 3)
    assert sorted(first.trained) == [0, 2] and first.round.engine_s == [5, 16, 16, 16]
    assert (first.round.unfinished, first.discarded) == ({(1, 0): 16, (3, 0): 16}, 0)
    # 84 and 74 tokens are left; the prompts of 10 and 12 tokens are answered before.
    assert sorted(second.trained) == [4, 5] and second.round.engine_s == [16, 16, 10, 12]
    assert (second.stale_tokens, second.round.generated) == (0, 16 + 16 + 10 + 12)
    # 32 tokens of each are lost; 40 and 15 are drawn besides, of which one is answered after 48 steps.
    assert sorted(third.trained) == [6, 7] and third.round.engine_s == [48, 48, 40, 15]
    assert third.discarded == 32 + 32


def test_what_is_generated_after_the_cut_does_not_count() -> None:
    """The first engine is done with 16 steps long before the second, whose steps take three times as long."""
    groups = [[Piece((0, 0), 16)], [Piece((1, 0), 16, 20)], [Piece((2, 0), 400)], [Piece((3, 0), 400, 20)]]
    engines = [SimulatedEngine(DecodeRates(step_s=1), 4), SimulatedEngine(DecodeRates(step_s=3), 4)]
    found = run_round(groups, engines, "static", 4, Cut(2))
    assert found.engine_s == [48, 48]
    assert found.unfinished == {(2, 0): 16, (3, 0): 16}
    assert found.generated == 16 + 48 + 16 + 16


def test_what_continues_is_computed_anew() -> None:
    """The keys and values of 16 tokens each are lost with the weights of the first round."""
    problems = [(5,), (100,), (16,), (90,), (10,), (12,)]
    work = Setup(4, 1, DecodeRates(step_s=1, prefill_s=1), 64, 1, 2, ListedLengths(problems))
    _, second = generate(work, Mode("shared", oversample=1.0, staleness=1), 2)
    assert second.round.engine_s == [16 + 16, 16 + 16, 10, 12]


def test_ranks_that_generate_only_by_hand() -> None:
    """Rounds of 30 s on one of two ranks, updates of 20 s on the other."""
    rounds = list(generate(setup([(30,)] * 8, 1), Mode("shared", generators=1), 6))
    split = setup([], 1, train_s=20 / 2 / 30)
    alternating = summarise_mode(split, Mode("shared", generators=1), rounds)
    assert alternating["iteration_s"] == pytest.approx(50)
    assert alternating["gpu_idle"] == pytest.approx(0.5)
    assert alternating["stale"] == 0
    ahead = summarise_mode(split, Mode("shared", staleness=1, generators=1), rounds)
    assert ahead["iteration_s"] == pytest.approx(30)
    assert ahead["gpu_idle"] == pytest.approx(1 - (30 + 20) / 60)
    assert ahead["stale"] == 1
    # Training is the slower side: 60 s an update, which the engines may be one ahead of.
    slow = summarise_mode(setup([], 1, train_s=60 / 2 / 30), Mode("shared", staleness=1, generators=1), rounds)
    assert slow["iteration_s"] == pytest.approx(60)


def test_parts_that_are_trained_on_while_others_are_generated_by_hand() -> None:
    """Responses that end after 5, 10, 20 and 40 s, one at a time, and 0.5 s of training for each of their tokens."""
    problems = [(5,), (5,), (10,), (20,)]
    work = Setup(2, 1, DecodeRates(step_s=1), 1, 1, 4, ListedLengths(problems * 3), train_s=0.25, update_s=2)
    rounds = list(generate(work, Mode("static", generators=1), 3))
    assert rounds[0].round.answers == [[(0, 5), (1, 10), (2, 20), (3, 40)]]
    whole = summarise_mode(work, Mode("static", generators=1), rounds)
    assert whole["iteration_s"] == pytest.approx(40 + 20 + 2)
    # The last part has two prompts with 30 tokens; the first one is trained on before.
    two = summarise_mode(work, Mode("static", generators=1, parts=2), rounds)
    assert two["iteration_s"] == pytest.approx(40 + 15 + 2)
    four = summarise_mode(work, Mode("static", generators=1, parts=4), rounds)
    assert four["iteration_s"] == pytest.approx(40 + 10 + 2)
    assert four["gpu_idle"] == pytest.approx(1 - (40 + 20 + 2) / (2 * 52))
    # Training is the slower side: it begins at 5 s, and nothing of it waits but for the update.
    slow = Setup(2, 1, DecodeRates(step_s=1), 1, 1, 4, ListedLengths(problems * 3), train_s=5, update_s=2)
    slower = summarise_mode(slow, Mode("static", generators=1, parts=4), rounds)
    assert slower["iteration_s"] == pytest.approx(5 + 400 + 2)


def test_responses_that_continue_on_ranks_that_generate_only() -> None:
    """Weights are an iteration old when they draw: with a bound of 2 a response goes on in one more round."""
    problems = [(5,), (100,), (16,), (90,), (10,), (12,), (40,), (15,)]
    work = setup(problems, 2, world=8)
    split = list(generate(work, Mode("shared", oversample=1.0, staleness=2, generators=4), 3))
    together = list(generate(setup(problems, 2, world=4), Mode("shared", oversample=1.0, staleness=1), 3))
    assert [found.trained for found in split] == [found.trained for found in together]
    # The weights of round 0 drew in round 1, too: in round 2 they are two iterations old.
    assert split[2].discarded == 0 < together[2].discarded


def test_graders_take_responses_in_the_order_of_their_ends() -> None:
    assert last_verdict([1, 1, 1], workers=2, verdict_s=10) == 21
    assert last_verdict([1, 1, 30], workers=2, verdict_s=10) == 40
    assert last_verdict([], workers=2, verdict_s=10) == 0


MODES = [
    Mode("static"),
    Mode("shared"),
    Mode("static", oversample=0.5),
    Mode("shared", oversample=0.5),
    Mode("shared", oversample=1.5),
    Mode("shared", oversample=0.5, staleness=1),
    Mode("static", oversample=1.0, staleness=3),
    Mode("shared", staleness=1, generators=2),
    Mode("shared", oversample=0.5, staleness=2, generators=2),
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_every_token_is_generated_once(mode: Mode) -> None:
    """But for those of postponed prompts, which are counted; each prompt is trained on once; engines work or wait."""
    lengths = LogNormalLengths(70, 240, responses=4, prompt_tokens=8, seed=3)
    work = Setup(4, 1, RATES, 10, 12, 6, lengths)
    rounds = list(generate(work, mode, 12))
    trained = [index for found in rounds for index in found.trained]
    assert len(trained) == len(set(trained)) == 6 * 12
    for found in rounds:
        assert len(found.trained) == 6
        busy = sum(found.round.engine_s)
        idle = found.round.idle_s * len(found.round.engine_s)
        assert busy + idle == pytest.approx(found.round.seconds * len(found.round.engine_s))
    generated = sum(found.round.generated for found in rounds)
    trained_tokens = sum(sum(lengths.problem(index).lengths) for index in trained)
    assert trained_tokens == sum(found.response_tokens for found in rounds)
    discarded = sum(found.discarded for found in rounds)
    under_way = generated - trained_tokens - discarded
    if mode.continues:
        # Of the prompts that the next round goes on with.
        assert 0 < under_way < 6 * 4 * 240
        assert sum(found.stale_tokens for found in rounds) > 0
    else:
        assert under_way == 0
        assert (discarded > 0) == bool(mode.oversample)


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_a_response_that_is_older_than_the_bound_begins_anew(staleness: int) -> None:
    """The longer a response may go on, the fewer are generated again; far beyond all lengths none is."""
    lengths = LogNormalLengths(70, 240, responses=4, prompt_tokens=8, seed=5)

    def discarded(bound: int) -> int:
        # One engine: nothing is generated after the cut that another one would have to hear of.
        rounds = generate(Setup(1, 1, RATES, 64, 64, 6, lengths), Mode("shared", 1.0, bound), 20)
        return sum(found.discarded for found in rounds)

    assert discarded(staleness) > discarded(staleness + 3) >= discarded(50) == 0


def static_seconds(groups: Sequence[Sequence[Piece]]) -> float:
    return run_round(groups, [SimulatedEngine(RATES, 8) for _ in range(2)], "static", 8).seconds


def test_slower_or_longer_is_never_sooner() -> None:
    lengths = LogNormalLengths(70, 240, responses=4, prompt_tokens=8, seed=7)
    for mode in MODES:
        work = Setup(4, 1, RATES, 10, 12, 6, lengths)
        twice = Setup(4, 1, DecodeRates(2000, 34, 6, 10), 10, 12, 6, lengths)
        once_s = [found.round.seconds for found in generate(work, mode, 6)]
        assert [found.round.seconds for found in generate(twice, mode, 6)] == [2 * seconds for seconds in once_s]
    groups = random_groups(random.Random(1), 8, 2)
    static = [static_seconds(groups[:count]) for count in range(1, 9)]
    assert static == sorted(static)
    longer = [[piece._replace(tokens=piece.tokens + 5) for piece in group] for group in groups]
    assert static_seconds(longer) > static[-1]


def test_lengths_come_from_files_and_runs(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("10\n\n30\n")
    assert read_lengths(tmp_path / "lines.txt") == ([[10], [30]], None)
    (tmp_path / "flat.json").write_text("[10, 30]")
    assert read_lengths(tmp_path / "flat.json") == ([[10], [30]], None)
    (tmp_path / "groups.json").write_text("[[10, 20], [30, 40]]")
    assert read_lengths(tmp_path / "groups.json") == ([[10, 20], [30, 40]], None)
    rollouts = tmp_path / "run/rollouts"
    (rollouts / "000000").mkdir(parents=True)
    lines = [{"number": number, "tokens": tokens} for number, tokens in ((0, 10), (3, 7), (0, 20), (4, 0))]
    (rollouts / "000000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (rollouts / "000000/iteration.json").write_text(json.dumps({"kept": [[0, 10 + 20 + 2 * 12], [3, 7 + 14]]}))
    assert read_lengths(tmp_path / "run") == ([[10, 20], [7]], 13)
    grouped = MeasuredLengths([[10, 20], [30, 400]], 4, 8, limit=100, seed=1, basis="")
    problems = {grouped.problem(index).lengths for index in range(20)}
    assert {frozenset(lengths) for lengths in problems} == {frozenset({10, 20}), frozenset({30, 92})}
    assert grouped.problem(3) == grouped.problem(3)


def test_log_normal_lengths_have_their_mean_and_a_hundredth_at_the_limit() -> None:
    lengths = LogNormalLengths(7000, 24000, responses=16, prompt_tokens=100, seed=1)
    drawn = [length for index in range(2000) for length in lengths.problem(index).lengths]
    assert sum(drawn) / len(drawn) == pytest.approx(7000, rel=0.02)
    assert drawn.count(24000) / len(drawn) == pytest.approx(0.01, abs=0.003)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("10\nten\n", 'entry 2 is "ten", and not a whole number of tokens above 0'),
        ("[[10], []]", r"entry 2 is \[\]"),
        ("[10, 0]", "entry 2 is 0"),
        ("[10", "is not JSON"),
        ("", "is empty; give the tokens of a response a line"),
    ],
)
def test_what_is_no_length_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "lengths").write_text(content)
    with pytest.raises(ConfigError, match=f"{tmp_path / 'lengths'}.*{message}"):
        read_lengths(tmp_path / "lengths")


ONE_LENGTH = "curriculum=[{until: 1, max_tokens: 4224, mean_tokens: 4223}]"


def small_scenario(*overrides: str):
    config = compose("rl_7b_64gpu", ["model.path=7B", "prompts=64", "responses=4", *overrides])
    return build_scenario(config, read_shape("7B")[0], find_gpu("h100"), 64, None)


def test_the_rates_are_those_of_the_plan() -> None:
    """One response an engine, of the mean length: the plan's formula without its tail."""
    scenario = small_scenario("prompts=16", "responses=1", "iterations=1", ONE_LENGTH)
    span = scenario.spans[0]
    engine = SimulatedEngine(decode_rates(scenario, span), 1)
    engine.add([Piece((0, 0), 4223)])
    step, _ = engine.next_end()
    engine.advance(step)
    # The plan has a tail of one step, and half of the cache in all steps.
    assert engine.clock == pytest.approx(generation_seconds(scenario, span), rel=1e-3)


def test_a_simulation_compares_every_way_with_the_shared_queue() -> None:
    options = SimulationOptions("2000:8000", oversample=(0.5,), staleness=(1,), generators=(32,))
    found = simulate(small_scenario(), options)
    names = [mode["name"] for mode in found["modes"]]
    assert names == [
        "static",
        "shared queue",
        "shared queue, oversample=0.5",
        "shared queue, oversample=0.5, max_staleness=1",
        "shared queue, ranks=32, max_staleness=0",
        "shared queue, ranks=32, max_staleness=1",
    ]
    shared = found["modes"][1]
    for mode in found["modes"]:
        assert mode["gain"] == pytest.approx(shared["iteration_s"] / mode["iteration_s"])
        assert 0 <= mode["engine_idle"] < 1 and 0 <= mode["gpu_idle"] < 1
        ends = [planned["train_end_s"] for planned in mode["rounds"]]
        assert ends == sorted(ends) and len(ends) == 3
    alternating, ahead = found["modes"][4:]
    assert alternating["iteration_s"] > ahead["iteration_s"]


@pytest.mark.parametrize("generators", [(64,), (6,)])
def test_ranks_that_cannot_generate_are_refused(generators: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=f"--ranks {generators[0]}: must be below the 64 processes"):
        simulate(small_scenario(), SimulationOptions("2000:8000", generators=generators))


def test_supervised_training_is_refused() -> None:
    config = compose("cold_start_7b_64gpu", [])
    scenario = build_scenario(config, read_shape("7B")[0], find_gpu("h100"), 64, None)
    with pytest.raises(ConfigError, match="supervised training generates nothing"):
        simulate(scenario, SimulationOptions())


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lengths.txt").write_text("".join(f"{tokens}\n" for tokens in (500, 800, 900, 1200, 3000, 9000)))
    words = ["plan", "rl_7b_64gpu", "model.path=7B", "prompts=64", "responses=4", "--no-search", "--simulate"]
    words += ["--lengths", f"{tmp_path / 'lengths.txt'}", "--oversample", "0.25,0.5", "--staleness", "1"]
    figures = [tmp_path / "figures/iterations.svg", tmp_path / "iterations.png"]
    tables = []
    for figure in figures:
        assert cli.main([*words, "--figure", str(figure)]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert f"6 responses of {tmp_path / 'lengths.txt'}, mean 2,567 tokens" in tables[0]
    assert (
        len(tables[0].splitlines())
        - tables[0]
        .splitlines()
        .index(next(line for line in tables[0].splitlines() if line.startswith("simulated iterations of 64 prompts")))
        == 4 + 5 + 4
    )
    assert "Engine busy" in figures[0].read_text() and "max_staleness=1" in figures[0].read_text()
    assert figures[1].read_bytes().startswith(b"\x89PNG")
    for option in (["--figure", "x.svg"], ["--lengths", "7:9"], ["--staleness", "2"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["plan", "rl_7b_64gpu", *option])
        assert left.value.code == 2
        assert "add --simulate" in capsys.readouterr().err
