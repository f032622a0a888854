r"""Grade a JSONL file of responses: accuracy, and the agreement with another grader where the rows have its verdict.

A row has ``response`` (text), ``answer`` (a letter, an option's content or a value), optionally ``options`` (a
list) and ``correct`` (true or false: what another script said).  Only the last \boxed{} of a response counts.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from ovr_megatron.rewards.choice import named_letter
from ovr_megatron.rewards.latex import clean
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Reason, Verdict
from ovr_megatron.rewards.quantity import has_unit
from ovr_megatron.runtime.command import number, whole_number
from ovr_megatron.runtime.json_lines import JsonLine, json_lines
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.terminal import printable

NO_BOX = "no box in the response"
UNIT = "the benchmark's script missed a unit"
CONTENT = "the benchmark's script missed an option's content"
SIDES = "the sides of an equation differ, and the benchmark's script takes the last"
UNEXPLAINED = "unexplained"


class GradeFileError(ValueError):
    """A file that cannot be graded; the message has file, line, field and what to change."""


@dataclass(frozen=True)
class GradedRow:
    """One row of the file: the request to the grader, and another script's verdict, None where the row has none."""

    request: GradeRequest
    correct: bool | None
    raw: Mapping[str, object]


class ReferenceOption(TypedDict, total=False):
    """The option that the reference names by its letter, if it names one."""

    option: str


class Disagreement(ReferenceOption):
    """A row on which the two verdicts differ: ours is ``correct``, the file's is ``file``."""

    id: object
    answer: str
    box: str | None
    reason: str
    correct: bool
    file: bool | None


class GradeSummary(TypedDict):
    """Counts, accuracy and reasons; the last three only where rows have another script's verdict."""

    rows: int
    correct: int
    accuracy: float
    reasons: dict[str, int]
    compared: NotRequired[int]
    agreement: NotRequired[float]
    disagreements: NotRequired[dict[str, list[Disagreement]]]


def read_rows(path: Path) -> list[GradedRow]:
    """Read the rows of ``path``; empty lines are skipped.

    Raises:
        GradeFileError: no such file, no rows, or a row that is not as described above.
    """
    rows = []
    try:
        for line in json_lines(path):
            rows.append(_read_row(_parse(line, path), f"{path}:{line.number}"))
    except OSError as error:
        raise GradeFileError(f"{path}: {error.strerror}; give a JSONL file") from None
    if not rows:
        raise GradeFileError(f"{path}: no rows; give one JSON object a line")
    return rows


def _parse(line: JsonLine, path: Path) -> Mapping[str, object]:
    try:
        return line.parse()
    # Before ValueError, of which it is a kind.
    except UnicodeDecodeError as error:
        raise GradeFileError(f"{path}: byte {line.offset + error.start} is not UTF-8; convert the file") from None
    except ValueError as error:
        raise GradeFileError(f"{path}:{line.number}: {error}; write one JSON object a line") from None


def _read_row(raw: Mapping[str, object], where: str) -> GradedRow:
    response = raw.get("response")
    answer = raw.get("answer")
    options = raw.get("options") or []
    if not isinstance(response, str):
        raise GradeFileError(f"{where}:response: {_describe(raw, 'response')}; give the text of the response")
    if not _is_value(answer):
        raise GradeFileError(f"{where}:answer: {_describe(raw, 'answer')}; give the reference as a text or a number")
    if not isinstance(options, list) or not all(_is_value(option) for option in options):
        raise GradeFileError(f"{where}:options: {_describe(raw, 'options')}; give a list of texts or numbers, or none")
    correct = raw.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise GradeFileError(f"{where}:correct: {_describe(raw, 'correct')}; give true or false, or leave it out")
    return GradedRow(GradeRequest(response, str(answer), tuple(map(str, options))), correct, raw)


def _is_value(value: object) -> bool:
    """Return whether ``value`` is a text or number that can be an answer or an option."""
    # True is an int of Python, and no answer.
    return isinstance(value, str | int | float) and not isinstance(value, bool) and bool(str(value).strip())


def _describe(raw: Mapping[str, object], field: str) -> str:
    """Return the value and type of ``field`` for an error message."""
    value = raw.get(field)
    return "missing" if value is None else f"{str(value)[:60]!r} is a {type(value).__name__}"


def explain(row: GradedRow, verdict: Verdict) -> str:
    """Name the group of a disagreement, from the row and the verdict alone.

    A script that reads letters outside of a box says right where there is no box; one that takes what stands after
    the last "=" says so of "2 = 7/2", which we count as two values.  One that compares texts
    says wrong where the box has the right option's letter and content, its content, or a unit beside the value.
    """
    request = row.request
    if row.correct and verdict.reason is Reason.NO_BOX:
        return NO_BOX
    if row.correct and verdict.reason is Reason.DIFFERENT and "=" in (verdict.box or ""):
        return SIDES
    if row.correct or not verdict.correct or verdict.box is None:
        return UNEXPLAINED
    if verdict.reason is Reason.LETTER:
        letter = named_letter(clean(verdict.box), len(request.options))
        return CONTENT if letter is not None and letter.rest else UNEXPLAINED
    if has_unit(verdict.box) or has_unit(request.answer):
        return UNIT
    return CONTENT if verdict.reason is Reason.CONTENT else UNEXPLAINED


def summarise(rows: Sequence[GradedRow], verdicts: Sequence[Verdict]) -> GradeSummary:
    """Return counts, accuracy and reasons; where rows have ``correct`` also agreement, and disagreements by group."""
    correct_count = sum(verdict.correct for verdict in verdicts)
    summary: GradeSummary = {
        "rows": len(rows),
        "correct": correct_count,
        "accuracy": correct_count / len(rows),
        "reasons": dict(Counter(verdict.reason.value for verdict in verdicts).most_common()),
    }
    compared = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if row.correct is not None]
    if compared:
        groups: defaultdict[str, list[Disagreement]] = defaultdict(list)
        for row, verdict in compared:
            if row.correct != verdict.correct:
                groups[explain(row, verdict)].append(_disagreement(row, verdict))
        disagreements = sum(map(len, groups.values()))
        summary["compared"] = len(compared)
        summary["agreement"] = 1 - disagreements / len(compared)
        summary["disagreements"] = dict(sorted(groups.items(), key=lambda group: -len(group[1])))
    return summary


def _disagreement(row: GradedRow, verdict: Verdict) -> Disagreement:
    """Return the summary's entry of a row on which the two verdicts differ."""
    option: ReferenceOption = {}
    letter = named_letter(clean(row.request.answer), len(row.request.options))
    if letter is not None:
        option["option"] = row.request.options[letter.index]
    return {
        "id": row.raw.get("id"),
        "answer": row.request.answer,
        "box": verdict.box,
        "reason": verdict.reason.value,
        **option,
        "correct": verdict.correct,
        "file": row.correct,
    }


def print_summary(summary: GradeSummary) -> None:
    """Print `summarise`'s result for a person."""
    print(f"accuracy   {summary['accuracy']:.4f}  ({summary['correct']} of {summary['rows']})")
    for reason, count in summary["reasons"].items():
        print(printable(f"  {count:6d}  {reason}"))
    if "agreement" not in summary:
        return
    groups = summary["disagreements"]
    total = sum(map(len, groups.values()))
    print(f"agreement  {summary['agreement']:.4f}  ({total} of {summary['compared']} differ)")
    for group, entries in groups.items():
        print(printable(f"  {len(entries):6d}  {group}"))
        for entry in entries:
            answer = entry["answer"]
            if "option" in entry:
                answer += f" = {entry['option']}"
            line = f"          id {entry['id']}: box {entry['box']!r}, reference {answer!r}, file says {entry['file']}"
            print(printable(line))


def write_verdicts(path: Path, rows: Sequence[GradedRow], verdicts: Sequence[Verdict]) -> None:
    """Write each row with ``verdict`` = {correct, reason, box} added, one a line."""
    with path.open("w", encoding="utf-8") as out:
        for row, verdict in zip(rows, verdicts, strict=True):
            entry = {"correct": verdict.correct, "reason": verdict.reason.value, "box": verdict.box}
            out.write(json.dumps({**row.raw, "verdict": entry}) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, grade and report; exit 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="ovr grade", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="JSONL rows: response, answer, options, correct")
    parser.add_argument("--workers", type=whole_number(1), default=2, metavar="N", help="grader processes (default: 2)")
    parser.add_argument(
        "--timeout-s", type=number(above=0), default=5.0, metavar="S", help="CPU time of a verdict (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="write every row with its verdict to this file")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.file)
        with (
            GraderPool(args.workers, args.timeout_s) as pool,
            Progress(len(rows), "grading", "response", show=not args.json) as progress,
        ):
            verdicts = pool.grade([row.request for row in rows], progress.update)
        if args.out:
            write_verdicts(args.out, rows, verdicts)
    except (ValueError, OSError) as error:
        parser.exit(2, printable(f"{parser.prog}: {error}\n"))
    summary = summarise(rows, verdicts)
    if args.json:
        print(json.dumps(summary, indent=1))
    else:
        print_summary(summary)
