"""Data preparation beside a plain ``datasets.map`` that calls the same functions on every row.

Both read one JSONL of puzzles, drop duplicates, evaluation problems and rows that break a rule, and write a JSONL.
Each has a process of its own; its peak is the memory of that process and its workers, sampled, without mapped files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.curation.decontaminate import load_problems
from ovr_megatron.curation.dedup import first_equal, hashes
from ovr_megatron.curation.minhash import near_duplicates
from ovr_megatron.curation.patterns import broken_rule
from ovr_megatron.curation.prepare import prepare
from ovr_megatron.curation.settings import DecontaminateConfig, PrepareConfig
from ovr_megatron.data.puzzles import open_puzzle
from ovr_megatron.data.row_json import row_to_json

PUZZLES = ("puzzle:digits?form=text", "puzzle:ordering", "puzzle:countdown")
HELD_OUT = "puzzle:digits?form=text&split=heldout&answered=0"
STAGES = ["collect", "dedup", "decontaminate", "patterns"]


def write_puzzles(path: Path, count: int) -> None:
    """Write ``count`` rows in turn of `PUZZLES`."""
    sources = [open_puzzle(name) for name in PUZZLES]
    with path.open("w") as file:
        for index in range(count):
            row = sources[index % len(sources)][index // len(sources)]
            file.write(json.dumps(row_to_json(row)) + "\n")


def settings(rows: Path, out: Path, workers: int) -> PrepareConfig:
    """The recipe of both."""
    return PrepareConfig(
        dir=str(out),
        stages=STAGES,
        workers=workers,
        data=DataConfig(sources=[SourceConfig(path=str(rows))]),
        decontaminate=DecontaminateConfig(sources=[SourceConfig(path=HELD_OUT)], threshold=1.0),
    )


def ours(config: PrepareConfig) -> int:
    """Prepare; returns the rows kept."""
    last = prepare(config)
    return int(json.loads((last / "report.json").read_text())["kept"])


def mapped(config: PrepareConfig) -> int:
    """The rival: one ``map`` that judges, one ``filter``; returns the rows kept."""
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = Path(config.dir)
    problems = load_problems(config)

    def judge(row: dict[str, Any]) -> dict[str, Any]:
        exact, kind, found = hashes(config.dedup, row)
        bad = problems.contamination(row) is not None or broken_rule(config.patterns, True, row) is not None
        return {"exact": exact - 2**63, "kind": kind - 2**63, "signature": found, "bad": bad}

    table = datasets.load_dataset("json", data_files=config.data.sources[0].path, split="train")
    columns = ["exact", "kind", "signature", "bad"]
    processes = config.workers if config.workers > 1 else None
    judged = table.map(judge, num_proc=processes).with_format("numpy")
    told = judged.select_columns(columns)[:]
    first = first_equal(told["exact"])
    keep = (first < 0) & ~told["bad"]
    signatures, kinds = told["signature"].astype(np.uint32), told["kind"].view(np.uint64)
    unique = np.flatnonzero(first < 0)
    leaders = near_duplicates(signatures[unique], kinds[unique], config.dedup.bands, config.dedup.threshold)
    keep[unique[leaders >= 0]] = False
    judged.with_format(None).select(np.flatnonzero(keep)).remove_columns(columns).to_json(f"{config.dir}/rows.jsonl")
    return int(keep.sum())


def measure(who: str, rows: str, out: str, workers: int) -> dict[str, Any]:
    """Rows kept, seconds, seconds of processor time and peak bytes beyond the libraries' of one way, with children."""
    ended = threading.Event()
    peak = [0]
    process = psutil.Process()

    def watch() -> None:
        while not ended.wait(0.2):
            peak[0] = max(peak[0], _resident(process))

    before, used = _resident(process), _processor_seconds()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    kept = {"ours": ours, "datasets.map": mapped}[who](settings(Path(rows), Path(out), workers))
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    cpu = _processor_seconds() - used
    return {
        "kept": kept,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "peak_bytes": max(peak[0], _resident(process)) - before,
    }


def _processor_seconds() -> float:
    """User and system time of this process and of the children that have ended."""
    told = os.times()
    return told.user + told.system + told.children_user + told.children_system


def _resident(process: psutil.Process) -> int:
    """Memory of the process and its children that is theirs alone: pages of mapped files do not count."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            info = one.memory_info()
            total += info.rss - info.shared
        except psutil.NoSuchProcess:
            continue
    return total


def rows(count: int, workers: int, rounds: int) -> list[dict[str, Any]]:
    """Measure both in turns; the best of ``rounds`` counts; ``ratio`` is the rival's seconds over ours."""
    best: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "rows.jsonl"
        write_puzzles(file, count)
        for turn in range(rounds):
            for who in ("ours", "datasets.map"):
                command = [sys.executable, "-m", __name__, who, str(file), f"{name}/{who}{turn}", str(workers)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"{who}: {done.stderr[-3000:]}")
                found = json.loads(done.stdout.splitlines()[-1])
                if who not in best or found["seconds"] < best[who]["seconds"]:
                    best[who] = found
    rival, own = best["datasets.map"], best["ours"]
    ratios = {"ratio": rival["seconds"] / own["seconds"], "cpu_ratio": rival["cpu_seconds"] / own["cpu_seconds"]}
    return [
        {"name": who, "rows": count, "workers": workers, "rows_per_second": count / found["seconds"], **found}
        | (ratios if who == "ours" else {})
        for who, found in best.items()
    ]


def show(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table of text."""
    lines = [f"{'':14}{'rows':>9}{'kept':>9}{'rows/s':>9}{'seconds':>9}{'CPU s':>8}{'peak MB':>9}{'ratio':>7}"]
    for row in results:
        line = f"{row['name']:14}{row['rows']:9,}{row['kept']:9,}{row['rows_per_second']:9,.0f}{row['seconds']:9.1f}"
        line += f"{row['cpu_seconds']:8.1f}"
        lines.append(line + f"{row['peak_bytes'] / 1e6:9,.0f}" + (f"{row['ratio']:7.2f}" if "ratio" in row else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
