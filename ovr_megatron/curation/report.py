"""Report of a stage: rows kept and dropped by reason, examples, and a figure, in the stage's folder."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from ovr_megatron.curation.text import prompt_text, response_text
from ovr_megatron.data.row_json import RowJson
from ovr_megatron.runtime.files import write_json

matplotlib.use("Agg")  # draws into files; needs no display

EXAMPLES = 5  # of each reason
_EXCERPT = 300  # characters of prompt and of response
_SAMPLE = 100_000  # values of a measure that the figure shows at most
_REASONS = 12  # bars of the figure


Example = dict[str, object]  # of a dropped row: what `excerpt` returns, and the details of its stage


class StageReport:
    """Counts of rows by source and reason, examples, and samples of measured values."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._kept: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[str, list[Example]] = defaultdict(list)
        self._values: dict[str, list[float]] = defaultdict(list)
        self._value_counts: Counter[str] = Counter()
        self._rng = np.random.default_rng(0)  # a fixed seed: the same rows give the same report

    @property
    def kept(self) -> int:
        """Number of rows kept so far."""
        return self._kept.total()

    @property
    def dropped(self) -> int:
        """Number of rows dropped so far."""
        total = 0
        for counts in self._dropped.values():
            total += counts.total()
        return total

    def empty_sources(self) -> list[str]:
        """Describe the sources of which every row was dropped: name, number of rows, most frequent reason."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        # Counts are stored by reason; here each source needs its own reasons.
        for reason, by_source in self._dropped.items():
            for source, count in by_source.items():
                counts[source][reason] = count
        sentences = []
        for source in sorted(counts):
            if self._kept[source]:
                continue
            reasons = counts[source]
            [(reason, _)] = reasons.most_common(1)
            total = reasons.total()
            sentences.append(f"{source} ({total:,} rows, most for: {reason})")
        return sentences

    def count_kept(self, source: str) -> None:
        """Count a kept row."""
        self._kept[source] += 1

    def count_dropped(
        self,
        source: str,
        reason: str,
        row: str | Mapping[str, object],
        details: Mapping[str, object],
    ) -> None:
        """Count a dropped row; the first `EXAMPLES` of each reason become examples, with ``details``."""
        self._dropped[reason][source] += 1
        examples = self._examples[reason]
        if len(examples) < EXAMPLES:
            # Decoded only here: most dropped rows are counted and no more.
            decoded = json.loads(row) if isinstance(row, str) else row
            examples.append({**excerpt(decoded), **details})

    def add_value(self, measure: str, value: float) -> None:
        """Add a measured value for the figure; of more than `_SAMPLE` a uniform sample stays (reservoir sampling)."""
        self._value_counts[measure] += 1
        values = self._values[measure]
        if len(values) < _SAMPLE:
            values.append(value)
            return
        count = self._value_counts[measure]
        index = int(self._rng.integers(count))
        if index < _SAMPLE:
            values[index] = value

    def write(self, folder: Path, name: str, extra: Mapping[str, object]) -> None:
        """Write ``report.json``, with the entries of ``extra`` at its end, and ``figure.png``."""
        totals: Counter[str] = Counter()
        for reason, counts in self._dropped.items():
            totals[reason] = counts.total()
        # Of equally frequent reasons the one that occurred first comes first.
        dropped_counts = dict(totals.most_common())
        reasons = list(dropped_counts)
        measures = {}
        for measure, values in self._values.items():
            measures[measure] = _quantiles(values)
        seconds = time.perf_counter() - self._start
        report = {
            "stage": name,
            "rows_in": self.kept + self.dropped,
            "kept": self.kept,
            "dropped": dropped_counts,
            "by_source": self._counts_by_source(),
            "measures": measures,
            "examples": {reason: self._examples[reason] for reason in reasons},
            "seconds": round(seconds, 3),
            **extra,
        }
        write_json(folder / "report.json", report, indent=1, ensure_ascii=False)
        self._draw(folder / "figure.png", name, reasons)

    def _counts_by_source(self) -> dict[str, dict[str, int]]:
        sources = set(self._kept)
        for counts in self._dropped.values():
            sources.update(counts.keys())
        by_source = {}
        for source in sorted(sources):
            dropped = sum(counts[source] for counts in self._dropped.values())
            by_source[source] = {"kept": self._kept[source], "dropped": dropped}
        return by_source

    def _draw(self, path: Path, name: str, reasons: list[str]) -> None:
        """Draw bars of the kept rows and of the most frequent reasons, and a histogram of each measure."""
        histograms = len(self._values)
        bars = 2 + min(len(reasons), _REASONS)
        bars_height = 0.28 * bars
        height = 1.2 + bars_height + 2.4 * histograms
        figure = Figure(figsize=(6.4, height))
        grid = figure.subplots(1 + histograms, 1, squeeze=False)
        axes = grid[:, 0]
        labels = ["kept"]
        counts = [self.kept]
        colours = ["tab:green"]
        for reason in reasons[:_REASONS]:
            labels.append(f"{reason} ")
            counts.append(self._dropped[reason].total())
            colours.append("tab:red")
        bar_axis = axes[0]
        container = bar_axis.barh(labels, counts, color=colours)
        bar_axis.bar_label(container, fmt="{:,.0f}", padding=3)
        bar_axis.invert_yaxis()  # the first bar on top
        bar_axis.margins(x=0.15)
        bar_axis.set_title(f"{name}: rows")
        for axis, (measure, values) in zip(axes[1:], self._values.items(), strict=True):
            axis.hist(values, bins=60, color="tab:blue")
            axis.set_yscale("log")
            axis.set_title(measure)
        figure.tight_layout()
        figure.savefig(path, dpi=110)


def excerpt(row: Mapping[str, object]) -> dict[str, object]:
    """Return the name and the beginning of a row: ``id``, ``source``, ``prompt``, ``response`` and ``answer``.

    Empty ones are left out.  A row without messages is returned as it is.
    """
    if "messages" not in row:
        return dict(row)
    whole_row = cast(RowJson, row)
    fields = {
        "id": row.get("id"),
        "source": row.get("source"),
        "prompt": shorten(prompt_text(whole_row)),
        "response": shorten(response_text(whole_row) or ""),
        "answer": row.get("answer"),
    }
    filled_fields = {}
    for name, value in fields.items():
        if value:
            filled_fields[name] = value
    return filled_fields


def shorten(text: str) -> str:
    """Return the beginning and the end of a long text."""
    if len(text) <= _EXCERPT:
        return text
    half = _EXCERPT // 2
    beginning = text[:half]
    end = text[-half:]
    return f"{beginning} [...] {end}"


def _quantiles(values: list[float]) -> dict[str, float]:
    levels = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
    quantiles = np.quantile(values, levels)
    by_level = {}
    for level, value in zip(levels, quantiles, strict=True):
        by_level[f"{level:g}"] = float(value)
    return by_level
