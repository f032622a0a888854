"""What a decoding step costs beside vLLM: questions to the store that all ranks share."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.tail import make_config
from ovr_megatron.config import ParallelConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Message, Row, TextPart
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo import counters, round_work
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.counters import RolloutCounters
from ovr_megatron.ppo.grading import RoundGrading
from ovr_megatron.ppo.round_work import PromptQueue, assign
from ovr_megatron.rewards.pool import GradeRequest, GraderPool
from ovr_megatron.runtime import distributed

PROMPTS, RESPONSES, ROOM, STEPS = 10, 4, 16, 500


class CountingStore:
    """A part of the ranks' own store that counts what it is asked."""

    calls: Counter[str]

    def __init__(self, prefix: str):
        self._store = distributed.default_store(prefix)

    def add(self, key: str, amount: int) -> int:
        CountingStore.calls[key] += 1
        return self._store.add(key, amount)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    distributed.start(ParallelConfig(), seed=1)
    CountingStore.calls = Counter()
    monkeypatch.setattr(round_work, "default_store", CountingStore)
    monkeypatch.setattr(counters, "default_store", CountingStore)
    return CountingStore.calls


def test_an_empty_queue_is_asked_once(calls: Counter[str]) -> None:
    """500 decoding steps, of which ten find a prompt: one question who is there, and eleven for prompts."""
    broadcasts = []

    def agree(decide: Any) -> int:
        broadcasts.append(decide())
        return broadcasts[-1]

    work = assign(range(100, 100 + PROMPTS), replica=0, replicas=1, static=False)
    queue = PromptQueue(work, f"once{id(calls)}", RESPONSES, ROOM, replicas=1, agree=agree)
    taken: list[int] = []
    for step in range(STEPS):
        finished = min(step // 10, len(taken))
        taken += queue.take((len(taken) - finished) * RESPONSES)
    assert taken == list(range(100, 100 + PROMPTS))
    assert calls["next"] == PROMPTS + 1
    assert calls["engines"] == 1 == len(broadcasts) - calls["next"]


def open_queues(name: str, replicas: int, prompts: int, max_num_seqs: int) -> list[PromptQueue]:
    """Return the queue as each engine of a round has it."""
    queues = []
    for replica in range(replicas):
        work = assign(range(prompts), replica, replicas, static=False)
        queues.append(PromptQueue(work, name, RESPONSES, max_num_seqs, replicas, lambda decide: decide()))
    return queues


def test_an_engine_that_asks_first_leaves_the_others_their_share(calls: Counter[str]) -> None:
    """Ten prompts for three engines with room for all of them: none takes more than four before all have asked."""
    queues = open_queues(f"shares{id(calls)}", 3, PROMPTS, 1000)
    assert [len(queue.take(0)) for queue in queues] == [4, 4, 2]


def test_an_engine_that_is_early_done_takes_what_others_have_no_room_for(calls: Counter[str]) -> None:
    first, second = open_queues(f"early{id(calls)}", 2, PROMPTS, 2 * RESPONSES)
    assert first.take(0) == [0, 1]
    # It has its share of five prompts, but works on none: it would end its round.
    assert first.take(0) == [2, 3] and first.take(RESPONSES) == [4]
    assert first.take(RESPONSES) == [] and first.take(0) == [5]
    assert second.take(0) == [6, 7]
    # All have asked: the share counts no more.
    assert first.take(RESPONSES) == [8] and second.take(RESPONSES) == [9]
    assert first.take(0) == second.take(0) == []


def test_the_progress_is_looked_at_once_a_second(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(counters.time, "monotonic", lambda: clock.now)
    bar: Any = SimpleNamespace(done=0, update=lambda count, **shown: None)
    finished = RolloutCounters(f"counters{id(calls)}")
    for _ in range(STEPS):
        finished.show(bar)
        clock.now += 0.02
    assert calls["responses"] == 10
    finished.show(bar, at_once=True)
    assert calls["responses"] == 11


def test_the_rewards_of_a_step_are_one_question(calls: Counter[str], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    config = make_config(tmp_path, prompts=1)
    rows = [Row((Message("user", (TextPart("3 + 4?"),)),), answer="7", where="rows.jsonl:1", source="text")]
    right = GradeRequest("\\boxed{7}", "7")
    with GraderPool(workers=1) as pool:
        pool.grade([right])  # the same request has its verdict at once from here on
        name = f"rewards{id(calls)}"
        grading = RoundGrading(pool, Processor(folder, config.data), config, rows, RolloutCounters(name))
        for sample in range(RESPONSES):
            logprobs = np.zeros(1, np.float32)
            grading.responses[0, sample] = Response(0, sample, [1], logprobs, stopped=True, text=right.response)
            pool.submit((0, sample), right)
        grading.take_verdicts(wait=True)
        grading.take_verdicts(wait=False)  # of a step without a verdict
    assert calls["reward"] == 1
    assert distributed.default_store(name).add("reward", 0) == 1000 * RESPONSES
