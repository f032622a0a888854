"""Make the request to the graders for a response to a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ovr_megatron.data.schema import ImageSize, Row
from ovr_megatron.rewards.combination import all_parts, any_part
from ovr_megatron.rewards.rules import reads_box, reads_image_size
from ovr_megatron.rewards.verdict import GradeRequest, RewardRule


class RequestBuilder:
    """Builds requests by the rule of each row's source."""

    def __init__(
        self,
        rules: Mapping[str, RewardRule],
        thinking: bool,
        image_size: Callable[[Row], ImageSize] | None,
    ) -> None:
        """Take the rules.

        Args:
            rules: By source; ``auto`` for a source without one.
            thinking: Whether the prompt opens a thought.
            image_size: Measures the only image of a row; None where no processor is at hand.
        """
        self._rules = rules
        self._thinking = thinking
        self._image_size = image_size
        self._measured_row: Row | None = None
        self._measured_size: ImageSize | None = None

    def build(self, row: Row, response: str) -> GradeRequest:
        """Return the request for a response to ``row``, with as much of the row as its rule may read."""
        rule = self._rules.get(row.source, "auto")
        image = None
        if self._image_size is not None and any_part(rule, reads_image_size):
            # The responses to a prompt come one after the other, and measuring reads a file.
            if row is not self._measured_row:
                self._measured_row = row
                self._measured_size = self._image_size(row)
            image = self._measured_size
        return GradeRequest(
            response,
            row.answer or "",
            row.options,
            rule,
            self._thinking,
            row=None if all_parts(rule, reads_box) else row,
            image=image,
        )
