"""Our model beside Transformers': seconds, tokens per second and peak memory of forward and backward.

Every measurement has a process of its own, so that a peak is its own; rivals take turns and the best of their rounds
counts.  Random weights, float32 on a CPU, bfloat16 on a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.analysis.bench_shapes import LAYER_SHAPES
from ovr_megatron.coldstart.training import cross_entropy
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.engine import Engine
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.steps import matrix_rate
from ovr_megatron.weights.folder import WeightFolder

MEAN_LENGTH = 3700  # tokens of a cold-start sample; documents are drawn log-normal and scaled down to a pack
SIGMA = 1.0
VOCABULARY = 448  # of `make_tiny_model`


@dataclass(frozen=True)
class Case:
    """One measurement."""

    shape: str
    who: str  # ours or transformers
    lengths: tuple[int, ...]
    what: str = "text"
    recompute: str = "none"
    freeze_language: bool = False
    freeze_vision: bool = True


@dataclass
class Outcome:
    """What a process measured: the best of its rounds, and its peak memory beyond the libraries'."""

    seconds: float
    peak_bytes: int


def natural_lengths(total: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths of a log-normal with this mean, drawn until they fill ``total`` tokens."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        drawn = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        lengths.append(int(min(max(drawn, 4), total / 2)))
    return tuple(lengths)


def cases(shapes: Sequence[str], tokens: int, mean: int) -> list[tuple[str, Case, Case | None]]:
    """Rows of the table: a name, our case, and the rival's case or ours without the option."""
    equal = (mean,) * (tokens // mean)
    rows: list[tuple[str, Case, Case | None]] = []
    for shape in shapes:
        for name, lengths in (("equal lengths", equal), ("natural lengths", natural_lengths(tokens, mean))):
            ours = Case(shape, "ours", lengths)
            rows.append((f"{shape}, {name}", ours, replace(ours, who="transformers")))
        plain = Case(shape, "ours", equal)
        rows.append((f"{shape}, recompute selective", replace(plain, recompute="selective"), plain))
        rows.append((f"{shape}, recompute full", replace(plain, recompute="full"), plain))
        rows.append(
            (f"{shape}, frozen language model", replace(plain, freeze_language=True, freeze_vision=False), plain)
        )
    return rows


def run_table(rows: Sequence[tuple[str, Case, Case | None]], rounds: int) -> Iterator[dict[str, Any]]:
    """Measure row after row, rivals in turn; ``ratio`` is the rival's seconds over ours."""
    for name, case, rival in rows:
        best: dict[Case, Outcome] = {}
        for _ in range(rounds):
            for one in (case, rival):
                if one is not None:
                    outcome = measure_apart(one)
                    known = best.get(one, outcome)
                    best[one] = Outcome(min(known.seconds, outcome.seconds), min(known.peak_bytes, outcome.peak_bytes))
        tokens = sum(case.lengths)
        row: dict[str, Any] = {"name": name, "tokens": tokens, "documents": len(case.lengths)}
        row |= {"seconds": best[case].seconds, "tokens_per_second": tokens / best[case].seconds}
        row["peak_bytes"] = best[case].peak_bytes
        if torch.cuda.is_available():
            rate, reachable = model_flops(case) / best[case].seconds, matrix_rate(torch.bfloat16)
            row |= {"tflops": rate / 1e12, "matrix_tflops": reachable / 1e12, "mfu": rate / reachable}
        if rival is not None:
            row |= {
                "rival": "Transformers, padded batch" if rival.who == "transformers" else "ours without it",
                "rival_seconds": best[rival].seconds,
                "rival_peak_bytes": best[rival].peak_bytes,
                "ratio": best[rival].seconds / best[case].seconds,
            }
        yield row


FLOP_FORMULA = (
    "FLOP of a step = 6 x (layer and head parameters) x tokens + 6 x layers x query width x sum of squared lengths "
    "(causal attention: half of 12); recomputation not counted. MFU = FLOP/s over this card's own bfloat16 matrix rate."
)


def model_flops(case: Case) -> float:
    """FLOP of one forward and backward by `FLOP_FORMULA`."""
    sizes = LAYER_SHAPES[case.shape]
    head = sizes.hidden // sizes.heads
    attention = 2 * sizes.hidden**2 + 2 * sizes.hidden * sizes.kv_heads * head
    weights = sizes.layers * (attention + 3 * sizes.hidden * sizes.ffn) + VOCABULARY * sizes.hidden
    squares = sum(length**2 for length in case.lengths)
    return 6.0 * weights * sum(case.lengths) + 6.0 * sizes.layers * sizes.hidden * squares


def measure_apart(case: Case) -> Outcome:
    """Measure ``case`` in a process of its own."""
    command = [sys.executable, "-m", "ovr_megatron.analysis.bench", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: {done.stderr[-3000:]}")
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


def measure(case: Case, repeats: int = 3, at_least: float = 3.0) -> Outcome:
    """Seconds and peak bytes of one forward and backward of ``case`` in this process.

    The least of ``repeats`` runs after a first one, or of as many as fit in ``at_least`` seconds.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    before = _peak_bytes(on_gpu)
    with tempfile.TemporaryDirectory() as name:
        folder = make_tiny_model(Path(name), tied=False, seed=1, sizes=LAYER_SHAPES[case.shape], dtype=dtype)
        work = (_ours if case.who == "ours" else _theirs)(case, folder, dtype)
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < at_least:
        began = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Outcome(min(seconds[1:]), _peak_bytes(on_gpu) - before)


def _peak_bytes(on_gpu: bool) -> int:
    """Peak memory so far: of the allocator on a GPU, else of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _ours(case: Case, folder: Path, dtype: torch.dtype) -> Callable[[], object]:
    world = distributed.start(ParallelConfig(), seed=1, threads=1 if not torch.cuda.is_available() else 0)
    model = ModelConfig(
        path=str(folder),
        dtype=str(dtype).removeprefix("torch."),
        recompute=case.recompute,
        freeze_language=case.freeze_language,
        freeze_vision=case.freeze_vision,
        freeze_merger=case.freeze_vision,
    )
    engine = Engine(ModelShape.from_hf(folder), model, ParallelConfig(), world)
    engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(folder))
    pack = text_pack(case.lengths)
    return lambda: engine.backward([pack], cross_entropy)


def _theirs(case: Case, folder: Path, dtype: torch.dtype) -> Callable[[], object]:
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).train()
    model.model.visual.requires_grad_(False)
    longest = max(case.lengths)
    mask = torch.arange(longest)[None] < torch.tensor(case.lengths)[:, None]
    ids = torch.where(mask, torch.randint(0, 256, mask.shape, generator=torch.Generator().manual_seed(0)), 0)
    labels = torch.where(mask, ids, IGNORED)[:, 1:].contiguous()
    inputs = {"input_ids": ids.to(device), "labels": labels.to(device)}
    padding = None if bool(mask.all()) else mask.long().to(device)

    def work() -> None:
        model.zero_grad(set_to_none=True)
        out = model(input_ids=inputs["input_ids"], attention_mask=padding, use_cache=False).logits[:, :-1]
        F.cross_entropy(out.float().flatten(0, 1), inputs["labels"].flatten(), ignore_index=IGNORED).backward()

    return work


def text_pack(lengths: Sequence[int]) -> Pack:
    """Documents of random text in one pack, every next token a target."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(0, 256, (int(bounds[-1]),), generator=generator)
    labels = tokens.roll(-1)
    labels[bounds[1:] - 1] = IGNORED
    return Pack(
        tokens=tokens,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]).expand(3, -1),
        cu_seqlens=bounds.int(),
        patches=torch.zeros(0, 1176),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        placement=torch.zeros(0, dtype=torch.int64),
    )


HEADER = f"{'':32}{'tokens/s':>10}{'peak MB':>9}{'rival s':>9}{'ours s':>9}{'ratio':>7}{'rival MB':>10}"


def line(row: dict[str, Any]) -> str:
    """A row as text, below `HEADER`."""
    found = f"{row['name']:32}{row['tokens_per_second']:10,.0f}{row['peak_bytes'] / 1e6:9,.0f}"
    if "rival" in row:
        found += f"{row['rival_seconds']:9.3f}{row['seconds']:9.3f}{row['ratio']:7.2f}"
        found += f"{row['rival_peak_bytes'] / 1e6:10,.0f}  {row['rival']}"
    if "mfu" in row:
        found += f"  {row['tflops']:.0f} of {row['matrix_tflops']:.0f} TFLOP/s = {row['mfu']:.1%}"
    return found


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(asdict(measure(Case(**given | {"lengths": tuple(given["lengths"])})))))
