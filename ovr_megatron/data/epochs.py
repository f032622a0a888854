"""Plan epochs over samples of known lengths: their packs and the order, a function of seed and epoch alone.

An epoch has every sample of a source of weight w floor(w) times, and for the fraction of w a share of the samples that
moves on from epoch to epoch: with weight 0.2, five epochs have every sample once.  The copies are shuffled, packed by
best fit in that order over the whole epoch, and the packs are shuffled.  Steps take ``packs_per_step`` packs each; the
packs after the last full step of an epoch begin the first step of the next, so no pack is left out and none is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from ovr_megatron.config import ConfigError, DataConfig
from ovr_megatron.data.best_fit import assign_packs
from ovr_megatron.data.packing import Pack, pack
from ovr_megatron.data.processing import TooLongError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.runtime.balance import balance

# Each shuffle has a stream of random numbers of its own: of the copies, of a source's fraction, of the packs.
_SAMPLES, _FRACTIONS, _PACKS = range(3)


@dataclass(frozen=True)
class EpochPlan:
    """The packs of one epoch in order: pack p holds the samples ``members[bounds[p] : bounds[p + 1]]``."""

    members: np.ndarray
    bounds: np.ndarray

    def __len__(self) -> int:
        """Return the number of packs."""
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the samples of pack ``index``."""
        start = self.bounds[index]
        end = self.bounds[index + 1]
        return self.members[start:end]


def random_order(count: int, *key: int) -> np.ndarray:
    """Return a permutation of ``count`` numbers, a function of ``key`` alone.

    It sorts raw bits, which NumPy promises never to change (NEP 19); ``Generator.permutation`` may change.
    """
    generator = np.random.PCG64(np.random.SeedSequence(key))
    bits = generator.random_raw(count)
    return np.argsort(bits, kind="stable")


def choose_samples(
    groups: Sequence[np.ndarray],
    weights: Sequence[float],
    seed: int,
    epoch: int,
) -> np.ndarray:
    """Return the samples of an epoch, with their copies, source by source.

    Args:
        groups: Indices of each source's samples.
        weights: How often an epoch has each sample of a source, as decimal numbers: 0.1 is a tenth.
        seed: Decides the order in which epochs take the samples of a fraction.
        epoch: Counted from 0.
    """
    samples = [np.zeros(0, np.int64)]  # `np.concatenate` takes no empty list
    for source, (group, weight) in enumerate(zip(groups, weights, strict=True)):
        # Exact, from the decimal digits: the float 0.3 is a little less, and rounding down would lose a sample.
        copies, fraction = divmod(Fraction(str(weight)), 1)
        samples += [group] * int(copies)
        size = len(group)
        share = fraction * size
        start = int(share * epoch)
        end = int(share * (epoch + 1))
        if end > start:
            # One order for all epochs, in which each goes on where the last one ended.
            order = random_order(size, seed, _FRACTIONS, source)
            positions = np.arange(start, end) % size
            samples.append(group[order[positions]])
    return np.concatenate(samples)


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
    samples = choose_samples(groups, weights, seed, epoch)
    sample_order = random_order(len(samples), seed, _SAMPLES, epoch)
    samples = samples[sample_order]
    assigned = assign_packs(lengths[samples], pack_tokens)
    packs = int(assigned.max(initial=-1)) + 1
    pack_order = random_order(packs, seed, _PACKS, epoch)
    position = np.argsort(pack_order)  # of each pack in the epoch
    sample_pack = position[assigned]
    member_order = np.argsort(sample_pack, kind="stable")  # stable: a pack's samples stay in shuffled order
    counts = np.bincount(sample_pack, minlength=packs)
    bounds = np.cumsum([0, *counts])
    return EpochPlan(samples[member_order], bounds)


class SampleSet(Protocol):
    """Finitely many samples whose lengths are known: `TokenisedSet` or `RowSet`.

    Attributes:
        title: The setting that names the set, for errors.
        lengths: int32[N], tokens of each sample.
        prompts: int32[N], tokens of each sample before its first target.
        sources: int32[N], index of the source of each.
        weights: How often an epoch has each sample of a source.
        work: int64[N] or float64[N], the work of each, in any unit.
        dropped: Rows that are no sample.
        digest: A fingerprint of what the order depends on.
    """

    title: str
    lengths: np.ndarray
    prompts: np.ndarray
    sources: np.ndarray
    weights: list[float]
    work: np.ndarray
    dropped: int
    digest: str

    def __len__(self) -> int:
        """Return N."""

    def where(self, index: int) -> str:
        """Return the place of a sample's row."""

    def samples(self, indices: Sequence[int] | np.ndarray) -> list[Sample]:
        """Return several samples."""

    def replies(self, indices: np.ndarray) -> tuple[int, int]:
        """Return the assistant messages of samples, and how many are learned; zeros where they are not known."""


class EpochStream:
    """Supervised packs of a set of samples, step by step, epoch after epoch.

    Every rank makes the same plan and reads the samples of its own packs only.

    Attributes:
        dropped: Samples left out, because they are too long or cannot be used.
        fill: Share of the last step's pack space that tokens took.
        replies: Assistant messages of the last step's samples, and how many are learned; zeros of a tokenised set.
        epoch: Epoch of the next pack, counted from 0.
    """

    def __init__(
        self,
        samples: SampleSet,
        config: DataConfig,
        packs_per_step: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        max_positions: int | None = None,
        skipped: SkippedRows | None = None,
        held_out: np.ndarray | None = None,
    ) -> None:
        """Set up; nothing is planned yet.

        Args:
            samples: The set.
            config: Length limits, and ``on_error``.
            packs_per_step: Packs of a step over all replicas.
            seed: The run's seed.
            dp_rank: This replica.
            dp_size: Number of replicas.
            max_positions: The model's longest document.
            skipped: Where samples left out are listed.
            held_out: bool[N], the samples that are not trained; they are not counted as dropped.

        Raises:
            ConfigError: ``packs_per_step`` is not a multiple of ``dp_size``, or no sample is left.
            TooLongError: a sample is over a limit and ``data.on_error`` is ``stop``.
        """
        if packs_per_step % dp_size:
            raise ConfigError(
                f"packs_per_step={packs_per_step} cannot be shared by {dp_size} data-parallel replicas; "
                f"make it a multiple of {dp_size}"
            )
        self.pack_tokens = config.pack_tokens
        self.packs_per_step = packs_per_step
        self.fill = 0.0
        self.epoch = 0
        self.replies = (0, 0)
        self._set = samples
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._weights = samples.weights
        trained = fits_limits(samples, config, max_positions, skipped)
        self.dropped = samples.dropped + len(trained) - int(trained.sum())
        self._held_out: list[int] = []
        if held_out is not None:
            # Of each source: which samples they are follows from their number.
            self._held_out = np.bincount(samples.sources[held_out], minlength=len(self._weights)).tolist()
            trained &= ~held_out
        self._groups: list[np.ndarray] = []
        for source in range(len(self._weights)):
            is_of_source = samples.sources == source
            self._groups.append(np.flatnonzero(trained & is_of_source))
        if not trained.any():
            raise ConfigError(f"{samples.title}: all usable samples are held out; lower validation.share or .rows")
        self._pack = 0  # of the epoch, the next to be taken
        empty_plan = EpochPlan(np.zeros(0, np.int64), np.zeros(1, np.int64))
        self._plan = (-1, empty_plan)  # the last planned epoch

    def __iter__(self) -> Iterator[list[Pack]]:
        return self

    def __next__(self) -> list[Pack]:
        """Return this rank's packs of the next step.

        Raises:
            RowError: the set was changed since it was written.
        """
        plan = [self._next_members() for _ in range(self.packs_per_step)]
        costs = []
        token_count = 0
        for members in plan:
            token_count += int(self._set.lengths[members].sum())
            costs.append(self._set.work[members].sum().item())
        space = self.packs_per_step * self.pack_tokens
        self.fill = token_count / space
        self.replies = self._set.replies(np.concatenate(plan))
        # Every rank has the same plan and so computes the same shares, without a collective.
        shares = balance(costs, self._dp_size, equal_counts=True)
        packs = []
        for index in shares[self._dp_rank]:
            samples = self._set.samples(plan[index])
            packs.append(pack(samples))
        return packs

    @property
    def epoch_steps(self) -> float:
        """Steps of the first epoch; others differ by a few packs."""
        return len(self._planned(0)) / self.packs_per_step

    @property
    def progress(self) -> float:
        """Epochs that are done, with the part of the current one."""
        return self.epoch + self._pack / max(1, len(self._planned(self.epoch)))

    @property
    def trained_rows(self) -> int:
        """Number of samples that are trained, each counted once."""
        return sum(len(group) for group in self._groups)

    def steps(self, epochs: int) -> int:
        """Return the number of steps that take all packs of ``epochs`` epochs; the epoch after fills up the last step.

        Each epoch is planned for it: seconds for millions of samples.
        """
        packs = 0
        for epoch in range(epochs):
            packs += len(self._planned(epoch))
        return -(-packs // self.packs_per_step)

    def state(self) -> Mapping[str, Any]:
        """Return the position as JSON."""
        # Without what there is none of: a run that holds no sample out writes what it always did.
        identity = {key: value for key, value in self._identity().items() if value is not None}
        return {**identity, "epoch": self.epoch, "pack": self._pack}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go to a position.

        Raises:
            ConfigError: the position is that of another set or seed, or of packs of another size.
        """
        for key, current in self._identity().items():
            stored = state.get(key)
            if stored != current:
                raise ConfigError(
                    f"{self._set.title}: the checkpoint was written with {key} {stored}, this run has {current}; "
                    "use the same data, seed and limits, or another run.dir"
                )
        self.epoch = state["epoch"]
        self._pack = state["pack"]

    def _identity(self) -> dict[str, object]:
        """Return the values on which the order depends."""
        return {
            "seed": self._seed,
            "set": self._set.digest,
            "weights": self._weights,
            "pack_tokens": self.pack_tokens,
            "dropped": self.dropped,
            "held_out": self._held_out or None,
        }

    def _next_members(self) -> np.ndarray:
        """Return the samples of the next pack, of the next epoch where this one has no more."""
        while self._pack >= len(self._planned(self.epoch)):
            # An epoch of small weights may have no pack at all.
            self.epoch += 1
            self._pack = 0
        members = self._planned(self.epoch)[self._pack]
        self._pack += 1
        return members

    def _planned(self, epoch: int) -> EpochPlan:
        """Plan an epoch; the last plan is cached."""
        planned_epoch, plan = self._plan
        if planned_epoch != epoch:
            plan = plan_epoch(
                self._set.lengths,
                self._groups,
                self._weights,
                self.pack_tokens,
                self._seed,
                epoch,
            )
            self._plan = (epoch, plan)
        return plan


def fits_limits(
    samples: SampleSet,
    config: DataConfig,
    max_positions: int | None,
    skipped: SkippedRows | None,
) -> np.ndarray:
    """Return bool[N], the samples within every limit, and list the others in ``skipped``.

    Raises:
        TooLongError: a sample is over a limit and ``data.on_error`` is ``stop``.
        ConfigError: no sample is within the limits.
    """
    limits = [
        ("data.pack_tokens", samples.lengths, config.pack_tokens),
        ("data.max_prompt_tokens", samples.prompts, config.max_prompt_tokens),
        ("the model's positions", samples.lengths, max_positions or 2**31),
    ]
    fits = np.ones(len(samples), bool)
    for name, sizes, limit in limits:
        # A sample over several limits is listed once, with the first.
        over = np.flatnonzero(fits & (sizes > limit))
        fits[over] = False
        for index in over.tolist():
            remedy = f"raise the limit, or leave out what is too long with data.on_error=skip ({len(over)} samples)"
            problem = f"takes {sizes[index]} tokens, more than {name}={limit}"
            error = TooLongError(samples.where(index), "messages", problem, remedy)
            if config.on_error == "stop":
                raise error
            if skipped is not None:
                skipped.add(error)
    if not fits.any():
        raise ConfigError(f"{samples.title}: no sample is within the limits; raise data.pack_tokens")
    return fits
