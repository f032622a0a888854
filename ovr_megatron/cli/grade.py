r"""Grade a JSONL file of responses: accuracy, and the agreement with another grader where the rows have its verdict.

A row has ``response`` (text), ``answer`` (a letter, an option's content, a value, or boxes and points in JSON; a rule
that does not read it needs none), optionally ``options`` (a list) and ``correct`` (true or false: what another script
said).  Only the last \boxed{} of a response counts, unless --rule names a rule that reads more of it.  Rules that read
the row need ``messages``, those that scale coordinates ``image_size`` (width and height of the file, then as the model
sees it).  Settings such as reward.judges.NAME.base_url=URL describe judges.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from ovr_megatron.rewards.choice import named_letter
from ovr_megatron.rewards.combination import is_unknown, needs_answer
from ovr_megatron.rewards.judge_client import Judges
from ovr_megatron.rewards.judge_templates import open_templates
from ovr_megatron.rewards.latex import clean
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Reason, Verdict
from ovr_megatron.rewards.quantity import has_unit
from ovr_megatron.rewards.rules import answer_problem, reads_box
from ovr_megatron.runtime.command import number, whole_number
from ovr_megatron.runtime.json_lines import JsonLine, json_lines
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.terminal import printable

if TYPE_CHECKING:
    from ovr_megatron.config import RewardConfig
    from ovr_megatron.data.schema import ImageSize

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
    where: str = ""


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
    """Counts, accuracy and reasons; ``reward``, the mean, only where a rule gives rewards between 0 and 1.

    Accuracy and mean are those of the rows with a reward; ``unknown`` is the number of the others, where there are
    some, and the accuracy None where all are.  The last three are there only where rows have another script's verdict.
    """

    rows: int
    correct: int
    accuracy: float | None
    unknown: NotRequired[int]
    reward: NotRequired[float]
    reasons: dict[str, int]
    compared: NotRequired[int]
    agreement: NotRequired[float]
    disagreements: NotRequired[dict[str, list[Disagreement]]]


def read_rows(path: Path, has_answers: bool = True) -> list[GradedRow]:
    """Read the rows of ``path``; empty lines are skipped.  Without ``has_answers`` a row may have no answer.

    Raises:
        GradeFileError: no such file, no rows, or a row that is not as described above.
    """
    rows = []
    try:
        for line in json_lines(path):
            rows.append(_read_row(_parse(line, path), f"{path}:{line.number}", has_answers))
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


def _read_row(raw: Mapping[str, object], where: str, has_answers: bool) -> GradedRow:
    response = raw.get("response")
    answer = raw.get("answer")
    options = raw.get("options") or []
    if not isinstance(response, str):
        raise GradeFileError(f"{where}:response: {_describe(raw, 'response')}; give the text of the response")
    if isinstance(answer, list | dict):
        # Images are loaded only for answers of perception.
        from ovr_megatron.data.row_parsing import is_regions

        if is_regions(answer):
            answer = json.dumps(answer, ensure_ascii=False)
    if answer is None and not has_answers:
        answer = ""
    elif not _is_value(answer):
        raise GradeFileError(f"{where}:answer: {_describe(raw, 'answer')}; give the reference as a text or a number")
    if not isinstance(options, list) or not all(_is_value(option) for option in options):
        raise GradeFileError(f"{where}:options: {_describe(raw, 'options')}; give a list of texts or numbers, or none")
    correct = raw.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise GradeFileError(f"{where}:correct: {_describe(raw, 'correct')}; give true or false, or leave it out")
    request = GradeRequest(response, str(answer), tuple(map(str, options)))
    return GradedRow(request, correct, raw, where)


def with_rule(rows: Sequence[GradedRow], rule: str, thinking: bool, folder: Path) -> list[GradedRow]:
    """Return the rows with ``rule`` in their requests, and what it reads of the file's row.

    Args:
        rows: Of a file.
        rule: Name of the rule.
        thinking: Whether the prompts opened a thought.
        folder: Bounds the paths of images.

    Raises:
        GradeFileError: a reference is none of the rule, or the row is no row of ours.
    """
    graded_rows = []
    for row in rows:
        problem = answer_problem(rule, row.request.answer, row.request.options)
        if problem:
            raise GradeFileError(f"{row.where}:answer: {problem}; give a reference of the rule {rule}")
        data_row = None
        if row.raw.get("messages") is not None and not reads_box(rule):
            # Torch is not loaded for the usual rules.
            from ovr_megatron.data.row_parsing import parse_row

            # `read_rows` has refused a row without the answer that its rule reads.
            data_row = parse_row(row.raw, row.where, folder, needs_answer=False)
        request = replace(row.request, rule=rule, thinking=thinking, row=data_row, image=_image_size(row))
        graded_rows.append(replace(row, request=request))
    return graded_rows


def _image_size(row: GradedRow) -> ImageSize | None:
    value = row.raw.get("image_size")
    if value is None:
        return None
    from ovr_megatron.data.schema import ImageSize

    if not (isinstance(value, list) and len(value) == 4 and all(type(side) is int and side > 0 for side in value)):
        raise GradeFileError(
            f"{row.where}:image_size: {_describe(row.raw, 'image_size')}; give width and height of the file, then of "
            "the image that the model sees, a list of four whole numbers"
        )
    return ImageSize(*value)


def read_reward(settings: Sequence[str], rule: str) -> RewardConfig:
    """Return the reward settings of ``reward.KEY=VALUE`` arguments, with ``rule`` for all rows.

    Raises:
        ConfigError: there is no such setting, or a value that cannot work.
        RuleError: the rule would not work.
    """
    from omegaconf import OmegaConf

    from ovr_megatron.config import ConfigError, RewardConfig, build
    from ovr_megatron.rewards.combination import check_rules

    for setting in settings:
        if not setting.startswith("reward.") or "=" not in setting:
            raise ConfigError(f"{setting}: give settings as reward.judges.NAME.base_url=URL")
    values = OmegaConf.from_dotlist(list(settings)).get("reward", {})
    config = build(RewardConfig, values)
    config = replace(config, rules={"rows": rule})
    check_rules(config)
    return config


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
    if verdict.score is not None:  # the box is then a note of the rule
        return UNEXPLAINED
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
    graded = [pair for pair in zip(rows, verdicts, strict=True) if not is_unknown(pair[1], pair[0].request.rule)]
    correct_count = sum(verdict.correct for _, verdict in graded)
    summary: GradeSummary = {
        "rows": len(rows),
        "correct": correct_count,
        "accuracy": correct_count / len(graded) if graded else None,
        "reasons": dict(Counter(verdict.reason.value for verdict in verdicts).most_common()),
    }
    if len(graded) < len(rows):
        summary["unknown"] = len(rows) - len(graded)
    if any(verdict.score is not None for _, verdict in graded):
        summary["reward"] = sum(verdict.reward for _, verdict in graded) / len(graded)
    compared = [(row, verdict) for row, verdict in graded if row.correct is not None]
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
    unknown = summary.get("unknown", 0)
    if summary["accuracy"] is not None:
        print(f"accuracy   {summary['accuracy']:.4f}  ({summary['correct']} of {summary['rows'] - unknown})")
    if unknown:
        print(f"unknown    {unknown} of {summary['rows']} rewards, which count in no figure")
    if "reward" in summary:
        print(f"reward     {summary['reward']:.4f}  (mean)")
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
            entry: dict[str, object] = {"correct": verdict.correct, "reason": verdict.reason.value, "box": verdict.box}
            if verdict.score is not None:
                entry["reward"] = verdict.score
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
    parser.add_argument("--rule", default="auto", metavar="RULE", help="rule of rewards, as box:0.5 (default: auto)")
    parser.add_argument("--thinking", action="store_true", help="prompts opened a thought (data.template=think)")
    parser.add_argument("settings", nargs="*", metavar="reward.KEY=VALUE", help="settings of judges")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="write every row with its verdict to this file")
    args = parser.parse_intermixed_args(argv)
    try:
        reward = read_reward(args.settings, args.rule)
        has_answers = needs_answer(args.rule, open_templates(reward.judges))
        rows = with_rule(read_rows(args.file, has_answers), args.rule, args.thinking, args.file.parent)
        judges = Judges(reward.judges, args.file.with_suffix(".judges"))
        with (
            GraderPool(args.workers, args.timeout_s, judges=judges) as pool,
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
