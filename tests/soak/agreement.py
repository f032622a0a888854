"""Our rules on what benchmarks published of their own: answers of models, each with the benchmark's verdict.

    python tests/soak/agreement.py --mathvista DIR --mathvision DIR --logicvista DIR --mmmu DIR --dynamath DIR

Each DIR is a checkout of the benchmark's repository (lupantech/MathVista, mathllm/MATH-V, Yijia-Xiao/LogicVista,
MMMU-Benchmark/MMMU, DynaMath/DynaMath).  Where an answer was extracted from a response it is put into a box, since that
is where ours stands; of MathVision the responses are graded as they are.  Prints agreement, and every disagreement by
its reason; ``--show N`` prints N of each.
"""

from __future__ import annotations

import argparse
import ast
import csv
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ovr_megatron.data.formats import find_reader
from ovr_megatron.data.schema import Row
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, worst_case
from ovr_megatron.evaluation.scoring import GradedResponse
from ovr_megatron.rewards.latex import last_box
from ovr_megatron.rewards.pool import GradeRequest, GraderPool

IMAGE = "not-opened.png"


@dataclass(frozen=True)
class Item:
    """A response to grade, the benchmark's verdict, and what may explain that ours is another."""

    file: str
    request: GradeRequest
    correct: bool
    why: str


def request(benchmark: str, row: Row, response: str) -> GradeRequest:
    rules = BENCHMARKS[benchmark].rules
    rule = rules.get(row.source) or rules.get("") or "auto"
    return GradeRequest(response, row.answer or "", row.options, rule)


def mathvista(root: Path) -> Iterator[Item]:
    for path in sorted(root.glob("results/*/output_*.json")):
        for number, item in json.loads(path.read_text()).items():
            if "true_false" in item and item.get("answer") not in (None, ""):
                row = find_reader("mathvista")(item | {"image": IMAGE}, f"{path}[{number}]", root)
                given = str(item.get("extraction") or "").strip()
                yield Item(path.name, request("mathvista", row, boxed(given)), item["true_false"], _vista(item, given))


def _vista(item: dict, given: str) -> str:
    if not given:
        return "no answer was extracted; the benchmark takes the option nearest to nothing"
    if item["question_type"] == "multi_choice":
        letter = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", given)
        if given not in item["choices"] and not letter:
            return "no option; the benchmark takes the nearest by edit distance"
        return "a letter or an option"
    if item["answer_type"] == "integer" and re.fullmatch(r"-?\d+\.\d+", given):
        return "a fraction, which the benchmark cuts to an integer"
    if item["answer_type"] == "float":
        return "a number, which the benchmark rounds to the decimals of the answer and compares as text"
    return f"{item['answer_type']}"


def mathvision(root: Path) -> Iterator[Item]:
    problems = {}
    for number, line in enumerate((root / "data/test.jsonl").open()):
        raw = json.loads(line)
        problems[raw["id"]] = find_reader("mathvision")(raw | {"image": IMAGE}, f"test.jsonl:{number}", root)
    for path in sorted(root.glob("outputs/**/*.jsonl")):
        for line in path.open():
            item = json.loads(line)
            row = problems[item["id"]]
            if "correct" not in item:
                continue
            said = str(item.get("response") or "")
            why = "no box in the response" if last_box(said) is None else "a box"
            yield Item(path.stem, request("mathvision", row, said), bool(item["correct"]), why)


def logicvista(root: Path) -> Iterator[Item]:
    problems = json.loads((root / "data/dataset.json").read_text())
    for path in sorted(root.glob("eval/results/*-results.csv")):
        for item in csv.DictReader(path.open()):
            raw = problems[item["id"]]
            row = find_reader("logicvista")(raw | {"image": IMAGE}, item["id"], root)
            key = next(name for name in item if name.endswith("answer extracted"))
            letters = [str(letter) for letter in ast.literal_eval(item[key])]
            given = ", ".join(letters)
            why = "the benchmark keeps every character of its extraction" if given.startswith("z") else "letters"
            yield Item(path.stem, request("logicvista", row, boxed(given)), item["match?"] == "1", why)


def mmmu(root: Path) -> Iterator[Item]:
    for path in sorted(root.glob("mmmu-pro/output/*.jsonl")):
        for line in path.open():
            item = json.loads(line)
            pictures = {f"image_{n}": IMAGE for n in range(1, 8)}
            vision = {"image": IMAGE} if "vision" in path.name else {}
            row = find_reader("mmmu_pro")(item | pictures | vision, item["id"], root)
            asked = request("mmmu_pro", row, boxed(str(item["pred_indexs"])))
            yield Item(path.stem, asked, item["if_right"], "a letter")


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def dynamath(root: Path) -> None:
    """The worst case from the published verdicts of the ten variants, against the published counts."""
    for path in sorted(root.glob("*/*-result.csv")):
        rows = [row for row in csv.DictReader(path.open()) if re.fullmatch(r"Q\d+", row["Question ID"] or "")]
        graded = [
            GradedResponse(
                0, None, row["Question ID"], "", "", "", (), "", correct=row[f"Variant {n}"].strip() == "correct"
            )
            for row in rows
            for n in range(1, 11)
        ]
        whole = sum(row["# of correct per question"].strip() in ("10", "10.0") for row in rows) / len(rows)
        ours = worst_case(graded)["accuracy"]
        print(f"dynamath {path.stem}: worst case {100 * ours:.2f} %, by the published counts {100 * whole:.2f} %")


def compare(name: str, items: list[Item], show: int) -> None:
    with GraderPool(2) as grader:
        verdicts = list(grader.grade([item.request for item in items]))
    total, same = Counter(), Counter()
    other: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        total[item.file] += 1
        same[item.file] += verdict.correct == item.correct
        if verdict.correct != item.correct:
            r = item.request
            told = f"{last_box(r.response)!r:.70} for {r.answer!r:.50} {list(r.options)!r:.120} ({verdict.reason})"
            other[item.why, verdict.correct].append(told)
    agreed = sum(same.values())
    print(f"{name}: {agreed:,} of {len(items):,} verdicts as the benchmark's ({100 * agreed / len(items):.2f} %)")
    for (why, ours), told in sorted(other.items()):
        print(f"  {len(told):6,} {'right by ours alone' if ours else 'right by theirs alone'}: {why}")
        for line in told[:show]:
            print(f"           {line}")


READ: dict[str, Callable[[Path], Iterator[Item]]] = {
    "mathvista": mathvista,
    "mathvision": mathvision,
    "logicvista": logicvista,
    "mmmu": mmmu,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in (*READ, "dynamath"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="disagreements of each reason to print")
    arguments = parser.parse_args()
    for name, read in READ.items():
        if root := getattr(arguments, name):
            compare(name, list(read(root)), arguments.show)
    if arguments.dynamath:
        dynamath(arguments.dynamath)


if __name__ == "__main__":
    main()
