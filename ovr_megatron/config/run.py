"""Settings of a run: its folder, checkpoints, logs, and the bounds of its health."""

from __future__ import annotations

from dataclasses import dataclass, field

from ovr_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, its checkpoints and logs, and when a run counts as unhealthy (``docs/running.md``).

    The ``keep_last`` newest checkpoints stay (0: all), and every checkpoint whose step is a multiple of
    ``keep_every``.  The policy of each multiple of ``export_every``, and of the last checkpoint, is kept in
    ``exports/`` for Transformers.  With ``async_save`` checkpoints are written while training goes on, from copies
    that take at most ``save_buffer_gib`` of host memory on a rank.  ``hang_timeout_s`` bounds every hang: a rank ends
    that has had no engine step, pack or file of weights for so long, and a collective fails that waits longer.
    ``peak_tflops`` (0: measured at the start) is the reference of ``perf/mfu``.  ``trackers`` take the metrics every
    ``log_every`` steps: names of `ovr_megatron.runtime.trackers.table`, or ``package.module:function``.
    """

    dir: str
    seed: int = 1
    save_every: int = 100
    keep_last: int = 0
    keep_every: int = 0
    export_every: int = 0
    async_save: bool = True
    save_buffer_gib: float = 4.0
    stop_on_failed_save: bool = False
    log_every: int = 1
    trackers: list[str] = field(default_factory=lambda: ["jsonl", "tensorboard"])
    threads: int = 0
    hang_timeout_s: float = 1800.0
    peak_tflops: float = 0.0
    spike_deviations: float = 6.0
    spike_window: int = 64

    def __post_init__(self) -> None:
        for key in ("save_every", "log_every", "save_buffer_gib", "spike_window"):
            require(getattr(self, key) > 0, f"run.{key}={getattr(self, key)} must be positive")
        for key, zero in (
            ("keep_last", "keep all"),
            ("keep_every", "none"),
            ("export_every", "none"),
            ("hang_timeout_s", "no bound"),
            ("peak_tflops", "measure"),
            ("spike_deviations", "no record"),
        ):
            require(getattr(self, key) >= 0, f"run.{key}={getattr(self, key)} must be 0 ({zero}) or more")
        require(len(set(self.trackers)) == len(self.trackers), f"run.trackers={self.trackers} has a name twice")
        require(
            not self.export_every % self.save_every,
            f"run.export_every={self.export_every} must be a multiple of run.save_every={self.save_every}: "
            "checkpoints are what is exported",
        )
