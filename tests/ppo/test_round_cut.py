"""Oversampled rounds: which prompts are taken is decided by token counts, and none is lost or drawn twice."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from ovr_megatron.data.stream import RowStream
from ovr_megatron.ppo import round_cut
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.round_cut import RoundCut
from tests.ppo.questions import NumberedRows

LONGEST_WAIT_S = 5


class Round:
    """A round of engines that are threads: each answers its prompts after so many steps, at a speed of its own."""

    def __init__(self, steps: dict[int, int], failed: set[int], needed: int, replicas: int, seed: int):
        self.steps, self.failed, self.needed, self.replicas = steps, failed, needed, replicas
        self.store = dist.HashStore()
        self.pace = random.Random(seed)
        self.unfinished = 0
        self.arrived: list[None] = []
        self.barrier: Any = SimpleNamespace(wait=self.wait)

    def wait(self, meanwhile: Callable[[], None]) -> None:
        """Wait for all threads as the barrier of ranks does."""
        self.arrived.append(None)
        deadline = time.monotonic() + LONGEST_WAIT_S
        while len(self.arrived) < self.replicas:
            assert time.monotonic() < deadline, "an engine waits for ever"
            meanwhile()
            time.sleep(1e-4)

    def cut(self, replica: int) -> RoundCut:
        cut = RoundCut("round", self.needed, replica, self.replicas)
        cut._store = self.store
        return cut

    def run_replica(self, replica: int) -> RoundCut:
        """Run one engine to the end of the round."""
        prompts = [p for p in sorted(self.steps) if p % self.replicas == replica]
        waiting = {p: self.steps[p] for p in prompts if p not in self.failed}
        cut = self.cut(replica)
        pause = self.pace.choice((0.0, 0.0, 1e-5, 2e-4))
        step = 0
        while waiting:
            step += 1
            for prompt in [p for p, last in waiting.items() if last == step]:
                cut.answer(prompt)
                del waiting[prompt]
            if cut.engine_step(lambda decide: decide()):
                break
            if pause:
                time.sleep(pause)
        self.unfinished += len(waiting)
        cut.wait(self.barrier, lambda: None, leads=True)
        return cut

    def run(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Return what the round postpones."""
        with ThreadPoolExecutor(self.replicas) as threads:
            cuts = list(threads.map(self.run_replica, range(self.replicas), timeout=60))
        # What every rank would bring to the gather.
        reports: list[Any] = []
        monkeypatch.setattr(round_cut, "gather_objects", lambda report: reports.append(report) or [report])
        for cut in cuts:
            cut.postponed([], sorted(self.failed), leads=True)
        monkeypatch.setattr(round_cut, "gather_objects", lambda report: reports)
        return cuts[0].postponed(sorted(self.steps), sorted(self.failed), leads=True)


def literal_postponed(steps: dict[int, int], failed: set[int], needed: int) -> list[int]:
    """Return what is postponed, from all lengths at once."""
    answered = {prompt: step for prompt, step in steps.items() if prompt not in failed}
    taken = sorted(answered, key=lambda prompt: (answered[prompt], prompt))[:needed]
    return [prompt for prompt in sorted(steps) if prompt not in failed.union(taken)]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_cut, "default_store", lambda prefix: None)


@pytest.mark.parametrize("seed", range(20))
def test_the_clock_decides_nothing(seed: int, monkeypatch: pytest.MonkeyPatch, store: None) -> None:
    """Random lengths, engines of random speed: what is taken is what the lengths alone say, and no engine waits on."""
    draw = random.Random(seed)
    replicas, needed = draw.randint(1, 5), draw.randint(1, 12)
    count = needed + draw.randint(1, 8)
    steps = {prompt: 1 + int(draw.lognormvariate(3.5, 0.8)) for prompt in range(count)}
    failed = set(draw.sample(range(count), draw.choice((0, 0, 1, min(3, count - 1)))))
    postponed = literal_postponed(steps, failed, needed)
    for pace in range(3):
        finished = Round(steps, failed, needed, replicas, pace)
        assert finished.run(monkeypatch) == postponed
        assert finished.store.num_keys() == 0
    assert len(steps) - len(postponed) - len(failed) == min(needed, len(steps) - len(failed))


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_round_ends_without_its_longest_prompt(replicas: int, monkeypatch: pytest.MonkeyPatch, store: None) -> None:
    steps = {prompt: 40 for prompt in range(8)} | {3: 10**7}
    finished = Round(steps, set(), 6, replicas, seed=0)
    assert finished.run(monkeypatch) == [3, 7]
    assert finished.unfinished == 1


def prompt_stream(count: int, monkeypatch: pytest.MonkeyPatch) -> PromptStream:
    # Lengths are no part of this: every prompt fits.
    monkeypatch.setattr("ovr_megatron.ppo.prompts.lengths_or_errors", lambda processor, rows, **_: [1] * len(rows))
    unused: Any = None
    return PromptStream(RowStream([(NumberedRows(count), 1.0)], seed=3), unused, {})


@pytest.mark.parametrize("seed", range(10))
def test_every_prompt_is_trained_on_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over random cuts, each prompt of an epoch is trained on or waits; a resumed stream goes on as the whole one."""
    draw = random.Random(seed)
    count, oversample = draw.randint(1, 9), draw.choice((0.1, 0.25, 1.0, 2.0))
    prompts = prompt_stream(500, monkeypatch)
    trained: list[str] = []
    long_rounds = 0
    while len(trained) + prompts.postponed + count + math.ceil(count * oversample) <= 500:
        other = prompt_stream(500, monkeypatch)
        other.load(prompts.state())
        rows, long = prompts.draw_round(count, oversample)
        assert other.draw_round(count, oversample) == (rows, long)
        assert len(rows) == (count if long else count + math.ceil(count * oversample))
        postponed = [] if long else sorted(draw.sample(range(len(rows)), len(rows) - count))
        prompts.postpone(postponed)
        trained += [row.id for index, row in enumerate(rows) if index not in postponed]
        long_rounds += long
    assert max(Counter(trained).values()) == 1
    assert long_rounds > 0
    waiting = [row.id for row in prompts.draw_postponed(prompts.postponed)]
    assert not set(waiting) & set(trained)
    drawn = prompts.stream.state()["drawn"]
    assert len(trained) + len(waiting) == drawn
