"""The prompts that reinforcement learning draws."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.data.stream import RowStream
from ovr_megatron.rewards.choice import verifiable
from ovr_megatron.rewards.rules import is_plain

MOST_DROPPED = 10_000


class PromptStream:
    """Prompts from a stream of rows; ``dropped`` of them so far were over ``data.max_prompt_tokens``.

    ``rules``: by source, how responses are graded; a function of the user's takes any answer.
    """

    def __init__(self, stream: RowStream, processor: Processor, rules: Mapping[str, str]):
        self.stream, self.processor, self.rules, self.dropped = stream, processor, rules, 0

    def draw(self, count: int) -> list[Row]:
        """The next ``count`` prompts.

        Raises:
            RowError: an answer that no grader could verify, or nothing but prompts that are too long.
        """
        rows: list[Row] = []
        before = self.dropped
        while len(rows) < count:
            drawn = list(islice(self.stream, count - len(rows)))
            for row in drawn:
                problem = verifiable(row.answer or "", row.options)
                if problem and is_plain(self.rules.get(row.source, "auto")):
                    raise RowError(row.where, "answer", problem, "give the bare final answer or remove the row")
            lengths = self.processor.lengths(drawn, generation=True)
            fitting = [row for row, length in zip(drawn, lengths, strict=True) if isinstance(length, int)]
            self.dropped += len(drawn) - len(fitting)
            rows += fitting
            if not rows and self.dropped - before >= MOST_DROPPED:
                problem = f"{self.dropped - before} prompts in a row are too long"
                raise RowError(drawn[-1].where, "messages", problem, "raise data.max_prompt_tokens")
        return rows
