"""A saved iteration once more, in any layout: log-probabilities, values, advantages and steps beside the saved ones.

``tools/replay.py RUN ITERATION [parallel.tp=2 ...]`` needs the rollouts of that iteration and the checkpoint that it
began from (none for iteration 0).  It changes nothing in the run folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ovr_megatron.checkpoint import store
from ovr_megatron.config import ConfigError, RLConfig, build
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.iteration import Clock, learn
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.rl.training import build_models
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.runlog import read_metrics

METRICS = (
    *("critic/loss", "critic/grad_norm", "critic/explained_variance", "critic/value_std"),
    *("policy/loss", "policy/entropy", "policy/grad_norm", "policy/reference_kl", "rollout/mismatch_mean"),
)
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Line:
    """One number or array: the saved mean, the mean now, and the largest difference over the largest saved value."""

    name: str
    saved: float
    now: float
    difference: float


def load(run: Path, overrides: Sequence[str]) -> RLConfig:
    """The configuration of ``run`` with ``key=value`` on top.

    Raises:
        ConfigError: no run folder, or a key or value that cannot work.
    """
    path = run / run_folder.SETTINGS
    if not path.is_file():
        raise ConfigError(f"{run} is no run folder: it has no config.yaml")
    try:
        values = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path} with {' '.join(overrides)}: {error}") from error
    assert isinstance(values, DictConfig)
    config: RLConfig = build(RLConfig, values)
    return config


def replay(config: RLConfig, run: Path, iteration: int, world: World) -> list[Line]:
    """Learn from the rollouts of ``iteration`` as the run did; returns what was saved beside what came out.

    Raises:
        CheckpointError: the iteration's checkpoint was not kept (``run.keep_every``) or is damaged.
        ArchiveError: its rollouts are missing or damaged.
        RunLockedError: a job works on the run folder.
    """
    run_folder.enter(run, run_folder.REPLAY, world.is_main)
    source = store.weights_of(config.model.path)
    processor = Processor(source, config.data)
    saved = archive.read(run, iteration, world)
    models, engines = build_models(config, source, processor, world)
    if iteration:
        store.restore(store.checkpoint_at(run / "checkpoints", iteration, world), engines)
    skipped = SkippedRows() if config.data.on_error == "skip" else None  # they were listed by the run
    prompts = PromptStream(open_stream(config.data, config.run.seed, skipped), processor, config.reward.rules, skipped)
    outcome = learn(models, archive.restore(saved, prompts), iteration, Clock())
    own = outcome.experience
    everything = [archive.read_all(run, iteration), {}]
    if models.policy.layout.leads_replica:
        for at, r in enumerate(own.responses):
            given = {name: getattr(own, name) for name in archive.ARRAYS}
            everything[1][r.prompt, r.sample] = {n: np.asarray(v[at]) for n, v in given.items() if v is not None}
    lines = [_compared(name, *everything) for name in archive.ARRAYS if getattr(own, name) is not None]
    logged = _logged(run, iteration)
    for name in METRICS:
        if name in logged and name in outcome.metrics:
            before, after = logged[name], outcome.metrics[name]
            lines.append(Line(name, before, after, abs(after - before) / max(abs(before), 1e-6)))
    return lines


def _compared(name: str, saved: dict, now: dict) -> Line:
    """The array ``name`` over all responses of all ranks."""
    sums = torch.zeros(3, dtype=torch.float64)  # of the saved, of those now, number
    peaks = torch.zeros(2, dtype=torch.float64)  # of the difference, of the saved
    for key, arrays in now.items():
        before, after = saved[key][name], arrays[name]
        sums += torch.tensor([before.sum(), after.sum(), len(after)], dtype=torch.float64)
        found = torch.tensor([np.abs(after - before).max(initial=0), np.abs(before).max(initial=0)])
        peaks = torch.maximum(peaks, found.double())
    dist.all_reduce(sums)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    before, after, count = sums.tolist()
    return Line(name, before / count, after / count, float(peaks[0] / max(float(peaks[1]), 1e-6)))


def _logged(run: Path, iteration: int) -> dict[str, float]:
    lines = read_metrics(run / "metrics" / "train.jsonl")
    return next((line for line in lines if line["step"] == iteration), {})


def show(lines: Sequence[Line]) -> str:
    """A table of ``lines``."""
    rows = [f"{'':28}{'saved':>14}{'now':>14}{'difference':>14}"]
    rows += [f"{line.name:28}{line.saved:14.6g}{line.now:14.6g}{line.difference:14.2e}" for line in lines]
    return "\n".join(rows)
