"""Draw the prompts of reinforcement learning from a stream of rows, and encode those of an iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NotRequired, cast

from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.data.skipped import SkippedRows, lengths_or_errors
from ovr_megatron.data.stream import RowPosition, RowStream, StreamState
from ovr_megatron.ppo.prompt_history import HistoryState, PromptHistory
from ovr_megatron.rewards.judge_templates import JudgeTemplate
from ovr_megatron.rewards.references import check_reference
from ovr_megatron.rewards.verdict import RewardRule, RuleError

MOST_DROPPED = 10_000  # prompts in a row that are left out, after which the stream gives up


class PromptState(StreamState):
    """Position of a prompt stream, as JSON.

    Attributes:
        postponed: source and index of each prompt that waits for a long round; absent where none does.
        unfinished: the same of each prompt whose responses the next round continues; absent where there are none.
        returned: the same of each prompt that is drawn before the stream's next; absent where there are none.
        history: the rewards of earlier groups; absent where they decide nothing.
    """

    postponed: NotRequired[list[list[int]]]
    unfinished: NotRequired[list[list[int]]]
    returned: NotRequired[list[list[int]]]
    history: NotRequired[HistoryState]


class PromptStream:
    """Prompts from a stream of rows, without those that are too long or, where there is a list, unusable.

    With `draw_round` and `postpone` it also has a queue of the prompts that an oversampled round did not wait for, or
    with `continue_round` and `keep_unfinished` of those whose responses go on in the next round.  With a history it
    draws by the rewards that `observe` is given.

    Attributes:
        dropped: Rows drawn and left out so far.
    """

    def __init__(
        self,
        stream: RowStream,
        processor: Processor,
        rules: Mapping[str, RewardRule],
        skipped: SkippedRows | None = None,
        judges: Mapping[str, JudgeTemplate] = MappingProxyType({}),
        needs_answers: bool = True,
        history: PromptHistory | None = None,
    ):
        """Draw from ``stream``.

        Args:
            stream: Rows in the order of the run.
            processor: Measures them.
            rules: By source, how responses are graded; a function of the user's takes any answer.
            skipped: Lists rows that cannot be used; None stops at the first.
            judges: Templates of the judges by name, whose fields rows must have.
            needs_answers: Whether a row with an answer that its rule cannot verify is refused.
            history: Decides which prompts come again and which turns are skipped; None: each prompt is drawn at its
                turn.

        Raises:
            RuleError: a rule is given for a source that no row has.
        """
        if absent := stream.absent_sources(rules):
            raise RuleError(
                f"reward.rules has a rule for {absent[0]!r}, which is the source of no row; correct the name: it is "
                "data.sources[].name, else a row's own field, else FOLDER/FILE without the suffix"
            )
        self.stream = stream
        self.processor = processor
        self.rules = rules
        self.judges = judges
        self.skipped = skipped
        self.needs_answers = needs_answers
        self._history = history
        self.dropped = 0
        self._postponed: list[RowPosition] = []
        self._unfinished: list[RowPosition] = []
        self._returned: list[RowPosition] = []
        self._round: list[RowPosition] = []  # of the prompts drawn last

    def state(self) -> PromptState:
        """Return the position as JSON."""
        state = cast(PromptState, dict(self.stream.state()))
        # Absent where there are none, as in checkpoints of runs without such rounds.
        if self._postponed:
            state["postponed"] = [list(position) for position in self._postponed]
        if self._unfinished:
            state["unfinished"] = [list(position) for position in self._unfinished]
        if self._returned:
            state["returned"] = [list(position) for position in self._returned]
        if self._history:
            state["history"] = self._history.state()
        return state

    def load(self, state: PromptState) -> None:
        """Go to a position.

        Raises:
            ConfigError: the position is that of a stream with another seed, or other sources.
        """
        self.stream.load(state)
        self._postponed = [RowPosition(*position) for position in state.get("postponed", [])]
        self._unfinished = [RowPosition(*position) for position in state.get("unfinished", [])]
        self._returned = [RowPosition(*position) for position in state.get("returned", [])]
        if self._history:
            self._history.load(state.get("history"))
        self._round = []

    @property
    def round_positions(self) -> list[RowPosition]:
        """Positions of the prompts drawn last, in order."""
        return list(self._round)

    @property
    def postponed(self) -> int:
        """Number of prompts that wait for a long round."""
        return len(self._postponed)

    @property
    def unfinished(self) -> int:
        """Number of prompts whose responses the next round continues."""
        return len(self._unfinished)

    def draw_round(self, count: int, oversample: float) -> tuple[list[Row], bool]:
        """Return the prompts of a round that trains on ``count`` of them, and whether it is a long round.

        A long round has ``count`` prompts that earlier rounds postponed, and comes as soon as there are so many.  A
        short round has new prompts, the share ``oversample`` more of them than it trains on.

        Raises:
            RowError: as of `draw`.
        """
        if self.postponed >= count:
            return self.draw_postponed(count), True
        return self.draw(count + math.ceil(count * oversample)), False

    def draw_postponed(self, count: int) -> list[Row]:
        """Return ``count`` postponed prompts, the oldest first; they leave the queue."""
        self._round = self._postponed[:count]
        self._postponed = self._postponed[count:]
        return [self.stream.row(position) for position in self._round]

    def postpone(self, indices: Sequence[int]) -> None:
        """Put those prompts of the round drawn last into the queue of a long round."""
        self._postponed += [self._round[i] for i in indices]

    def continue_round(self, count: int, restarted: Sequence[int]) -> list[Row]:
        """Return ``count`` prompts: those whose responses are continued, in order, then those that begin.

        Prompts begin in this order: the ``restarted`` ones, those that wait for a long round (there are some where a
        run goes on with another setting), those that were returned before, and the stream's next.  More than ``count``
        unfinished prompts are all continued.

        Args:
            count: Prompts of the round.
            restarted: Indices among the unfinished prompts of those that begin again.

        Raises:
            RowError: as of `draw`.
        """
        self._returned, self._postponed = self._postponed + self._returned, []
        self.restart(restarted)
        continued, self._unfinished = self._unfinished, []
        rows = [self.stream.row(position) for position in continued]
        rows += self.draw(max(count - len(continued), 0))
        self._round = continued + self._round
        return rows

    def restart(self, indices: Sequence[int]) -> None:
        """Return the unfinished prompts ``indices``: they are drawn before the stream's next, and begin again."""
        restarted = set(indices)
        self._returned = [self._unfinished[i] for i in sorted(restarted)] + self._returned
        self._unfinished = [position for i, position in enumerate(self._unfinished) if i not in restarted]

    def keep_unfinished(self, indices: Sequence[int]) -> None:
        """Have the next round continue those prompts of the round drawn last."""
        self._unfinished = [self._round[i] for i in indices]

    def observe(self, positions: Sequence[RowPosition], mixed: Mapping[int, bool]) -> dict[str, float]:
        """Take the rewards of an iteration, which later draws depend on; return metrics of its draws.

        Without a history it does nothing.

        Args:
            positions: `round_positions` of all draws of the iteration, in order.
            mixed: By index of the prompt, whether the rewards of its responses differ; without prompts that have no
                rewards, or have them later.
        """
        if self._history is None:
            return {}
        metrics = {
            "data/replayed_prompts": float(self._history.replayed),
            "data/skipped_turns": float(self._history.skipped),
        }
        groups = []
        for index, differ in mixed.items():
            position = positions[index]
            groups.append((position, differ, self.stream.has_epochs(position.source)))
        self._history.observe(groups)
        return metrics

    def draw(self, count: int) -> list[Row]:
        """Return the next ``count`` prompts: those that were returned, those to be repeated, then those at their turn.

        Raises:
            RowError: a row that cannot be used or an answer that no grader could verify, unless there is a list for
                them; or nothing but prompts that are left out.
        """
        self._round = self._returned[:count]
        self._returned = self._returned[count:]
        if self._history:
            self._round += self._history.take_replays(count - len(self._round))
        rows = [self.stream.row(position) for position in self._round]
        earlier = len(rows)
        dropped_before = self.dropped
        while len(rows) < count:
            missing = count - len(rows)
            fitting, errors = self._draw_fitting(missing)
            self.dropped += len(errors)
            for row, position in fitting:
                rows.append(row)
                self._round.append(position)
            dropped_now = self.dropped - dropped_before
            if len(rows) == earlier and dropped_now >= MOST_DROPPED:
                error = errors[0]
                problem = f"{error.problem}; so it is with {dropped_now} prompts in a row"
                remedy = "correct the rows"
                if isinstance(error, TooLongError):
                    remedy = "raise data.max_prompt_tokens"
                raise RowError(error.where, error.field, problem, remedy)
        return rows

    def _draw_fitting(self, count: int) -> tuple[list[tuple[Row, RowPosition]], list[RowError]]:
        """Draw ``count`` rows; return those that can be prompts, and the errors of the others, of length first."""
        # All at once: the stream lists the rows that it leaves out before the answers are looked at.
        drawn: list[tuple[Row, RowPosition]] = []
        for _ in range(count):
            drawn.append(self._next_row())
        sound: list[tuple[Row, RowPosition]] = []
        answer_errors: list[RowError] = []
        for row, position in drawn:
            error = self._problem(row)
            if error is None:
                sound.append((row, position))
            else:
                answer_errors.append(error)
        fitting: list[tuple[Row, RowPosition]] = []
        length_errors: list[RowError] = []
        sound_rows = [row for row, _ in sound]
        lengths = lengths_or_errors(self.processor, sound_rows, generation=True, skipped=self.skipped)
        for prompt, length in zip(sound, lengths, strict=True):
            if isinstance(length, int):
                fitting.append(prompt)
            else:
                length_errors.append(length)
        return fitting, length_errors + answer_errors

    def _next_row(self) -> tuple[Row, RowPosition]:
        """Return the next row of the stream that takes its turn, and its position."""
        # A skipped turn counts as drawn: the epoch goes on behind it.
        while True:
            row = next(self.stream)
            position = self.stream.last_position
            if self._history is None or self._history.takes_turn(position, self.stream.drawn):
                return row, position

    def _problem(self, row: Row) -> RowError | None:
        """Return why the row's answer cannot be verified, or None; list the problem, or raise it without a list."""
        if not self.needs_answers:
            return None
        try:
            check_reference(row, self.rules, self.judges)
        except RowError as error:
            if self.skipped is None:
                raise
            self.skipped.add(error)
            return error
        return None


class Prompts:
    """The prompts of an iteration; each is encoded once, on the ranks that need it."""

    def __init__(self, rows: Sequence[Row], processor: Processor):
        self.rows = list(rows)
        self.processor = processor
        self._samples: dict[int, Sample] = {}

    def sample(self, i: int) -> Sample:
        """Return prompt ``i`` as a sample, encoded if it is not yet."""
        self.encode([i])
        return self._samples[i]

    def encode(self, indices: Sequence[int]) -> None:
        """Encode those of the prompts ``indices`` that are not encoded yet, their images in one batch."""
        missing = [i for i in indices if i not in self._samples]
        if missing:
            rows = [self.rows[i] for i in missing]
            samples = self.processor.encode(rows, generation=True)
            self._samples.update(zip(missing, samples, strict=True))
