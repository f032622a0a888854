"""Measure our model beside Transformers': seconds, tokens per second and peak memory of forward and backward.

Each measurement runs in a new process, so that its peak does not include those before.  Rivals take turns, and the best
of their rounds counts.  Weights are random, float32 on a CPU and bfloat16 on a GPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.shapes import LAYER_SHAPES
from benchmarks.subprocess_bench import BenchRow, resident_bytes, run_in_subprocess
from ovr_megatron.coldstart.step_trainer import cross_entropy
from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape, family_of_folder
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.steps import matrix_rate
from ovr_megatron.weights.folder import WeightFolder

SIGMA = 1.0  # of log-normal lengths


@dataclass(frozen=True)
class Case:
    """One measurement: a pack of documents of ``lengths`` tokens through the layers of a shape."""

    shape: str
    implementation: str  # ours or transformers
    lengths: tuple[int, ...]
    recompute: str = "none"
    freeze_language: bool = False
    freeze_vision: bool = True
    family: str = ""  # empty: the default one


@dataclass
class Measurement:
    """Seconds of the fastest round of a process, its peak memory beyond the libraries', and the FLOP of a round."""

    seconds: float
    peak_bytes: int
    flops: float


def sample_lengths(total: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Draw lengths of a log-normal with this mean until they fill ``total`` tokens."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        # The mean of a log-normal is exp(mu + sigma^2 / 2). At most half of the total: at least two documents.
        length = generator.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA)
        lengths.append(int(min(max(length, 4), total / 2)))
    return tuple(lengths)


def make_cases(shapes: Sequence[str], tokens: int, mean: int, family: str = "") -> list[tuple[str, Case, Case | None]]:
    """Return for each row of the table a name, our case, and the rival's case or ours without the option."""
    equal = (mean,) * (tokens // mean)
    rows: list[tuple[str, Case, Case | None]] = []
    for shape in shapes:
        for name, lengths in (("equal lengths", equal), ("natural lengths", sample_lengths(tokens, mean))):
            ours = Case(shape, "ours", lengths, family=family)
            rows.append((f"{shape}, {name}", ours, replace(ours, implementation="transformers")))
        plain = Case(shape, "ours", equal, family=family)
        rows.append((f"{shape}, recompute selective", replace(plain, recompute="selective"), plain))
        rows.append((f"{shape}, recompute full", replace(plain, recompute="full"), plain))
        frozen = replace(plain, freeze_language=True, freeze_vision=False)
        rows.append((f"{shape}, frozen language model", frozen, plain))
    return rows


def run_table(rows: Sequence[tuple[str, Case, Case | None]], rounds: int) -> Iterator[BenchRow]:
    """Measure row after row, rivals in turn; ``ratio`` is the rival's seconds over ours."""
    for name, case, rival in rows:
        best = _measure_in_turns([case] if rival is None else [case, rival], rounds)
        row: BenchRow = {"name": name, "tokens": sum(case.lengths), "documents": len(case.lengths)}
        row |= _rates(case, best[case])
        if rival is not None:
            row |= {
                "rival": "Transformers, padded batch" if rival.implementation == "transformers" else "ours without it",
                "rival_seconds": best[rival].seconds,
                "rival_peak_bytes": best[rival].peak_bytes,
                "ratio": best[rival].seconds / best[case].seconds,
            }
        yield row


def _measure_in_turns(cases: Sequence[Case], rounds: int) -> dict[Case, Measurement]:
    """Measure ``cases`` one after the other, ``rounds`` times, and return the least time and memory of each."""
    best: dict[Case, Measurement] = {}
    for _ in range(rounds):
        for case in cases:
            new = measure_in_subprocess(case)
            old = best.get(case, new)
            seconds = min(old.seconds, new.seconds)
            best[case] = Measurement(seconds, min(old.peak_bytes, new.peak_bytes), new.flops)
    return best


def _rates(case: Case, measurement: Measurement) -> BenchRow:
    seconds = measurement.seconds
    rates: BenchRow = {
        "seconds": seconds,
        "tokens_per_second": sum(case.lengths) / seconds,
        "peak_bytes": measurement.peak_bytes,
    }
    if torch.cuda.is_available():
        rate = measurement.flops / seconds
        reachable = matrix_rate(torch.bfloat16)
        rates |= {"tflops": rate / 1e12, "matrix_tflops": reachable / 1e12, "mfu": rate / reachable}
    return rates


FLOP_FORMULA = (
    "FLOP of a step = 6 x (layer and head parameters) x tokens + 6 x layers x query width x sum of squared lengths "
    "(causal attention: half of 12); recomputation not counted. "
    "Frozen layers have 4 in place of the first 6. MFU = FLOP/s over this card's own bfloat16 matrix rate."
)


def measure_in_subprocess(case: Case) -> Measurement:
    """Measure ``case`` in a new process."""
    (row,) = run_in_subprocess(__name__, json.dumps(asdict(case)))
    return Measurement(**row)


def measure(case: Case, repeats: int = 3, at_least: float = 3.0) -> Measurement:
    """Measure one forward and backward of ``case`` in this process.

    The first of ``repeats`` runs warms up, and the fastest of the others counts.  Short runs are repeated until they
    have taken ``at_least`` seconds together.
    """
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    peak_before = _peak_bytes(on_gpu)
    sizes = LAYER_SHAPES[case.shape]
    with tempfile.TemporaryDirectory() as name:
        folder = make_tiny_model(Path(name), tied=False, seed=1, sizes=sizes, dtype=dtype, family=case.family)
        flops = training_flops(ModelShape.from_hf(folder), case.lengths, language_trains=not case.freeze_language)
        build = _build_ours if case.implementation == "ours" else _build_transformers
        run_once = build(case, folder, dtype)
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < at_least:
        began = time.perf_counter()
        run_once()
        if on_gpu:
            # Kernels run after the call has returned: without a wait only their launch would be measured.
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Measurement(min(seconds[1:]), _peak_bytes(on_gpu) - peak_before, flops)


def _peak_bytes(on_gpu: bool) -> int:
    """Return the peak memory so far: of the allocator on a GPU, else of the process."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


def _build_ours(case: Case, folder: Path, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that runs our forward and backward once."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1 if not torch.cuda.is_available() else 0)
    model = ModelConfig(
        path=str(folder),
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        recompute=case.recompute,  # type: ignore[arg-type]
        freeze_language=case.freeze_language,
        freeze_vision=case.freeze_vision,
        freeze_merger=case.freeze_vision,
    )
    engine = Engine(ModelShape.from_hf(folder), model, ParallelConfig(), world)
    engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(folder))
    pack = make_text_pack(case.lengths, engine.shape.vision.patch_dim)
    return lambda: engine.backward([pack], cross_entropy)


def _build_transformers(case: Case, folder: Path, dtype: torch.dtype) -> Callable[[], object]:
    """Return a function that runs Transformers' forward and backward once, documents padded to the longest."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_class = family_of_folder(folder).load_hf_class()
    model = model_class.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = model.to(device).train()
    model.model.visual.requires_grad_(False)
    longest = max(case.lengths)
    mask = torch.arange(longest)[None] < torch.tensor(case.lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.where(mask, torch.randint(0, 256, mask.shape, generator=generator), 0)
    labels = torch.where(mask, ids, IGNORED)[:, 1:].contiguous().to(device)
    ids = ids.to(device)
    # Without padding no mask: the attention kernel for plain causal attention is faster than the one with a mask.
    attention_mask = None if bool(mask.all()) else mask.long().to(device)

    def run_once() -> None:
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()

    return run_once


def make_text_pack(lengths: Sequence[int], patch_dim: int) -> Pack:
    """Return a pack of random text documents, with the next token as the target of each token but the last.

    It has no patches, of the ``patch_dim`` numbers that the model's patches have.
    """
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.randint(0, 256, (int(bounds[-1]),), generator=generator)
    # The target of a token is the next one; the last of a document has none.
    labels = tokens.roll(-1)
    labels[bounds[1:] - 1] = IGNORED
    return Pack(
        tokens=tokens,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]).expand(3, -1),
        cu_seqlens=bounds.int(),
        patches=torch.zeros(0, patch_dim),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        placement=torch.zeros(0, dtype=torch.int64),
    )


HEADER = f"{'':32}{'tokens/s':>10}{'peak MB':>9}{'rival s':>9}{'ours s':>9}{'ratio':>7}{'rival MB':>10}"


def format_row(row: BenchRow) -> str:
    """Return a row as text, below `HEADER`."""
    text = f"{row['name']:32}{row['tokens_per_second']:10,.0f}{row['peak_bytes'] / 1e6:9,.0f}"
    if "rival" in row:
        text += f"{row['rival_seconds']:9.3f}{row['seconds']:9.3f}{row['ratio']:7.2f}"
        text += f"{row['rival_peak_bytes'] / 1e6:10,.0f}  {row['rival']}"
    if "mfu" in row:
        text += f"  {row['tflops']:.0f} of {row['matrix_tflops']:.0f} TFLOP/s = {row['mfu']:.1%}"
    return text


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    fields["lengths"] = tuple(fields["lengths"])  # JSON has no tuples
    print(json.dumps(asdict(measure(Case(**fields)))))
