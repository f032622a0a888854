"""Measure steps of supervised training and of GRPO beside TRL's trainers: seconds, tokens per second, peak memory.

Both sides have the same model, rows, optimizer, precision, processes and threads.  The loss (of GRPO
also the norm of the gradient) of the first step has to agree, or else the row says that the comparison is void.  TRL
comes from a folder of its own, so that torch, Transformers and vLLM are the same for both.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.peer_task import OURS, PACKING, PADDING, SINGLE_ROWS, TRANSFORMERS, PeerTask, write_rows
from benchmarks.shapes import PEER_SHAPES
from benchmarks.subprocess_bench import BenchRow, MeasurementError, run_in_subprocess
from ovr_megatron.errors import UserError
from ovr_megatron.model.tiny import make_tiny_model

TRL_VERSION = "1.16.0"
TOLERANCE = 1e-4  # of the first step's loss and gradient, as a share of them
SAMPLE_S = 0.25  # seconds between samples of the memory
MODULES = {OURS: "benchmarks.peer_ours"}  # any other side is TRL
TRL_MODULE = "benchmarks.peer_trl"
HEADER = (
    f"{'':68}{'s/step':>9}{'tokens/s':>10}{'peak GiB':>10}{'ratio':>8}{'least':>7}{'most':>7}{'CPU':>7}"
    "  first step's difference"
)


@dataclass(frozen=True)
class PeerCase:
    """Sides that are compared on the same rows.

    Attributes:
        name: Of the rows.
        shape: One of `PEER_SHAPES`.
        task: Ours.
        peers: Other sides.
    """

    name: str
    shape: str
    task: PeerTask
    peers: tuple[str, ...]


def make_cases(shapes: Sequence[str], only: str = "") -> list[PeerCase]:
    """Return the cases of ``shapes`` that have ``only`` in their names."""
    cases = []
    for shape in shapes:
        is_tiny = shape == "tiny"
        sft = PeerTask(kind="sft", who=OURS, rows=16, tokens=96, steps=8 if is_tiny else 3)
        prompts = 8 if is_tiny else 4
        grpo = PeerTask(kind="grpo", who=OURS, rows=prompts, tokens=128, responses=8, steps=sft.steps // 2 + 1)
        long = replace(grpo, tokens=512)
        two = replace(grpo, processes=2, threads=1)
        text = replace(sft, images=False)
        cases += [
            PeerCase(f"{shape}, SFT, equal lengths", shape, replace(sft, equal=True), (PADDING,)),
            PeerCase(f"{shape}, SFT, natural lengths", shape, sft, (PADDING, SINGLE_ROWS)),
            PeerCase(f"{shape}, SFT, natural lengths, text", shape, text, (PADDING, PACKING)),
            PeerCase(f"{shape}, GRPO, replayed", shape, replace(grpo, replay=True, steps=0), (PADDING,)),
            PeerCase(f"{shape}, GRPO, up to 128 tokens", shape, grpo, (PADDING, TRANSFORMERS)),
            PeerCase(f"{shape}, GRPO, up to 128, two processes", shape, two, (PADDING, TRANSFORMERS)),
            PeerCase(f"{shape}, GRPO, up to 128, ahead", shape, replace(two, ahead=True), (PADDING, TRANSFORMERS)),
            PeerCase(f"{shape}, GRPO, up to 512 tokens", shape, long, (PADDING, TRANSFORMERS)),
        ]
    return [case for case in cases if only in case.name]


def find_trl(folder: Path) -> str:
    """Return the name and the version of the TRL in ``folder``.

    Raises:
        UserError: there is none.
    """
    versions = [path.name for path in folder.glob("trl-*.dist-info")]
    if not versions:
        raise UserError(
            f"{folder} has no TRL to compare with; get it by 'pip install --no-deps --target {folder} "
            f"trl=={TRL_VERSION}', or name the folder that has it with --peer"
        )
    return versions[0].removesuffix(".dist-info").replace("-", " ")


def run(cases: Sequence[PeerCase], rounds: int, trl: Path) -> Iterator[BenchRow]:
    """Measure case after case, its sides in turn; the medians of the rounds count.

    A row has the median ``seconds`` of a step, learned ``tokens_per_second``, ``peak_bytes`` of the process tree, and
    beside a peer ``ratio``, ours over its tokens per second, of single processes ``cpu_ratio``, the same per second of
    the processor, which other load of the machine does not change, and ``difference`` of the first step.  A ratio is
    the median of the ratios of all rounds, which ``ratios`` and ``cpu_ratios`` have: the sides of a round run within
    minutes, and the machine's speed changes from round to round.  The other figures are those of a side's median round,
    of two the slower.
    """
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="bench_peers_") as name:
            folder = Path(name)
            make_tiny_model(folder / "model", sizes=PEER_SHAPES[case.shape])
            write_rows(case.task, folder)
            rows: dict[str, list[BenchRow]] = {who: [] for who in (OURS, *case.peers)}
            for round_number in range(rounds):
                # Every second round runs in reverse order, against a drift of the machine's speed.
                order = list(rows) if round_number % 2 == 0 else list(reversed(rows))
                for who in order:
                    rows[who].append(measure(replace(case.task, who=who), folder, trl))
        for who, peer_rows in rows.items():
            beside = {} if who == OURS else compare(rows[OURS], peer_rows, who)
            task = asdict(replace(case.task, who=who))
            yield {"name": f"{case.name}: {who}", **task, **median_row(peer_rows), **beside}


def measure(task: PeerTask, folder: Path, trl: Path) -> BenchRow:
    """Measure one side in processes of its own; ``failed`` says why it ended."""
    module = MODULES.get(task.who, TRL_MODULE)
    arguments = (json.dumps(asdict(task)), folder)
    launcher: list[str] = []
    if task.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={task.processes}"]
    try:
        *_, steps = run_in_subprocess(
            module,
            *arguments,
            launcher=launcher,
            search_path=[trl],
            threads=task.threads,
            sample_s=SAMPLE_S,
        )
    except MeasurementError as error:
        return {"failed": str(error)}
    row: BenchRow = {"peak_bytes": steps["peak_bytes"], "norm": steps["norms"][:1], "loss": steps["losses"][:1]}
    if steps["seconds"]:
        tokens = steps["tokens"][1:]  # the first step warms up
        row["seconds"] = statistics.median(steps["seconds"])
        row["tokens_per_second"] = median_rate(tokens, steps["seconds"])
        row |= {"step_seconds": steps["seconds"], "step_tokens": tokens}
        if task.processes == 1:  # each process has seconds of its own
            row["tokens_per_cpu_second"] = median_rate(tokens, steps["cpu_seconds"])
            row["step_cpu_seconds"] = steps["cpu_seconds"]
    return row | ({"phases": steps["phases"]} if "phases" in steps else {})


def median_rate(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Return the median over the steps of tokens a second."""
    return statistics.median(count / step for count, step in zip(counts, seconds, strict=True))


def median_row(rows: Sequence[BenchRow]) -> BenchRow:
    """Return the row of a side's median round by tokens a second, of two the lower; a failed row if a round failed."""
    for row in rows:
        if "failed" in row:
            return row
    ordered = sorted(rows, key=lambda row: row.get("tokens_per_second", 0))
    return ordered[(len(rows) - 1) // 2]


def compare(ours: Sequence[BenchRow], peer: Sequence[BenchRow], who: str) -> BenchRow:
    """Return the ratios of the two sides' rounds, and the difference of their first step; nothing where one failed."""
    if any("failed" in row for row in (*ours, *peer)):
        return {}
    result: BenchRow = {}
    for name, rate in (("ratio", "tokens_per_second"), ("cpu_ratio", "tokens_per_cpu_second")):
        if rate in ours[0]:
            ratios = [row[rate] / peer_row[rate] for row, peer_row in zip(ours, peer, strict=True)]
            result[name] = statistics.median(ratios)
            result[f"{name}s"] = ratios
    pairs: list[tuple[float, float]] = []
    for row, peer_row in zip(ours, peer, strict=True):
        pairs += zip(row["loss"], peer_row["loss"], strict=False)
        # Micro-batches weigh the same in TRL, however many tokens they learn: row by row another gradient comes of it.
        if who == PADDING:
            pairs += zip(row["norm"], peer_row["norm"], strict=False)
    if pairs:
        result["difference"] = max(abs(a - b) / max(abs(a), 1e-2) for a, b in pairs)
        result["void"] = result["difference"] > TOLERANCE
    return result


def format_row(row: BenchRow) -> str:
    """Return a row as a line below `HEADER`."""
    if "failed" in row:
        return f"{row['name']:68} failed: {row['failed']}"
    timed = "seconds" in row
    line = f"{row['name']:68}"
    line += f"{row['seconds']:9.3f}{row['tokens_per_second']:10,.0f}" if timed else " " * 19
    line += f"{row['peak_bytes'] / 2**30:10.2f}"
    ratios = (row["ratio"], min(row["ratios"]), max(row["ratios"])) if "ratio" in row else None
    line += "{:8.2f}{:7.2f}{:7.2f}".format(*ratios) if ratios else " " * 22
    line += f"{row['cpu_ratio']:7.2f}" if "cpu_ratio" in row else " " * 7
    if "difference" in row:
        line += f"  {row['difference']:.1e}"
        line += f": over {TOLERANCE:g}, so the comparison is void" if row["void"] else ""
    return line
