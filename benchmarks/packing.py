"""Measure how fast, how full and in how much memory an epoch is packed: ours beside NeMo's first fit.

As a program, ``python -m benchmarks.packing PACKER SAMPLES`` measures one packer, in a new process, so
that its peak is not that of an earlier one.  NeMo's packer compares each length with every open pack and takes long:
it gets fewer lengths.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.subprocess_bench import BenchRow, resident_bytes, run_in_subprocess
from ovr_megatron.data.epochs import plan_epoch

PACK_TOKENS = 65536
MEAN = 3700  # tokens of a cold-start sample, whose lengths are log-normal
SIGMA = 1.0
OURS = "ours"
NEMO = ("first_fit_decreasing", "first_fit_shuffle")
_NEMO_MODULE = "nemo.utils.sequence_packing_utils"


def sample_lengths(count: int, seed: int = 0) -> np.ndarray:
    """Draw int32[count] log-normal lengths with mean `MEAN`, at most a pack."""
    generator = np.random.default_rng(seed)
    # The mean of a log-normal is exp(mu + sigma^2 / 2).
    lengths = generator.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return lengths.clip(16, PACK_TOKENS).astype(np.int32)


def run(samples: int, rival_samples: int, rounds: int) -> list[BenchRow]:
    """Measure ours on ``samples`` lengths, and ours beside NeMo's on ``rival_samples``; the best of ``rounds`` counts.

    Each packer is one thread.  ``ratio`` is the rival's CPU seconds over ours, so that other load of the machine does
    not count.
    """
    rivals = [f"nemo {name}" for name in NEMO] if importlib.util.find_spec("nemo") else []
    cases = [(OURS, samples), *((packer, rival_samples) for packer in (OURS, *rivals))]
    best: dict[tuple[str, int], BenchRow] = {}
    for _ in range(rounds):
        for case in cases:
            (row,) = run_in_subprocess(__name__, *case)
            if case not in best or row["cpu_seconds"] < best[case]["cpu_seconds"]:
                best[case] = row
    our_seconds = best[OURS, rival_samples]["cpu_seconds"]
    for row in best.values():
        if row["who"] != OURS:
            row["ratio"] = row["cpu_seconds"] / our_seconds
    return list(best.values())


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text."""
    columns = (
        ("lengths", 10),
        ("seconds", 9),
        ("CPU s", 8),
        ("per CPU s", 12),
        ("packs", 8),
        ("fill", 8),
        ("extra MB", 9),
        ("MB", 7),
    )
    lines = [" " * 27 + "".join(f"{title:>{width}}" for title, width in columns)]
    for row in rows:
        line = f"{row['who']:27}{row['samples']:10,}{row['seconds']:9.2f}{row['cpu_seconds']:8.2f}"
        line += f"{row['samples'] / row['cpu_seconds']:12,.0f}{row['packs']:8,}{row['fill']:8.2%}"
        line += f"{row['extra_bytes'] / 1e6:9,.0f}{row['peak_bytes'] / 1e6:7,.0f}"
        if "ratio" in row:
            line += f"  {row['ratio']:,.0f} times ours"
        lines.append(line)
    if len({row["who"] for row in rows}) == 1:
        lines.append(
            "nemo cannot be imported, so there is no rival here: pip install nemo-toolkit (setup.cfg, extra nemo)"
        )
    return "\n".join(lines)


def measure(packer: str, samples: int) -> BenchRow:
    """Measure one packing in this process; ``extra_bytes`` is the peak beyond the libraries' and the lengths'."""
    # The rival is imported here: its libraries are no part of the measurement.
    pack = _pack if packer == OURS else _nemo_packer(packer.removeprefix("nemo "))
    lengths = sample_lengths(samples)
    peak_before = resident_bytes("VmHWM")
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    packs = pack(lengths)
    seconds = time.perf_counter() - wall_start
    cpu_seconds = time.process_time() - cpu_start
    return {
        "who": packer,
        "samples": samples,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "packs": packs,
        "fill": float(lengths.sum(dtype=np.int64)) / packs / PACK_TOKENS,
        "extra_bytes": resident_bytes("VmHWM") - peak_before,
        "peak_bytes": resident_bytes("VmHWM"),
    }


def _pack(lengths: np.ndarray) -> int:
    """Pack ``lengths`` with our packer, and return the number of packs."""
    return len(plan_epoch(lengths, [np.arange(len(lengths))], [1.0], PACK_TOKENS, seed=1, epoch=0))


def _nemo_packer(algorithm: str) -> Callable[[np.ndarray], int]:
    """Return a function that packs lengths with NeMo's ``algorithm``, and returns the number of packs."""
    packing = importlib.import_module(_NEMO_MODULE)

    def pack(lengths: np.ndarray) -> int:
        histogram = np.bincount(lengths, minlength=PACK_TOKENS + 1).tolist()
        return len(packing.create_packing_strategy(histogram, PACK_TOKENS, algorithm)[0])

    return pack


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
