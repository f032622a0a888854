"""One engine, several problem sets, for test_evaluate.py: ``python tests/evaluation/bench.py MODEL OUT``.

The second set asks the same problems again, with the model's own greedy responses as references of every other one.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovr_megatron.config import EvaluationSettings, ParallelConfig, RolloutConfig, SourceConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.schema import Message, TextPart
from ovr_megatron.evaluation import evaluator
from ovr_megatron.evaluation.command import build_parser, data_config, dtype_of
from ovr_megatron.evaluation.evaluator import EvalContext, ProblemRequest, evaluate
from ovr_megatron.evaluation.problems import ProblemSet, open_problems
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.runtime import distributed

PUZZLES = "puzzle:digits?form=image&task=sum&split=heldout&count=8&answered=0"
LIMITS = {"max_tokens": 12, "max_prompt_tokens": 120}


def write_known(path: Path, problems: ProblemSet, responses: Path) -> None:
    greedy = [json.loads(line)["response"] for line in responses.read_text().splitlines()]
    rows = [row_to_json(problems.rows[index]) for index in range(problems.count)]
    for index, row in enumerate(rows):
        told = greedy[index] if index % 2 == 0 else "something else"
        row["messages"].append({"role": "assistant", "content": told})
        row["source"] = "known" if index < 4 else "other"
        del row["answer"]
    long = {"messages": [{"role": "user", "content": "long " * 200}, {"role": "assistant", "content": "?"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, long | {"source": "other"}]))


def interrupted(context: EvalContext, known: ProblemSet, out: Path) -> list[int]:
    """Stop after the greedy responses, lose some of what was kept, go on; how many requests each run had answered."""
    answer, answered = evaluator.answer_rows, [0, 0]
    settings = EvaluationSettings(max_tokens=12, samples=4)

    def stop(engine: RolloutEngine, processor: Processor, requests: Sequence[ProblemRequest], *rest: Any) -> None:
        answered[0] = len(answer(engine, processor, [r for r in requests if r.samples == [None]], *rest))
        raise KeyboardInterrupt

    evaluator.answer_rows = stop
    try:
        evaluate(context, known, settings, out, "mark")
    except KeyboardInterrupt:
        [path] = out.glob(".known.mark.0.answers.jsonl")
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:5]) + lines[5][:20])
        (out / ".known.other.0.answers.jsonl").write_text(lines[0])  # of other settings

    def count(*arguments: Any) -> None:
        answered[1] += len(answer(*arguments))

    evaluator.answer_rows = count
    evaluate(context, known, settings, out, "mark")
    made_again(context, known, settings, out)
    evaluator.answer_rows = answer
    return answered


def made_again(context: EvalContext, known: ProblemSet, settings: EvaluationSettings, out: Path) -> None:
    """A finished evaluation is not touched; where its rows have other answers it is graded anew, and nothing asked."""
    before = (out / "known.json").stat().st_mtime_ns
    evaluate(context, known, settings, out, "mark")
    assert (out / "known.json").stat().st_mtime_ns == before
    (out / "known.verdicts.jsonl").write_text("of a judge\n")
    rows = [known.rows[index] for index in range(known.count)]
    wrong = [replace(row, messages=(*row.prompt, Message("assistant", (TextPart("never said"),)))) for row in rows]
    found = evaluate(context, replace(known, rows=wrong), settings, out, "mark")
    assert found and found["greedy"]["correct"] == 0 and not (out / "known.verdicts.jsonl").exists()
    again = evaluate(context, known, settings, out, "mark")
    assert again and again["greedy"]["correct"] == 4


def main(model: Path, out: Path) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in LIMITS.items()]
    data = data_config(model, build_parser().parse_args(["--model", str(model), "--data", "-", "--out", "-", *options]))
    processor = Processor(model, data)
    length = sum(LIMITS.values())
    engine = RolloutEngine(model, RolloutConfig(max_num_seqs=32), processor, dtype_of(model), length)
    with GraderPool(1) as grader:
        context = EvalContext(str(model), engine, processor, grader)
        first = open_problems(SourceConfig(path=PUZZLES, name="first"))
        evaluate(context, first, EvaluationSettings(max_tokens=12, samples=0), out)
        write_known(out / "known.jsonl", first, out / "first.responses.jsonl")
        known = open_problems(SourceConfig(path=str(out / "known.jsonl"), name="known"))
        for folder in (out, out / "again"):
            evaluate(context, known, EvaluationSettings(max_tokens=12, samples=4), folder)
        (out / "asked.json").write_text(json.dumps(interrupted(context, known, out / "resumed")))
    (out / "banned.json").write_text(json.dumps(engine.banned))


if __name__ == "__main__":
    distributed.start(ParallelConfig(), seed=1, threads=1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    distributed.finish()
