"""Loss of every response under a small model; the high tail of each source is dropped (paper, 3.1, curation step 2).

The mean is over the response's tokens, the end token included, from the prompt log-probabilities of vLLM.
"""

from __future__ import annotations

import sys

import numpy as np

from ovr_megatron.curation.engines import engine_files, run_engines
from ovr_megatron.curation.settings import PrepareConfig, ProxyLossConfig
from ovr_megatron.curation.stage import PrepareStage, Work, listing
from ovr_megatron.runtime.journal import Journal

HIGH = "high loss"


def run(work: Work) -> None:
    """Score the responses, then cut each source's tail; prompt rows pass."""
    run_engines(work, "score")
    losses = np.full(work.count, np.nan)  # NaN: a prompt row, or one that could not be scored
    errors: dict[int, str] = {}
    for path in sorted(work.folder.glob("scores.*.jsonl")):
        with Journal(path) as journal:
            for score in journal:
                if "error" in score:
                    errors[score["key"]] = score["error"]
                else:
                    losses[score["key"]] = score["loss"]
    # One string object for each source, not for each row.
    names = [sys.intern(row.get("source", "")) for row in work.rows()]
    sources = np.array(names, dtype=object)
    bounds: dict[str, float] = {}
    for name in sorted(set(names)):
        source_losses = losses[sources == name]
        bounds[name] = bound(source_losses, work.config.proxy_loss)
    finite_bounds = {}
    for name, value in bounds.items():
        # JSON has no infinity: a source without a bound is left out.
        if np.isfinite(value):
            finite_bounds[name] = value
    work.extra["bounds"] = finite_bounds
    # The rows are read again: bounds are known only after all losses.
    for index, row in enumerate(work.rows()):
        source = sources[index]
        loss = float(losses[index])
        if index in errors:
            work.drop(row, source, "cannot be scored", error=errors[index])
            continue
        if np.isnan(loss):
            work.keep(row, source)
            continue
        work.report.add_value("mean loss of a response, nats per token", loss)
        if loss > bounds[source]:
            work.drop(row, source, HIGH, loss=round(loss, 4))
        else:
            work.keep(row, source, loss=round(loss, 6))


def bound(losses: np.ndarray, config: ProxyLossConfig) -> float:
    """Return the loss above which a row of this source is dropped; infinite for a source of few rows."""
    scored = losses[~np.isnan(losses)]
    if len(scored) < config.min_rows:
        return float("inf")
    if config.cut == "quantile":
        return float(np.quantile(scored, config.quantile))
    mean = scored.mean()
    deviation = scored.std()
    return float(mean + config.z * deviation)


def inputs(config: PrepareConfig) -> object:
    """Return a fingerprint of the small model's files."""
    return listing(config.proxy_loss.model or "")


def settings(config: PrepareConfig) -> list[object]:
    """Return the settings on which the losses depend."""
    return [config.proxy_loss, config.data]


STAGE = PrepareStage(
    "proxy_loss",
    run,
    settings,
    inputs,
    (*engine_files("score"), "scores.*.jsonl"),
)
