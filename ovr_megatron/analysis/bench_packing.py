"""How fast, how full and in how much memory an epoch is packed: ours beside NeMo's first fit.

As a program, ``python -m ovr_megatron.analysis.bench_packing WHO SAMPLES`` measures one packer, in a process of its own
for a peak of its own.  NeMo's packer compares each length with every pack that is open, so it gets fewer of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ovr_megatron.data.epochs import plan_epoch

PACK_TOKENS, MEAN, SIGMA = 65536, 3700, 1.0  # tokens of a pack; log-normal lengths of a cold-start sample
OURS = "ours"
NEMO = ("first_fit_decreasing", "first_fit_shuffle")
_NEMO_MODULE = "nemo.utils.sequence_packing_utils"


def natural_lengths(count: int, seed: int = 0) -> np.ndarray:
    """int32[count], log-normal lengths with mean 3.7k, at most a pack."""
    drawn = np.random.default_rng(seed).lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return drawn.clip(16, PACK_TOKENS).astype(np.int32)


def rows(samples: int, rival_samples: int, rounds: int) -> list[dict[str, Any]]:
    """Measure ours on ``samples`` lengths, and ours beside NeMo's on ``rival_samples``; the best of ``rounds``.

    All are one thread; ``ratio`` is the rival's CPU seconds over ours, so that what else the machine does stays out.
    """
    rivals = [f"nemo {name}" for name in NEMO] if importlib.util.find_spec("nemo") else []
    cases = [(OURS, samples), *((who, rival_samples) for who in (OURS, *rivals))]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for _ in range(rounds):
        for case in cases:
            row = _measure_apart(*case)
            if case not in found or row["cpu_seconds"] < found[case]["cpu_seconds"]:
                found[case] = row
    ours = found[OURS, rival_samples]["cpu_seconds"]
    return [row | ({"ratio": row["cpu_seconds"] / ours} if row["who"] != OURS else {}) for row in found.values()]


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text."""
    heads = [("lengths", 10), ("seconds", 9), ("CPU s", 8), ("per CPU s", 12), ("packs", 8), ("fill", 8)]
    lines = [" " * 27 + "".join(f"{name:>{width}}" for name, width in [*heads, ("extra MB", 9), ("MB", 7)])]
    for row in found:
        line = f"{row['who']:27}{row['samples']:10,}{row['seconds']:9.2f}{row['cpu_seconds']:8.2f}"
        line += f"{row['samples'] / row['cpu_seconds']:12,.0f}"
        line += f"{row['packs']:8,}{row['fill']:8.2%}{row['extra_bytes'] / 1e6:9,.0f}{row['peak_bytes'] / 1e6:7,.0f}"
        lines.append(line + (f"  {row['ratio']:,.0f} times ours" if "ratio" in row else ""))
    if len({row["who"] for row in found}) == 1:
        lines.append(
            "nemo cannot be imported, so there is no rival here: pip install nemo-toolkit (setup.cfg, extra nemo)"
        )
    return "\n".join(lines)


def measure(who: str, samples: int) -> dict[str, Any]:
    """Seconds, packs, fill and bytes of one packing; ``extra_bytes`` is the peak beyond libraries and lengths."""
    work = _ours if who == OURS else _nemo(who.removeprefix("nemo "))
    lengths = natural_lengths(samples)
    before, began, cpu_began = _peak_bytes(), time.perf_counter(), time.process_time()
    packs = work(lengths)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "who": who,
        "samples": samples,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "packs": packs,
        "fill": float(lengths.sum(dtype=np.int64)) / packs / PACK_TOKENS,
        "extra_bytes": _peak_bytes() - before,
        "peak_bytes": _peak_bytes(),
    }


def _ours(lengths: np.ndarray) -> int:
    return len(plan_epoch(lengths, [np.arange(len(lengths))], [1.0], PACK_TOKENS, seed=1, epoch=0))


def _nemo(algorithm: str) -> Callable[[np.ndarray], int]:
    packing = importlib.import_module(_NEMO_MODULE)

    def work(lengths: np.ndarray) -> int:
        histogram = np.bincount(lengths, minlength=PACK_TOKENS + 1).tolist()
        return len(packing.create_packing_strategy(histogram, PACK_TOKENS, algorithm)[0])

    return work


def _measure_apart(who: str, samples: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "ovr_megatron.analysis.bench_packing", who, str(samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{who}, {samples}: {done.stderr[-3000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def _peak_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
