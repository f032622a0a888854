"""Weights that turn the mean over the tokens of a step into the reduction of the settings.  Pure functions, no state.

n is the number of tokens of a response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np

from ovr_megatron.ppo.advantages import Ragged

SumOverRanks = Callable[[np.ndarray], np.ndarray]


def token_weights(
    reduction: str,
    lengths: Sequence[int],
    packs: Sequence[Sequence[int]],
    constant: int,
    sum_over_ranks: SumOverRanks,
) -> Ragged | None:
    """Return factors for the tokens' losses that turn the mean over all tokens of a step into the set reduction.

    With N tokens in S responses and P packs in a step of all ranks: every ``token`` 1 (none is returned); every
    response the same (``sequence``, GRPO) N / (S n); a ``constant`` divisor, the length limit of the run (Dr. GRPO) or
    1, which sums over a response (RLOO), N / (S constant); every ``pack`` the same (Open-Reasoner-Zero)
    N / (P n of the pack).

    Args:
        reduction: one of these four.
        lengths: n of every response of this rank.
        packs: the responses in each pack of the step; an empty pack counts nothing.
        constant: tokens by which ``constant`` divides.
        sum_over_ranks: sums an array over all ranks.

    Returns:
        float64 [n] per response; those outside ``packs`` stay 0.
    """
    if reduction == "token":
        return None
    # Every rank takes part in the sum, also one without responses in this step.
    counts = sum_over_ranks(_count(lengths, packs))
    return _weights(reduction, lengths, packs, constant, counts)


def unscaled_weights(
    reduction: str, lengths: Sequence[int], packs: Sequence[Sequence[int]], constant: int
) -> Ragged | None:
    """Return the factors of `token_weights` without the totals of the step, which are unknown until its last part.

    Mean loss and gradients must be multiplied by `ReductionCounts.scale` afterwards.
    """
    if reduction == "token":
        return None
    return _weights(reduction, lengths, packs, constant, np.ones(3))


class ReductionCounts:
    """Tokens, responses and packs of a step whose packs come in parts."""

    def __init__(self) -> None:
        self._counts = np.zeros(3)

    def add(self, lengths: Sequence[int], packs: Sequence[Sequence[int]]) -> None:
        """Count a part of the step on this rank; arguments as of `token_weights`."""
        self._counts += _count(lengths, packs)

    def scale(self, reduction: str, sum_over_ranks: SumOverRanks) -> float:
        """Return the factor missing in `unscaled_weights`: tokens over responses, or over packs; 1 for ``token``."""
        if reduction == "token":
            return 1.0
        token_count, response_count, pack_count = sum_over_ranks(self._counts)
        return float(token_count / (pack_count if reduction == "pack" else response_count))


def _count(lengths: Sequence[int], packs: Sequence[Sequence[int]]) -> np.ndarray:
    """Return how many tokens, responses and packs of a step this rank has."""
    members = list(chain.from_iterable(packs))
    tokens = sum(lengths[i] for i in members)
    filled_packs = sum(map(bool, packs))  # without the empty ones, which only keep a rank in step
    return np.array([tokens, len(members), filled_packs], np.float64)


def _weights(
    reduction: str, lengths: Sequence[int], packs: Sequence[Sequence[int]], constant: int, counts: np.ndarray
) -> Ragged:
    """Return the factors of `token_weights` with tokens, responses and packs of the step as in ``counts``."""
    token_count, response_count, pack_count = counts
    weights = [np.zeros(n) for n in lengths]
    for pack in packs:
        pack_tokens = sum(lengths[i] for i in pack)
        for i in pack:
            divisor = {
                "sequence": response_count * lengths[i],
                "constant": response_count * constant,
                "pack": pack_count * pack_tokens,
            }[reduction]
            weights[i][:] = token_count / divisor
    return weights


def positive_nll_weights(
    right: Sequence[bool],
    lengths: Sequence[int],
    members: Sequence[int],
    sum_over_ranks: SumOverRanks,
) -> Ragged:
    """Return factors that turn the mean over all tokens of a step into the mean over those of its right responses.

    With N tokens in the step of all ranks, M of them of right responses, the factor of these is N / M and that of the
    others 0 (VAPO, Yue et al. 2025); without a right response all are 0.

    Args:
        right: whether each response of this rank is right.
        lengths: n of each.
        members: the responses of the step.
        sum_over_ranks: sums an array over all ranks.

    Returns:
        float64 [n] per response; those outside of ``members`` stay 0.
    """
    local_tokens = sum(lengths[i] for i in members)
    local_right_tokens = sum(lengths[i] for i in members if right[i])
    # Every rank takes part in the sum, also one without responses in this step.
    token_count, right_count = sum_over_ranks(np.array([local_tokens, local_right_tokens], np.float64))
    weights = [np.zeros(n) for n in lengths]
    for i in members:
        if right[i]:
            weights[i][:] = token_count / right_count
    return weights
