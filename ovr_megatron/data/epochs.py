"""Epochs over a tokenised set: which samples, in which packs, in which order; a function of seed and epoch alone.

An epoch has every sample of a source of weight w floor(w) times, and of the fraction a part that goes round: with
weight 0.2, five epochs have every sample once.  The copies are shuffled, packed by best fit in that order over the
whole epoch, and the packs are shuffled.  Steps take ``packs_per_step`` packs each; what an epoch has beyond its last
whole step begins the first step of the next epoch, so no pack is left out and none is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.data.best_fit import assign_packs, balance
from ovr_megatron.data.packing import Pack, pack
from ovr_megatron.data.processing import TooLongError
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.tokenised import TokenisedSet

_SAMPLES, _PARTS, _PACKS = range(3)  # what is shuffled: each has a stream of random numbers of its own


@dataclass(frozen=True)
class EpochPlan:
    """The packs of one epoch in order: pack p holds the samples ``members[bounds[p] : bounds[p + 1]]``."""

    members: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        """Number of packs."""
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        """The samples of pack ``number``."""
        return self.members[self.bounds[number] : self.bounds[number + 1]]


def random_order(count: int, *key: int) -> np.ndarray:
    """A permutation of ``count`` numbers, a function of ``key`` alone.

    It sorts raw bits, which NumPy promises never to change (NEP 19); its own ``permutation`` it may.
    """
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(bits, kind="stable")


def choose_samples(groups: Sequence[np.ndarray], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch, with their copies, source by source.

    Args:
        groups: Numbers of each source's samples.
        weights: How often an epoch has them, as decimal numbers: 0.1 is a tenth.
        seed: Decides the order in which a fraction goes round.
        epoch: Counted from 0.
    """
    chosen = []
    for number, (group, weight) in enumerate(zip(groups, weights, strict=True)):
        whole, part = divmod(Fraction(str(weight)), 1)
        chosen += [group] * int(whole)
        start, end = (int(part * len(group) * turn) for turn in (epoch, epoch + 1))
        if end > start:
            round_ = random_order(len(group), seed, _PARTS, number)
            chosen.append(group[round_[np.arange(start, end) % len(group)]])
    return np.concatenate([np.zeros(0, np.int64), *chosen])


def plan_epoch(
    lengths: np.ndarray,
    groups: Sequence[np.ndarray],
    weights: Sequence[float],
    pack_tokens: int,
    seed: int,
    epoch: int,
) -> EpochPlan:
    """Choose, shuffle and pack the samples of an epoch.

    Args:
        lengths: int[N], tokens of each sample, at most ``pack_tokens`` for those in ``groups``.
        groups: See `choose_samples`.
        weights: See `choose_samples`.
        pack_tokens: Tokens of a pack.
        seed: The run's seed.
        epoch: Counted from 0.
    """
    chosen = choose_samples(groups, weights, seed, epoch)
    chosen = chosen[random_order(len(chosen), seed, _SAMPLES, epoch)]
    assigned = assign_packs(lengths[chosen], pack_tokens)
    packs = int(assigned.max()) + 1 if len(assigned) else 0
    place = np.argsort(random_order(packs, seed, _PACKS, epoch))  # of each pack in the order of the epoch
    placed = place[assigned]
    members = chosen[np.argsort(placed, kind="stable")]
    return EpochPlan(members, np.cumsum([0, *np.bincount(placed, minlength=packs)]))


class EpochStream:
    """Supervised packs of a tokenised set, step by step, epoch after epoch.

    Every rank makes the same plan and reads the samples of its own packs only.

    Attributes:
        dropped: Samples left out because they are too long.
        fill: Share of the last step's pack space that tokens took.
        replies: Not known here, zeros: the set's manifest counts the replies of each source.
        epoch: Epoch of the next pack, counted from 0.
    """

    def __init__(
        self,
        tokenised: TokenisedSet,
        config: DataConfig,
        packs_per_step: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_positions: int | None = None,
        skipped: SkippedRows | None = None,
    ) -> None:
        """Set up; nothing is planned yet.

        Args:
            tokenised: The set.
            config: Length limits, and ``on_error``.
            packs_per_step: Packs of a step over all replicas.
            seed: The run's seed.
            dp_rank: This replica.
            dp_size: Number of replicas.
            max_positions: The model's longest document.
            skipped: Where samples left out are listed.

        Raises:
            ConfigError: ``packs_per_step`` is not a multiple of ``dp_size``, or no sample is left.
            TooLongError: a sample is over a limit and ``data.on_error`` is ``stop``.
        """
        if packs_per_step % dp_size:
            raise ConfigError(
                f"packs_per_step={packs_per_step} cannot be shared by {dp_size} data-parallel replicas; "
                f"make it a multiple of {dp_size}"
            )
        self.pack_tokens, self.packs_per_step = config.pack_tokens, packs_per_step
        self.fill, self.epoch, self.replies = 0.0, 0, (0, 0)
        self._set, self._seed = tokenised, seed
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._weights = [source.weight for source in tokenised.manifest.sources]
        fits = _fitting(tokenised, config, max_positions, skipped)
        self.dropped = int(len(fits) - fits.sum())
        self._groups = [np.flatnonzero(fits & (tokenised.sources == k)) for k in range(len(self._weights))]
        self._pack, self._plan = 0, (-1, EpochPlan(np.zeros(0, np.int64), np.zeros(1, np.int64)))

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        """Return this rank's packs of the next step.

        Raises:
            RowError: the set was changed since it was written.
        """
        plan = [self._next_members() for _ in range(self.packs_per_step)]
        lengths = [self._set.lengths[members].astype(np.int64) for members in plan]
        self.fill = sum(int(each.sum()) for each in lengths) / (self.packs_per_step * self.pack_tokens)
        shares = balance([int((each**2).sum()) for each in lengths], self._dp_size)
        return [pack([self._set[int(i)] for i in plan[number]]) for number in shares[self._dp_rank]]

    def steps(self, epochs: int) -> int:
        """Steps that see ``epochs`` epochs whole; the last is filled up from the epoch after.

        Each epoch is planned for it: seconds for millions of samples.
        """
        packs = sum(len(self._planned(epoch)) for epoch in range(epochs))
        return -(-packs // self.packs_per_step)

    def state(self) -> dict[str, Any]:
        """Return the position as JSON."""
        return {**self._identity(), "epoch": self.epoch, "pack": self._pack}

    def load(self, state: dict[str, Any]) -> None:
        """Go to a position.

        Raises:
            ConfigError: the position is that of another set or seed, or of packs of another size.
        """
        for key, now in self._identity().items():
            if state.get(key) != now:
                raise ConfigError(
                    f"data.tokenised: the checkpoint was written with {key} {state.get(key)}, this run has {now}; "
                    "use the same set, seed and limits, or another run.dir"
                )
        self.epoch, self._pack = state["epoch"], state["pack"]

    def _identity(self) -> dict[str, Any]:
        """What decides the order."""
        return {
            "seed": self._seed,
            "set": self._set.manifest.digest,
            "weights": self._weights,
            "pack_tokens": self.pack_tokens,
            "dropped": self.dropped,
        }

    def _next_members(self) -> np.ndarray:
        while self._pack >= len(self._planned(self.epoch)):
            self.epoch, self._pack = self.epoch + 1, 0
        self._pack += 1
        return self._planned(self.epoch)[self._pack - 1]

    def _planned(self, epoch: int) -> EpochPlan:
        if self._plan[0] != epoch:
            arguments = (self._set.lengths, self._groups, self._weights, self.pack_tokens, self._seed)
            self._plan = (epoch, plan_epoch(*arguments, epoch))
        return self._plan[1]


def _fitting(
    tokenised: TokenisedSet, config: DataConfig, max_positions: int | None, skipped: SkippedRows | None
) -> np.ndarray:
    """bool[N], the samples within every limit."""
    limits = [
        ("data.pack_tokens", tokenised.lengths, config.pack_tokens),
        ("data.max_prompt_tokens", tokenised.prompts, config.max_prompt_tokens),
        ("the model's positions", tokenised.lengths, max_positions or 2**31),
    ]
    fits = np.ones(len(tokenised), bool)
    for name, sizes, limit in limits:
        over = np.flatnonzero(fits & (sizes > limit))
        fits[over] = False
        for index in over.tolist():
            remedy = f"raise the limit, or leave out what is too long with data.on_error=skip ({len(over)} samples)"
            problem = f"takes {sizes[index]} tokens, more than {name}={limit}"
            error = TooLongError(tokenised.where(index), "messages", problem, remedy)
            if config.on_error == "stop":
                raise error
            if skipped is not None:
                skipped.add(error)
    if not fits.any():
        raise ConfigError(f"data.tokenised={tokenised.folder}: no sample is within the limits; raise data.pack_tokens")
    return fits
