"""Prompts that come again after mixed rewards, and turns that are skipped after equal ones."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ovr_megatron.config import AlgorithmConfig, ConfigError, ParallelConfig, RLConfig, build, defaults
from ovr_megatron.data.schema import ENDLESS
from ovr_megatron.data.stream import RowStream
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.prompt_history import SMALLEST, PromptHistory, replay_probability, turn_probability
from ovr_megatron.ppo.prompts import Prompts, PromptStream
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.runtime import distributed
from tests.ppo.questions import NumberedRows

SURE = 1 - 1e-12  # a probability, and its powers, that no draw of these tests is above


@pytest.fixture(autouse=True)
def every_prompt_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ovr_megatron.ppo.prompts.lengths_or_errors", lambda processor, rows, **_: [1] * len(rows))


def prompt_stream(
    count: int, replay: float = 0.0, exploration: float = 0.0, cooldown: int = 1, seed: int = 3
) -> PromptStream:
    algorithm = AlgorithmConfig(prompt_replay=replay, prompt_exploration=exploration)
    if replay:
        algorithm = replace(algorithm, prompt_cooldown=cooldown)
    unused: Any = None
    stream = RowStream([(NumberedRows(count), 1.0)], seed)
    return PromptStream(stream, unused, {}, history=PromptHistory(algorithm, seed))


def turns(count: int, epochs: int, seed: int = 3) -> list[str]:
    """Return the ids of a stream without a history."""
    stream = RowStream([(NumberedRows(count), 1.0)], seed)
    return [next(stream).id for _ in range(count * epochs)]


def iterate(prompts: PromptStream, count: int, mixed: set[str]) -> tuple[list[str], dict[str, float]]:
    """Draw an iteration; those of ``mixed`` have unequal rewards.  Return its ids and metrics."""
    ids = [row.id for row in prompts.draw(count)]
    rewards = {index: row_id in mixed for index, row_id in enumerate(ids)}
    return ids, prompts.observe(prompts.round_positions, rewards)


def test_probabilities_are_those_of_the_page() -> None:
    for base in (0.25, 0.5, 0.9):
        product = 1.0
        for count in range(1, 30):
            product *= base
            assert replay_probability(base, count) == pytest.approx(product, rel=1e-12)
            # presampling_selector.py of GRESO: skip_probability = 1 - max(p ** count, 0.01)
            assert turn_probability(base, count) == pytest.approx(1 - (1 - max(product, 0.01)), rel=1e-12)


def test_repeats_and_turns_have_these_probabilities() -> None:
    """Of 4,000 prompts those of mixed rewards come again with probability b, then b^2; the others take turns by e^z."""
    count, decay, exploration = 4000, 0.6, 0.7
    replays = prompt_stream(count, replay=decay, cooldown=1)
    everything = {str(row) for row in range(count)}
    waiting = count
    iterate(replays, count, everything)
    for repeat in (1, 2):
        expected = waiting * decay**repeat
        spread = 5 * math.sqrt(expected * (1 - decay**repeat))
        state = replays.state()["history"]
        assert abs(len(state["waiting"]) - expected) < spread
        assert {repeats for _, _, repeats in state["repeats"]} == {repeat}
        waiting = len(state["waiting"])
        ids, metrics = iterate(replays, waiting, everything)
        assert len(set(ids)) == waiting == metrics["data/replayed_prompts"]
    equal = prompt_stream(count, exploration=exploration)
    iterate(equal, count, set())
    before = Counter(groups for *_, groups in equal.state()["history"]["equal"])
    assert before == {1: count}
    # The second epoch, to the prompt: drawn until the stream has given each a turn.
    taken = 0
    while equal.stream.drawn < 2 * count:
        equal.draw(1)
        taken += equal.stream.drawn <= 2 * count
    assert abs(taken - count * exploration) < 5 * math.sqrt(count * exploration * (1 - exploration))


def test_a_case_by_hand() -> None:
    """Four prompts, two an iteration, repeats that are all but sure, one iteration after the last."""
    a, b, c, d, *second = turns(4, epochs=2)
    prompts = prompt_stream(4, replay=SURE)
    assert iterate(prompts, 2, mixed={a}) == ([a, b], {"data/replayed_prompts": 0, "data/skipped_turns": 0})
    # a again, and its repeat is mixed, too; c takes its turn.
    assert iterate(prompts, 2, mixed={a}) == ([a, c], {"data/replayed_prompts": 1, "data/skipped_turns": 0})
    # a is solved now: it does not come again before the next epoch.
    assert iterate(prompts, 2, mixed={d})[0] == [a, d]
    # d comes again, and then its turn in the second epoch: the repeats count from there.
    iterations = [iterate(prompts, 2, mixed=set()) for _ in range(2)]
    assert iterations[0][0] == [d, second[0]]
    assert iterations[1][0] == second[1:3]


def test_a_pause_lies_between_repeats() -> None:
    prompts = prompt_stream(100, replay=SURE, cooldown=3)
    order = turns(100, epochs=1)
    drawn = [iterate(prompts, 1, mixed={order[0]})[0][0] for _ in range(8)]
    assert drawn == [order[0], *order[1:3], order[0], *order[3:5], order[0], order[5]]


def test_a_repeat_that_waits_is_dropped_at_the_next_turn() -> None:
    prompts = prompt_stream(4, replay=SURE, cooldown=4)
    order = turns(4, epochs=2)
    for _ in range(2):
        iterate(prompts, 2, mixed={order[0]})
    assert len(prompts.state()["history"]["waiting"]) == 1
    second = [iterate(prompts, 2, mixed=set())[0] for _ in range(2)]
    assert [row_id for ids in second for row_id in ids] == order[4:]
    history = prompts.state()["history"]
    assert history["waiting"] == history["repeats"] == []


def test_equal_groups_count_until_a_mixed_one() -> None:
    prompts = prompt_stream(1, exploration=SURE)
    counts = []
    for mixed in (False, False, True, False):
        iterate(prompts, 1, {"0"} if mixed else set())
        counts.append([groups for *_, groups in prompts.state()["history"]["equal"]])
    assert counts == [[1], [2], [], [1]]


def test_a_prompt_that_is_always_solved_still_takes_turns() -> None:
    """Of 20 prompts one is mixed: the others are drawn in one of 1 / SMALLEST turns in the end, but none is lost."""
    prompts = prompt_stream(20, exploration=0.1)
    drawn: Counter[str] = Counter()
    for _ in range(800):
        drawn.update(iterate(prompts, 2, mixed={"7"})[0])
    epochs = prompts.stream.drawn / 20
    assert drawn["7"] in (math.floor(epochs), math.ceil(epochs))
    others = [drawn[str(row)] for row in range(20) if row != 7]
    assert min(others) >= 3  # the first turn, that of probability 0.1, and one of probability 0.01
    expected = len(others) * (epochs - 12) * SMALLEST + 2 * len(others)
    assert sum(others) == pytest.approx(expected, rel=0.2)


def test_rows_without_epochs_are_not_counted() -> None:
    """A generated prompt has no second turn; it comes again all the same."""
    prompts = prompt_stream(ENDLESS, replay=SURE, exploration=0.5)
    first, _ = iterate(prompts, 2, mixed=set())
    second, _ = iterate(prompts, 2, mixed={str(ENDLESS), *first})
    assert not set(first) & set(second)
    third, _ = iterate(prompts, 2, mixed=set())
    assert prompts.state()["history"]["equal"] == []
    assert not set(third) & set(first + second)
    mixed, _ = iterate(prompts, 1, mixed={prompt_id for prompt_id in _next_ids(prompts)})
    assert iterate(prompts, 1, mixed=set())[0] == mixed


def _next_ids(prompts: PromptStream) -> list[str]:
    """Return the id of the prompt that ``prompts`` draws next, from a copy of it."""
    other = prompt_stream(ENDLESS, replay=SURE, exploration=0.5)
    other.load(prompts.state())
    return [row.id for row in other.draw(1)]


@pytest.mark.parametrize("seed", range(8))
def test_a_resumed_stream_goes_on_and_no_prompt_is_lost(seed: int, tmp_path: Path) -> None:
    """Over random rewards and cuts: the same prompts from a checkpoint and from an archive, each epoch complete."""
    draw = random.Random(seed)
    rows, count = draw.randint(5, 40), draw.randint(1, 6)
    settings = {"replay": draw.choice((0.3, 0.9)), "cooldown": draw.randint(1, 3), "seed": seed}
    settings["exploration"] = draw.choice((0.0, 0.5))
    oversample = draw.choice((0.0, 0.5))
    continues = bool(oversample) and draw.random() < 0.5
    prompts = prompt_stream(rows, **settings)
    world = distributed.start(ParallelConfig(), seed=1)
    unused: Any = None
    drawn: Counter[str] = Counter()
    replayed = 0.0
    for _ in range(60):
        before = json.loads(json.dumps(prompts.state()))
        redrawn, skipped = prompt_stream(rows, **settings), prompt_stream(rows, **settings)
        restarted: list[int] | None = None
        long = False
        if continues:
            restarted = sorted(draw.sample(range(prompts.unfinished), prompts.unfinished // 2))
            batch = prompts.continue_round(count + math.ceil(count * oversample), restarted)
        else:
            batch, long = prompts.draw_round(count, oversample)
        left = sorted(draw.sample(range(len(batch)), 0 if long else max(len(batch) - count, 0)))
        prompts.keep_unfinished(left) if continues else prompts.postpone(left)
        mixed = {index: draw.random() < 0.5 for index in range(len(batch)) if index not in left}
        drawn.update(batch[index].id for index in mixed)
        replayed += prompts.observe(prompts.round_positions, mixed)["data/replayed_prompts"]
        rollout = Rollout(Prompts(batch, unused), 64, mixed=mixed)
        if continues:
            rollout.restarted, rollout.unfinished = restarted, left
        else:
            rollout.long, rollout.postponed = long, left
        assert archive.write(tmp_path, 0, rollout, before, [], {}, world) is None
        assert archive.restore(archive.read(tmp_path, 0, world), redrawn).prompts.rows == batch
        archive.skip(tmp_path, 0, skipped)
        after = json.loads(json.dumps(prompts.state()))
        for other in (redrawn, skipped):
            assert json.loads(json.dumps(other.state())) == after
    assert replayed > 0
    if not settings["exploration"]:
        epochs = prompts.stream.drawn // rows
        late = Counter(
            position[1] for key in ("postponed", "unfinished", "returned") for position in prompts.state().get(key, [])
        )
        assert epochs > 0
        assert all(drawn[str(row)] + late[row] >= epochs for row in range(rows))


def test_without_a_history_nothing_is_observed() -> None:
    unused: Any = None
    prompts = PromptStream(RowStream([(NumberedRows(4), 1.0)], 3), unused, {})
    ids, metrics = iterate(prompts, 4, mixed={"0", "1"})
    assert ids + iterate(prompts, 4, mixed=set())[0] == turns(4, epochs=2)
    assert metrics == {} and "history" not in prompts.state()


def test_an_option_that_is_off_now_leaves_its_part_of_a_checkpoint_out() -> None:
    prompts = prompt_stream(4, replay=SURE, exploration=0.5)
    iterate(prompts, 2, mixed={turns(4, 1)[0]})
    state = prompts.state()
    assert state["history"]["equal"] and state["history"]["waiting"]
    other = prompt_stream(4, exploration=0.5)
    other.load(state)
    assert other.state()["history"] == {**state["history"], "repeats": [], "waiting": []}
    before = prompt_stream(4).state()
    del before["history"]
    other.load(before)
    assert other.state()["history"] == prompt_stream(4).state()["history"]


def config(**changes: Any) -> RLConfig:
    values = {
        "run": {"dir": "run"},
        "model": {"path": "model"},
        "curriculum": [{"until": 1, "max_tokens": 9}],
        "iterations": 1,
        "data": {"max_prompt_tokens": 1},
    }
    return build(RLConfig, OmegaConf.merge(defaults(RLConfig), values, changes))


@pytest.mark.parametrize("name", ["prompt_replay", "prompt_exploration"])
def test_settings_that_cannot_work_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"algorithm.{name}=1.0 must be 0 .off. or more and below 1"):
        config(algorithm={name: 1})
    with pytest.raises(ConfigError, match=f"responses=1: algorithm.{name}=0.5 compares"):
        config(algorithm={name: 0.5}, responses=1)
    sources = [{"path": "rows.jsonl", "streaming": True}]
    with pytest.raises(ConfigError, match=f"algorithm.{name}=0.5 knows a prompt by its number.*streaming"):
        config(algorithm={name: 0.5}, data={"max_prompt_tokens": 1, "sources": sources})
    assert config(algorithm={name: 0.5, "estimator": "gae"}).algorithm.learns_from_rewards
