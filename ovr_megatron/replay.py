"""Repeat a saved PPO iteration in any layout; compare log-probabilities, values, advantages and steps with the saved.

``ovr replay RUN ITERATION [parallel.tp=2 ...]`` needs the rollouts of that iteration and the checkpoint that it
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
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.keys import replace_former_settings
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.iteration import Clock, learn
from ovr_megatron.rl.setup import build_models, open_model_and_prompts
from ovr_megatron.runtime import run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.folder_kinds import describe_folder
from ovr_megatron.runtime.step_lines import read_metrics

METRICS = (
    *("critic/loss", "critic/grad_norm", "critic/explained_variance", "critic/value_mean", "critic/value_std"),
    *("policy/loss", "policy/entropy", "policy/grad_norm", "policy/reference_kl", "rollout/mismatch_mean"),
    "policy/teacher_kl",
)
# Largest difference that counts as rounding, relative to the largest saved value.
BOUND = {"float32": 1e-4, "bfloat16": 5e-2}
SMALLEST_SCALE = 1e-6  # of the saved value that a difference is divided by
ArraysByResponse = dict[tuple[int, int], dict[str, np.ndarray]]  # by (prompt, sample), then by name


@dataclass(frozen=True)
class ReplayedValue:
    """One metric or array: the saved mean, the mean now, and the largest difference over the largest saved value."""

    name: str
    saved: float
    now: float
    difference: float


def load(run: Path, overrides: Sequence[str]) -> RLConfig:
    """Load the configuration of ``run``, changed by ``overrides`` of the form ``key=value``.

    Raises:
        ConfigError: no run folder, or a key or value that cannot work.
    """
    path = run / run_folder.SETTINGS
    if not path.is_file():
        raise ConfigError(describe_folder(run, "run") or f"{run} is no run folder: it has no config.yaml")
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(settings, dict)
        replace_former_settings(settings)  # type: ignore[arg-type]
        values = OmegaConf.merge(settings, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path} with {' '.join(overrides)}: {error}") from error
    assert isinstance(values, DictConfig)
    config: RLConfig = build(RLConfig, values)
    return config


def replay(config: RLConfig, run: Path, iteration: int, world: World) -> list[ReplayedValue]:
    """Learn from the rollouts of ``iteration`` as the run did; return each saved value beside the replayed one.

    A collective.

    Raises:
        CheckpointError: the iteration's checkpoint was not kept (``run.keep_every``) or is damaged.
        ArchiveError: its rollouts are missing or damaged.
        RunLockedError: a job works on the run folder.
    """
    run_folder.enter(run, run_folder.REPLAY, world.is_main)
    skipped = SkippedRows() if config.data.on_error == "skip" else None  # they were listed by the run
    model_folder, prompts = open_model_and_prompts(config, skipped)
    saved = archive.read(run, iteration, world)
    models, engines = build_models(config, model_folder, prompts.processor, world)
    if iteration:
        checkpoint = store.checkpoint_at(run / "checkpoints", iteration, world)
        store.restore(checkpoint, engines)
        if "warmup" in checkpoint.state:
            models.load_warmup(checkpoint.state["warmup"])
    result = learn(models, archive.restore(saved, prompts), iteration, Clock())
    experience = result.experience
    names = [name for name in archive.ARRAYS if getattr(experience, name) is not None]
    saved_arrays = archive.read_all(run, iteration)
    replayed_arrays: ArraysByResponse = {}
    # The ranks of a replica hold the same responses: its leader alone adds them to the sums over all ranks.
    if models.policy.layout.leads_replica:
        for index, response in enumerate(experience.responses):
            arrays = {name: np.asarray(getattr(experience, name)[index]) for name in names}
            replayed_arrays[response.prompt, response.sample] = arrays
    values = [_compare_array(name, saved_arrays, replayed_arrays) for name in names]
    logged = _read_logged_metrics(run, iteration)
    for name in METRICS:
        if name in logged and name in result.metrics:
            before = logged[name]
            after = result.metrics[name]
            difference = abs(after - before) / max(abs(before), SMALLEST_SCALE)
            values.append(ReplayedValue(name, before, after, difference))
    return values


def _compare_array(name: str, saved: ArraysByResponse, replayed: ArraysByResponse) -> ReplayedValue:
    """Compare the array ``name`` over all responses of all ranks.  A collective.

    Args:
        name: of the array.
        saved: arrays of the responses of all ranks.
        replayed: arrays of this rank's responses; empty on ranks that lead no replica.
    """
    sums = torch.zeros(3, dtype=torch.float64)  # of the saved values, of the replayed ones, and their number
    peaks = torch.zeros(2, dtype=torch.float64)  # of the differences, and of the saved values
    for key, arrays in replayed.items():
        before = saved[key][name]
        after = arrays[name]
        sums += torch.tensor([before.sum(), after.sum(), len(after)], dtype=torch.float64)
        response_peaks = torch.tensor([np.abs(after - before).max(initial=0), np.abs(before).max(initial=0)])
        peaks = torch.maximum(peaks, response_peaks.double())
    # Every rank takes part, also one without responses to compare.
    dist.all_reduce(sums)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    saved_sum, replayed_sum, count = sums.tolist()
    difference = float(peaks[0] / max(float(peaks[1]), SMALLEST_SCALE))
    return ReplayedValue(name, saved_sum / count, replayed_sum / count, difference)


def _read_logged_metrics(run: Path, iteration: int) -> dict[str, float]:
    """Return the metrics that the run logged of ``iteration``, or none."""
    for metrics in read_metrics(run / "metrics" / "train.jsonl"):
        if metrics["step"] == iteration:
            return metrics
    return {}


def show(values: Sequence[ReplayedValue]) -> str:
    """Format ``values`` as a table."""
    rows = [f"{'':28}{'saved':>14}{'now':>14}{'difference':>14}"]
    rows += [f"{value.name:28}{value.saved:14.6g}{value.now:14.6g}{value.difference:14.2e}" for value in values]
    return "\n".join(rows)
