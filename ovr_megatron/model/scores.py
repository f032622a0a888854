"""What a model gives for the scored rows of a pack: log-probabilities and entropies, or values.

Shapes: n scored rows (those whose label is not -100).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ovr_megatron.data.packing import Pack
from ovr_megatron.runtime.device import send


@dataclass(frozen=True)
class Scores:
    """The last pipeline stage's output for the scored rows of a pack: all float32 [n].

    ``rows`` int64 [n], on the host, are their rows in the pack; a context-parallel rank has only its own.  A policy
    fills ``logprobs`` and ``entropy``, a critic ``values``.
    """

    rows: Tensor
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None

    def beside(self, pack: Pack, name: str) -> Tensor:
        """Return the pack's array ``name`` at these rows [n], on the device of the scores."""
        scores = self.logprobs if self.logprobs is not None else self.values
        assert scores is not None
        return send(pack.extras[name][self.rows], scores.device)
