"""What a stage kept and dropped, and why: counts, examples, and a figure, in the stage's folder."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ovr_megatron.curation.text import prompt_text, response_text

matplotlib.use("Agg")

EXAMPLES = 5  # of each reason
_EXCERPT = 300  # characters of prompt and of response
_SAMPLE = 100_000  # values of a measure that the figure looks at
_REASONS = 12  # bars of the figure


class Tally:
    """Counts rows by source and reason, keeps examples, and samples of measured values."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._kept: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._values: dict[str, list[float]] = defaultdict(list)
        self._seen: Counter[str] = Counter()
        self._rng = np.random.default_rng(0)

    @property
    def kept(self) -> int:
        """Rows kept so far."""
        return self._kept.total()

    @property
    def dropped(self) -> int:
        """Rows dropped so far."""
        return sum(counts.total() for counts in self._dropped.values())

    def emptied(self) -> list[str]:
        """Sources of which every row was dropped, each with the number and the reason of most."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for reason, by_source in self._dropped.items():
            for source, count in by_source.items():
                counts[source][reason] = count
        sentences = []
        for source in sorted(source for source in counts if not self._kept[source]):
            reason = counts[source].most_common(1)[0][0]
            sentences.append(f"{source} ({counts[source].total():,} rows, most for: {reason})")
        return sentences

    def keep(self, source: str) -> None:
        """Count a row that stays."""
        self._kept[source] += 1

    def drop(self, source: str, reason: str, row: str | Mapping[str, Any], told: Mapping[str, Any]) -> None:
        """Count a row that goes; the first ones of each reason become examples."""
        self._dropped[reason][source] += 1
        if len(self._examples[reason]) < EXAMPLES:
            self._examples[reason].append({**excerpt(json.loads(row) if isinstance(row, str) else row), **told})

    def value(self, measure: str, value: float) -> None:
        """Note a measured value for the figure; of many a uniform sample is kept."""
        self._seen[measure] += 1
        values = self._values[measure]
        if len(values) < _SAMPLE:
            values.append(value)
        elif (place := int(self._rng.integers(self._seen[measure]))) < _SAMPLE:
            values[place] = value

    def write(self, folder: Path, name: str, told: Mapping[str, Any]) -> None:
        """Write ``report.json`` and ``figure.png``; ``told`` joins the report."""
        reasons = sorted(self._dropped, key=lambda reason: -self._dropped[reason].total())
        sources = sorted(set(self._kept).union(*self._dropped.values()))
        report = {
            "stage": name,
            "rows_in": self.kept + self.dropped,
            "kept": self.kept,
            "dropped": {reason: self._dropped[reason].total() for reason in reasons},
            "by_source": {
                source: {"kept": self._kept[source], "dropped": sum(c[source] for c in self._dropped.values())}
                for source in sources
            },
            "measures": {measure: _quantiles(values) for measure, values in self._values.items()},
            "examples": {reason: self._examples[reason] for reason in reasons},
            "seconds": round(time.perf_counter() - self._began, 3),
            **told,
        }
        (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self._draw(folder / "figure.png", name, reasons)

    def _draw(self, path: Path, name: str, reasons: list[str]) -> None:
        panels = 1 + len(self._values)
        figure = Figure(figsize=(6.4, 1.2 + 0.28 * (2 + min(len(reasons), _REASONS)) + 2.4 * len(self._values)))
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        shown = [(f"{reason} ", self._dropped[reason].total(), "tab:red") for reason in reasons[:_REASONS]]
        bars = [("kept", self.kept, "tab:green"), *shown]
        axes[0].barh([bar[0] for bar in bars], [bar[1] for bar in bars], color=[bar[2] for bar in bars])
        axes[0].bar_label(axes[0].containers[0], fmt="{:,.0f}", padding=3)
        axes[0].invert_yaxis()
        axes[0].margins(x=0.15)
        axes[0].set_title(f"{name}: rows")
        for axis, (measure, values) in zip(axes[1:], self._values.items(), strict=True):
            axis.hist(values, bins=60, color="tab:blue")
            axis.set_yscale("log")
            axis.set_title(measure)
        figure.tight_layout()
        figure.savefig(path, dpi=110)


def excerpt(row: Mapping[str, Any]) -> dict[str, Any]:
    """Name and beginning of a row: ``id``, ``source``, ``prompt``, ``response`` and ``answer``, as far as there."""
    if "messages" not in row:
        return dict(row)
    told = {"id": row.get("id"), "source": row.get("source"), "prompt": shorten(prompt_text(row))}
    told |= {"response": shorten(response_text(row) or ""), "answer": row.get("answer")}
    return {name: value for name, value in told.items() if value}


def shorten(text: str) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= _EXCERPT else f"{text[: _EXCERPT // 2]} [...] {text[-_EXCERPT // 2 :]}"


def _quantiles(values: list[float]) -> dict[str, float]:
    at = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
    return {f"{q:g}": float(value) for q, value in zip(at, np.quantile(values, at), strict=True)}
