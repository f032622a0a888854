"""Settings of a run: its folder, checkpoints, logs, and the bounds of its health."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.fields import Count, LargeCount, NonNegativeFloat, PositiveFloat, PositiveInt, section


@section("run.")
class RunConfig:
    """The run folder, its checkpoints and logs, and when a run counts as unhealthy (``docs/running.md``)."""

    dir: str
    """Run folder; a run that ended goes on where it left off."""
    seed: LargeCount = 1
    """Seed of everything random."""
    save_every: PositiveInt = 100
    """Steps or iterations between checkpoints."""
    keep_last: Annotated[Count, ZeroMeans("keep all")] = 0
    """Newest checkpoints that stay."""
    keep_every: Annotated[Count, ZeroMeans("none")] = 0
    """Checkpoints whose step is a multiple of this stay, too."""
    export_every: Annotated[Count, ZeroMeans("none")] = 0
    """The policy of each multiple of this, and of the last checkpoint, is kept in exports/ for Transformers."""
    async_save: bool = True
    """Write checkpoints while training goes on."""
    save_buffer_gib: PositiveFloat = 4.0
    """Host memory on a rank in GiB for the copies that async_save writes from."""
    stop_on_failed_save: bool = False
    """End the run at a checkpoint that cannot be written; by default only the last one is needed."""
    log_every: PositiveInt = 1
    """Steps or iterations between lines of the log."""
    # Reports, figures and replays read what jsonl writes.
    trackers: list[str] = field(default_factory=lambda: ["jsonl", "tensorboard"])
    """Where metrics go: names of `ovr_megatron.runtime.trackers.table`, or package.module:function."""
    threads: Annotated[Count, ZeroMeans("as torch chooses")] = 0
    """CPU threads of a rank."""
    # Above the longest stretch without progress: vLLM's start may compile kernels for minutes.
    hang_timeout_s: Annotated[NonNegativeFloat, ZeroMeans("no bound")] = 1800.0
    """Bound of every hang in seconds: a rank ends that has had no engine step, pack or file of weights for so long, and
    a collective fails that waits longer."""
    peak_tflops: Annotated[NonNegativeFloat, ZeroMeans("measure")] = 0.0
    """Reference of perf/mfu in TFLOP/s; measured at the start by default."""
    spike_deviations: Annotated[NonNegativeFloat, ZeroMeans("no record")] = 6.0
    """Robust deviations above the median from which a loss counts as a spike."""
    spike_window: PositiveInt = 64
    """Last losses of which that median is taken."""

    def __post_init__(self) -> None:
        # Two trackers of one name would write each metric twice into one place.
        require(len(set(self.trackers)) == len(self.trackers), f"run.trackers={self.trackers} has a name twice")
        require(
            not self.export_every % self.save_every,
            f"run.export_every={self.export_every} must be a multiple of run.save_every={self.save_every}: "
            "checkpoints are what is exported",
        )
