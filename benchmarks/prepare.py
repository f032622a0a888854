"""Measure data preparation beside a plain ``datasets.map`` that calls the same functions on every row.

Both read one JSONL of puzzles, drop duplicates, evaluation problems and rows that break a rule, and write a JSONL.
Each runs in a new process; its peak is the memory of that process and its workers, sampled, without mapped files.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil

from benchmarks.subprocess_bench import BenchRow, run_in_subprocess
from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.curation.decontaminate import load_problems
from ovr_megatron.curation.dedup import first_equal, hashes
from ovr_megatron.curation.minhash import near_duplicates
from ovr_megatron.curation.patterns import broken_rule
from ovr_megatron.curation.prepare import prepare
from ovr_megatron.curation.settings import DecontaminateConfig, PrepareConfig, StageName
from ovr_megatron.data.puzzles import open_puzzle
from ovr_megatron.data.row_json import RowJson, row_to_json

PUZZLES = ("puzzle:digits?form=text", "puzzle:ordering", "puzzle:countdown")
HELD_OUT = "puzzle:digits?form=text&split=heldout&answered=0"
STAGES: list[StageName] = ["collect", "dedup", "decontaminate", "patterns"]


def write_puzzles(path: Path, count: int) -> None:
    """Write ``count`` rows, taken from `PUZZLES` in turn."""
    sources = [open_puzzle(name) for name in PUZZLES]
    with path.open("w") as file:
        for index in range(count):
            row = sources[index % len(sources)][index // len(sources)]
            file.write(json.dumps(row_to_json(row)) + "\n")


def make_config(rows: Path, out: Path, workers: int) -> PrepareConfig:
    """Return the recipe that both follow."""
    return PrepareConfig(
        dir=str(out),
        stages=STAGES,
        workers=workers,
        data=DataConfig(sources=[SourceConfig(path=str(rows))]),
        decontaminate=DecontaminateConfig(sources=[SourceConfig(path=HELD_OUT)], threshold=1.0),
    )


def prepare_rows(config: PrepareConfig) -> int:
    """Prepare the rows with our stages, and return how many are kept."""
    last_stage = prepare(config)
    return int(json.loads((last_stage / "report.json").read_text())["kept"])


def map_rows(config: PrepareConfig) -> int:
    """Prepare the rows as the rival does, with one ``map`` and one ``select``, and return how many are kept."""
    datasets.disable_progress_bars()
    # An empty cache: a result of an earlier run must not be found.
    datasets.config.HF_DATASETS_CACHE = Path(config.dir)
    problems = load_problems(config)

    def check(row: RowJson) -> dict[str, Any]:
        exact, kind, signature = hashes(config.dedup, row)
        bad = problems.contamination(row) is not None or broken_rule(config.patterns, True, row) is not None
        # Arrow infers int64 for Python's integers, and these are unsigned: moved by half of the range they fit.
        return {"exact": exact - 2**63, "kind": kind - 2**63, "signature": signature, "bad": bad}

    table = datasets.load_dataset("json", data_files=config.data.sources[0].path, split="train")
    column_names = ["exact", "kind", "signature", "bad"]
    processes = config.workers if config.workers > 1 else None
    checked = table.map(check, num_proc=processes).with_format("numpy")
    columns = checked.select_columns(column_names)[:]
    duplicate_of = first_equal(columns["exact"])
    keep = (duplicate_of < 0) & ~columns["bad"]
    signatures = columns["signature"].astype(np.uint32)
    kinds = columns["kind"].view(np.uint64)
    unique = np.flatnonzero(duplicate_of < 0)
    leaders = near_duplicates(signatures[unique], kinds[unique], config.dedup.bands, config.dedup.threshold)
    keep[unique[leaders >= 0]] = False
    selected = checked.with_format(None).select(np.flatnonzero(keep)).remove_columns(column_names)
    selected.to_json(f"{config.dir}/rows.jsonl")
    return int(keep.sum())


OURS = "ours"
RIVAL = "datasets.map"
_PREPARE: dict[str, Callable[[PrepareConfig], int]] = {OURS: prepare_rows, RIVAL: map_rows}


def measure(method: str, rows: str, out: str, workers: int) -> BenchRow:
    """Prepare the file ``rows`` by ``method``, `OURS` or `RIVAL`, in this process.

    Returns:
        ``kept`` rows, ``seconds``, ``cpu_seconds``, and ``peak_bytes`` beyond the libraries', the last two with the
        worker processes.
    """
    process = psutil.Process()
    ended = threading.Event()
    peak = 0

    def watch() -> None:
        # Sampled, because the kernel knows no peak of several processes together.
        nonlocal peak
        while not ended.wait(0.2):
            peak = max(peak, _private_bytes(process))

    bytes_before = _private_bytes(process)
    cpu_before = _cpu_seconds()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    rows_kept = _PREPARE[method](make_config(Path(rows), Path(out), workers))
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    return {
        "kept": rows_kept,
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds() - cpu_before,
        "peak_bytes": max(peak, _private_bytes(process)) - bytes_before,
    }


def _cpu_seconds() -> float:
    """Return the user and system time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _private_bytes(process: psutil.Process) -> int:
    """Return the memory of the process and its children that is theirs alone: pages of mapped files do not count."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            info = member.memory_info()
            total += info.rss - info.shared
        except psutil.NoSuchProcess:
            continue  # a worker that has ended since
    return total


def run(count: int, workers: int, rounds: int) -> list[BenchRow]:
    """Measure both in turns; the best of ``rounds`` counts; ``ratio`` is the rival's seconds over ours."""
    best: dict[str, BenchRow] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "rows.jsonl"
        write_puzzles(file, count)
        for turn in range(rounds):
            for method in _PREPARE:
                # A new folder each time: `datasets` would find its results of the last turn in the old one.
                (result,) = run_in_subprocess(__name__, method, file, folder / f"{method}{turn}", workers)
                if method not in best or result["seconds"] < best[method]["seconds"]:
                    best[method] = result
    rows = []
    for method, result in best.items():
        row: BenchRow = {"name": method, "rows": count, "workers": workers}
        row["rows_per_second"] = count / result["seconds"]
        row |= result
        if method == OURS:
            row["ratio"] = best[RIVAL]["seconds"] / result["seconds"]
            row["cpu_ratio"] = best[RIVAL]["cpu_seconds"] / result["cpu_seconds"]
        rows.append(row)
    return rows


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text."""
    lines = [f"{'':14}{'rows':>9}{'kept':>9}{'rows/s':>9}{'seconds':>9}{'CPU s':>8}{'peak MB':>9}{'ratio':>7}"]
    for row in rows:
        line = f"{row['name']:14}{row['rows']:9,}{row['kept']:9,}{row['rows_per_second']:9,.0f}"
        line += f"{row['seconds']:9.1f}{row['cpu_seconds']:8.1f}{row['peak_bytes'] / 1e6:9,.0f}"
        if "ratio" in row:
            line += f"{row['ratio']:7.2f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    method, rows_file, out_folder, workers = sys.argv[1:5]
    print(json.dumps(measure(method, rows_file, out_folder, int(workers))))
