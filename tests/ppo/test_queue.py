"""What a decoding step costs beside vLLM: questions to the store that all ranks share."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from ovr_megatron.config import ParallelConfig
from ovr_megatron.ppo import counters, round_work
from ovr_megatron.ppo.counters import RolloutCounters
from ovr_megatron.ppo.round_work import assign, open_queue
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
    """500 decoding steps, of which ten find a prompt: eleven questions, the last of which finds nothing."""
    broadcasts = []

    def agree(decide: Any) -> int:
        broadcasts.append(decide())
        return broadcasts[-1]

    work = assign(range(100, 100 + PROMPTS), replica=0, replicas=1, static=False)
    queue = open_queue(work, f"once{id(calls)}", RESPONSES, ROOM, agree)
    taken: list[int] = []
    for step in range(STEPS):
        finished = min(step // 10, len(taken))
        taken += queue((len(taken) - finished) * RESPONSES)
    assert taken == list(range(100, 100 + PROMPTS))
    assert calls["next"] == len(broadcasts) == PROMPTS + 1


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
