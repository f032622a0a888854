"""Count behaviours in the responses of checkpoints, and compare the counts with another judge's and with people's."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from ovr_megatron.config import ConfigError
from ovr_megatron.evaluation.behaviours import (
    BEHAVIOURS,
    PAIRS,
    CheckpointRates,
    Trace,
    TraceAccuracy,
    kappa,
    read_traces,
    summarise,
)
from ovr_megatron.evaluation.judge_settings import JudgeConfig
from ovr_megatron.evaluation.judges import Counts, count_behaviours
from ovr_megatron.runtime.files import write_json, write_whole
from ovr_megatron.runtime.json_lines import json_lines
from ovr_megatron.runtime.progress import Progress

RESULT = "behaviours.json"
PER_TRACE = "counts.jsonl"
ANNOTATIONS = "annotations.jsonl"

BehaviourCounts = dict[str, list[int | None]]
"""Counts by behaviour, one for each trace; None without a count."""


class CheckpointBehaviours(CheckpointRates):
    """Rates of a checkpoint, and the name of the file of its responses."""

    file: str


class Agreement(TypedDict):
    """Cohen's kappa by behaviour and over ``all``, None where it is not defined, and the number of counts compared."""

    kappa: dict[str, float | None]
    compared: int


class JudgeAgreement(Agreement):
    """Agreement of a second judge with the first; ``missing`` counts its missing counts by reason."""

    judge: str
    missing: dict[str, int]


class BehaviourResult(TypedDict):
    """Content of ``behaviours.json``; ``approximation`` says that the judge counts by wording."""

    judge: str
    approximation: bool
    missing: dict[str, int]
    checkpoints: dict[str, CheckpointBehaviours]
    second: NotRequired[JudgeAgreement]
    people: NotRequired[Agreement]


class AnnotationLine(TypedDict, total=False):
    """A line of ``annotations.jsonl`` as we write it; people edit the file, so that any field may be missing."""

    checkpoint: str
    id: str
    behaviour: str
    count: int | None
    definition: str
    problem: str
    reasoning: str


def judge_behaviours(
    files: Mapping[str, Path],
    judges: Sequence[JudgeConfig],
    out: Path,
    limit: int,
    sample: int,
    annotate: bool,
) -> BehaviourResult:
    """Have behaviours counted in the responses of every checkpoint; write ``behaviours.json`` and ``counts.jsonl``.

    Args:
        files: Responses by name of the checkpoint.
        judges: The judge, and optionally a second one, which counts in a sample.
        out: Folder to write, or to continue.
        limit: Number of first traces of each file, 0 for all.
        sample: Number of traces for the second judge and for people.
        annotate: Whether to write ``annotations.jsonl`` for people to fill in; counts in it are compared in any case.

    Returns:
        The content of ``behaviours.json``.

    Raises:
        ConfigError: there are no responses, a judge cannot be opened, or an annotation is damaged.
        EndpointError: an endpoint refuses us, or nothing but failures.
    """
    first_judge, *other_judges = judges
    checkpoints = {name: read_traces(path, limit) for name, path in files.items()}
    traces: list[Trace] = []
    owners: list[str] = []  # the checkpoint of each trace
    for name, checkpoint_traces in checkpoints.items():
        traces += checkpoint_traces
        owners += [name] * len(checkpoint_traces)
    if not traces:
        raise ConfigError("the files hold no response")
    out.mkdir(parents=True, exist_ok=True)

    # All checkpoints in one call: equal traces are asked once, and an endpoint is not idle between checkpoints.
    counts = _count(first_judge, traces, out)
    result: BehaviourResult = {
        "judge": first_judge.judge,
        "approximation": first_judge.is_lexical,
        "missing": dict(counts.missing),
        "checkpoints": _checkpoint_rates(files, checkpoints, counts.by_behaviour),
    }
    # A fixed seed: the next run has the same sample, whose answers and annotations are on disk.
    sample_rows = sorted(random.Random(0).sample(range(len(traces)), min(sample, len(traces))))
    for judge in other_judges:
        result["second"] = _compare_judge(judge, traces, sample_rows, counts.by_behaviour, out)
    annotations = out / ANNOTATIONS
    if annotate:
        write_annotations(annotations, [(owners[row], traces[row]) for row in sample_rows])
    # Also without `annotate`: people may have filled in the file of an earlier run.
    if annotations.exists():
        keys = [(owner, trace.id) for owner, trace in zip(owners, traces, strict=True)]
        result["people"] = compare_counts(*read_annotations(annotations, keys, counts.by_behaviour))
    _write_counts(out / PER_TRACE, owners, traces, counts.by_behaviour)
    write_json(out / RESULT, result, indent=1)
    return result


def _checkpoint_rates(
    files: Mapping[str, Path],
    checkpoints: Mapping[str, Sequence[Trace]],
    counts: BehaviourCounts,
) -> dict[str, CheckpointBehaviours]:
    """Return the rates of each checkpoint, whose traces follow each other in ``counts``."""
    rates: dict[str, CheckpointBehaviours] = {}
    # The traces of all checkpoints were judged in one call, in this order.
    start = 0
    for name, traces in checkpoints.items():
        end = start + len(traces)
        checkpoint_counts = _select(counts, range(start, end))
        verdicts = [trace.is_correct for trace in traces]
        rates[name] = {**summarise(checkpoint_counts, verdicts), "file": files[name].name}
        start = end
    return rates


def _count(judge: JudgeConfig, traces: Sequence[Trace], folder: Path) -> Counts:
    with Progress(len(traces) * len(BEHAVIOURS), judge.judge, "question") as progress:
        return count_behaviours(traces, judge, folder, progress.update)


def _compare_judge(
    judge: JudgeConfig,
    traces: Sequence[Trace],
    rows: Sequence[int],
    counts: BehaviourCounts,
    folder: Path,
) -> JudgeAgreement:
    """Have another judge count in the traces ``rows``, and return its agreement with the first judge's ``counts``."""
    judge_counts = _count(judge, [traces[row] for row in rows], folder)
    return {
        "judge": judge.judge,
        "missing": dict(judge_counts.missing),
        **compare_counts(_select(counts, rows), judge_counts.by_behaviour),
    }


def _select(counts: BehaviourCounts, rows: Sequence[int]) -> BehaviourCounts:
    """Return the counts of some traces, by their index."""
    selected: BehaviourCounts = {}
    for behaviour, values in counts.items():
        selected[behaviour] = [values[row] for row in rows]
    return selected


def _write_counts(path: Path, owners: Sequence[str], traces: Sequence[Trace], counts: BehaviourCounts) -> None:
    lines = []
    for index, (owner, trace) in enumerate(zip(owners, traces, strict=True)):
        trace_counts = {behaviour: values[index] for behaviour, values in counts.items()}
        lines.append(json.dumps({"checkpoint": owner, "id": trace.id, "counts": trace_counts}) + "\n")
    write_whole(path, "".join(lines))


def compare_counts(first: BehaviourCounts, second: BehaviourCounts) -> Agreement:
    """Return Cohen's kappa on whether a behaviour occurs, by behaviour and over all, and how many were compared."""
    kappas: dict[str, float | None] = {}
    all_first: list[int | None] = []
    all_second: list[int | None] = []
    for behaviour in first:
        kappas[behaviour] = kappa(first[behaviour], second[behaviour])
        all_first += first[behaviour]
        all_second += second[behaviour]
    kappas["all"] = kappa(all_first, all_second)
    compared = 0
    for first_count, second_count in zip(all_first, all_second, strict=True):
        compared += first_count is not None and second_count is not None
    return {"kappa": kappas, "compared": compared}


def write_annotations(path: Path, sample: Sequence[tuple[str, Trace]]) -> None:
    """Write a line for every trace and behaviour, its ``count`` to be filled in; keep counts that are filled in."""
    filled_in: dict[tuple[str, str, str], int | None] = {}
    for _, line in _read_annotated(path):
        filled_in[line["checkpoint"], line["id"], line["behaviour"]] = line["count"]
    lines = []
    for owner, trace in sample:
        for behaviour in BEHAVIOURS.values():
            annotation: AnnotationLine = {
                "checkpoint": owner,
                "id": trace.id,
                "behaviour": behaviour.name,
                "count": filled_in.get((owner, trace.id, behaviour.name)),
                "definition": behaviour.definition,
                "problem": trace.problem,
                "reasoning": trace.reasoning,
            }
            lines.append(json.dumps(annotation, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def read_annotations(
    path: Path,
    keys: Sequence[tuple[str, str]],
    counts: BehaviourCounts,
) -> tuple[BehaviourCounts, BehaviourCounts]:
    """Return the judge's and people's counts where people have filled one in.

    Args:
        path: The annotations.
        keys: Checkpoint and id of every trace.
        counts: The judge's counts of every trace.

    Raises:
        ConfigError: a line has an unknown behaviour, or its count is no number.
    """
    rows: dict[tuple[str | None, str | None], int] = {}
    for index, key in enumerate(keys):
        rows[key] = index
    judge_counts: BehaviourCounts = {name: [] for name in BEHAVIOURS}
    people_counts: BehaviourCounts = {name: [] for name in BEHAVIOURS}
    for line_number, line in _read_annotated(path):
        count = line.get("count")
        name = line.get("behaviour")
        row = rows.get((line.get("checkpoint"), line.get("id")))  # None: a trace of another run
        is_count = count is None or (isinstance(count, int) and count >= 0)
        if name not in BEHAVIOURS or not is_count:
            raise ConfigError(
                f"{path}:{line_number}: behaviour {name!r} with count {count!r}; give a count of 0 or more"
            )
        if count is not None and row is not None:
            judge_counts[name].append(counts[name][row])
            people_counts[name].append(count)
    return judge_counts, people_counts


def _read_annotated(path: Path) -> Iterator[tuple[int, AnnotationLine]]:
    """Yield number and object of each line, none for a file that is not there; the error of a line names it."""
    if not path.exists():
        return
    for line in json_lines(path):
        try:
            yield line.number, cast(AnnotationLine, line.parse())
        except ValueError as error:
            raise ConfigError(f"{path}:{line.number}: is no JSON object ({error}); correct the line") from None


def format_table(result: BehaviourResult) -> str:
    """Return the rates and agreements of a result as a table of text."""
    checkpoints = result["checkpoints"]
    note = ", an approximation by wording" if result["approximation"] else ""
    lines = [f"judge: {result['judge']}{note}", _table_line("emergence", checkpoints)]
    for name, behaviour in BEHAVIOURS.items():
        cells = [_emergence_cell(summary, name) for summary in checkpoints.values()]
        lines.append(_table_line(behaviour.title, cells))
    lines += _accuracy_lines(checkpoints)
    lines.append("transfer (visual / linguistic)")
    for linguistic, _ in PAIRS:
        cells = [_transfer_cell(summary, linguistic) for summary in checkpoints.values()]
        lines.append(_table_line(BEHAVIOURS[linguistic].title, cells))
    if "second" in result:
        lines.append(_agreement_line("the second judge", result["second"]))
    if "people" in result:
        lines.append(_agreement_line("people", result["people"]))
    if result["missing"]:
        missing = [f"{count} {why}" for why, count in result["missing"].items()]
        lines.append(f"without a count: {', '.join(missing)}")
    return "\n".join(lines)


def _accuracy_lines(checkpoints: Mapping[str, CheckpointRates]) -> list[str]:
    """Return the accuracy of the traces with and without each behaviour that occurs; none if no trace is graded."""
    lines = []
    for name, behaviour in BEHAVIOURS.items():
        splits = [rates["accuracy"][name] for rates in checkpoints.values()]
        if any(split["present"] for split in splits):
            with_behaviour = [_accuracy_cell(split["present"]) for split in splits]
            without_behaviour = [_accuracy_cell(split["absent"]) for split in splits]
            lines.append(_table_line(f"{behaviour.title}: with", with_behaviour))
            lines.append(_table_line(f"{behaviour.title}: without", without_behaviour))
    return ["accuracy", *lines] if lines else []


def _table_line(title: str, cells: Iterable[str]) -> str:
    return f"{title:36}" + "".join(f"{cell:>22}" for cell in cells)


def _agreement_line(judge: str, agreement: Agreement) -> str:
    value = agreement["kappa"]["all"]
    text = "nothing to compare" if value is None else f"{value:.2f}"
    return f"kappa with {judge}: {text} ({agreement['compared']} compared)"


def _emergence_cell(rates: CheckpointRates, behaviour: str) -> str:
    emergence = rates["behaviours"][behaviour]["emergence"]
    if emergence is None:
        return "-"
    return _percent(emergence["rate"], emergence["low"], emergence["high"])


def _accuracy_cell(accuracy: TraceAccuracy | None) -> str:
    if accuracy is None:
        return "-"
    return _percent(accuracy["accuracy"], accuracy["low"], accuracy["high"])


def _transfer_cell(rates: CheckpointRates, behaviour: str) -> str:
    rate = rates["transfer"][behaviour]
    return _percent(rate["value"], rate["low"], rate["high"])


def _percent(value: float | None, low: float | None, high: float | None) -> str:
    if value is None or low is None or high is None:  # a rate without a value has no interval
        return "-"
    return f"{100 * value:.1f} % ({100 * low:.1f}-{100 * high:.1f})"
