"""Count what the engines of all ranks have finished, for the progress bar of the first."""

from __future__ import annotations

import time

from ovr_megatron.runtime.distributed import default_store
from ovr_megatron.runtime.progress import Progress


class RolloutCounters:
    """Responses, tokens and rewards of all engines so far, in a store that every rank can read."""

    def __init__(self, name: str) -> None:
        self._store = default_store(name)
        self._next_update = 0.0

    def add(self, responses: int, tokens: int) -> None:
        """Count finished responses and their tokens."""
        self._store.add("responses", responses)
        self._store.add("tokens", tokens)

    def add_reward(self, reward: float) -> None:
        """Count a reward, or the sum of several, to a thousandth: the store adds integers."""
        if reward:
            thousandths = round(1000 * reward)
            self._store.add("reward", thousandths)

    def show(self, bar: Progress, at_once: bool = False) -> None:
        """Move ``bar`` on to what is finished, with the mean reward and length so far: once a second, or ``at_once``.

        A decoding step takes some 20 ms, and every question to the store a part of one.
        """
        if time.monotonic() < self._next_update and not at_once:
            return
        self._next_update = time.monotonic() + 1.0
        finished = self._store.add("responses", 0)  # adding 0 reads
        if finished > bar.done:
            thousandths = self._store.add("reward", 0)
            tokens = self._store.add("tokens", 0)
            mean_reward = thousandths / 1000 / finished
            mean_length = tokens / finished
            bar.update(
                finished - bar.done,
                reward=f"{mean_reward:.3f}",
                length=f"{mean_length:.0f}",
            )
