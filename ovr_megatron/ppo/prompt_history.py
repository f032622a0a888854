"""Repeat prompts whose responses earned unequal rewards, and skip turns of those whose rewards were all equal.

An epoch of a source gives each of its prompts one turn.  Two options change that by the rewards of earlier groups,
where a group is all responses to a prompt in one iteration, and is mixed where its rewards differ:

- ``algorithm.prompt_replay``, b: after a mixed group the prompt comes again with probability b^r, r the number of the
  repeat since its turn (prompts alone come again, after a cooldown, as in Prompt Replay, arXiv 2603.21177).
- ``algorithm.prompt_exploration``, e: a prompt whose last z groups had equal rewards is drawn at its turn with
  probability max(e^z, `SMALLEST`) (GRESO, arXiv 2506.02177; the bound is that of its code).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TypedDict

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.data.stream import RowPosition

SMALLEST = 0.01  # probability of a turn: no prompt is lost


def replay_probability(decay: float, repeat: int) -> float:
    """Return the probability of a prompt's repeat number ``repeat``, from 1, after a mixed group."""
    return decay**repeat


def turn_probability(exploration: float, equal_groups: int) -> float:
    """Return the probability that a prompt is drawn at its turn after ``equal_groups`` groups of equal rewards."""
    return max(exploration**equal_groups, SMALLEST)


class HistoryState(TypedDict):
    """A `PromptHistory` as JSON; a prompt is the number of its source and its number there.

    Attributes:
        iteration: iterations observed.
        equal: prompts, each with its latest groups of equal rewards in a row.
        repeats: prompts, each with its repeats since its turn, the one that waits included.
        waiting: prompts, each with the first iteration of its next repeat.
    """

    iteration: int
    equal: list[list[int]]
    repeats: list[list[int]]
    waiting: list[list[int]]


class PromptHistory:
    """What earlier groups of each prompt decide about its next one.

    Every decision is a function of the seed and of a count that checkpoints have: a resumed run decides the same, and
    so do all ranks.

    Attributes:
        replayed: Repeats drawn since the last `observe`.
        skipped: Turns skipped since then.
    """

    def __init__(self, algorithm: AlgorithmConfig, seed: int) -> None:
        """Begin without groups, with the settings ``prompt_...`` of ``algorithm``."""
        self._decay = algorithm.prompt_replay
        self._cooldown = algorithm.prompt_cooldown
        self._exploration = algorithm.prompt_exploration
        self._seed = seed
        self._iteration = 0
        self._equal: dict[RowPosition, int] = {}
        self._repeats: dict[RowPosition, int] = {}
        self._waiting: dict[RowPosition, int] = {}
        self.replayed = 0
        self.skipped = 0

    def take_replays(self, count: int) -> list[RowPosition]:
        """Return at most ``count`` prompts whose repeat is due, in the order of their groups."""
        # The order of the dictionary is that of the groups, also after a resume.
        due = [position for position, iteration in self._waiting.items() if iteration <= self._iteration]
        replays = due[:count]
        for position in replays:
            del self._waiting[position]
        self.replayed += len(replays)
        return replays

    def takes_turn(self, position: RowPosition, turn: int) -> bool:
        """Return whether a prompt is drawn at its turn; a repeat that waits is dropped, as the epoch of it is over.

        Args:
            position: of the prompt.
            turn: number of the turn in the entire stream.
        """
        self._repeats.pop(position, None)
        self._waiting.pop(position, None)
        equal_groups = self._equal.get(position, 0)
        if equal_groups == 0:
            return True
        probability = turn_probability(self._exploration, equal_groups)
        if self._draw("turn", turn) < probability:
            return True
        self.skipped += 1
        return False

    def observe(self, groups: Iterable[tuple[RowPosition, bool, bool]]) -> None:
        """Take the groups of an iteration, and decide which prompts come again.

        Args:
            groups: of each the prompt, whether the rewards differ, and whether the prompt has a turn in each epoch.
        """
        # All ranks have the same groups in the same order, and so draw the same numbers.
        for index, (position, mixed, has_turns) in enumerate(groups):
            if self._exploration and has_turns:
                self._count_equal(position, mixed)
            if self._decay and position not in self._waiting:
                self._decide_replay(position, mixed, index)
        self._iteration += 1
        self.replayed = 0
        self.skipped = 0

    def _count_equal(self, position: RowPosition, mixed: bool) -> None:
        if mixed:
            self._equal.pop(position, None)
        else:
            self._equal[position] = self._equal.get(position, 0) + 1

    def _decide_replay(self, position: RowPosition, mixed: bool, index: int) -> None:
        """Have the prompt of the group ``index`` of this iteration wait for its next repeat, or forget its repeats."""
        repeat = self._repeats.pop(position, 0) + 1
        if not mixed:
            return
        probability = replay_probability(self._decay, repeat)
        if self._draw("replay", self._iteration, index) < probability:
            self._repeats[position] = repeat
            self._waiting[position] = self._iteration + self._cooldown

    def _draw(self, purpose: str, *counts: int) -> float:
        """Return a number of [0, 1)."""
        # A generator of its own for each decision: checkpoints need no state of a generator.
        return random.Random(f"{self._seed}#{purpose}/{counts}").random()

    def state(self) -> HistoryState:
        """Return all that later decisions depend on as JSON."""
        return {
            "iteration": self._iteration,
            "equal": _as_lists(self._equal),
            "repeats": _as_lists(self._repeats),
            "waiting": _as_lists(self._waiting),
        }

    def load(self, state: HistoryState | None) -> None:
        """Go on from ``state``; None forgets all groups.

        What belongs to an option that is off now is left out.
        """
        self._iteration = 0
        self._equal = {}
        self._repeats = {}
        self._waiting = {}
        self.replayed = 0
        self.skipped = 0
        if not state:
            return
        self._iteration = state["iteration"]
        if self._exploration:
            self._equal = _from_lists(state["equal"])
        if self._decay:
            self._repeats = _from_lists(state["repeats"])
            self._waiting = _from_lists(state["waiting"])


def _as_lists(counts: dict[RowPosition, int]) -> list[list[int]]:
    return [[*position, count] for position, count in counts.items()]


def _from_lists(lists: list[list[int]]) -> dict[RowPosition, int]:
    return {RowPosition(source, row): count for source, row, count in lists}
