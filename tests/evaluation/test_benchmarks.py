"""Benchmarks by name: their own scores by hand, rows of one kind or of several sets, and what the paper compares."""

import json

import pytest

from ovr_megatron.config import ConfigError, EvaluationSettings, SourceConfig
from ovr_megatron.data.formats import find_reader
from ovr_megatron.evaluation.benchmarks import (
    BENCHMARKS,
    OURS,
    format_benchmarks,
    four_dimensions,
    mean_of_settings,
    paper_score,
    worst_case,
)
from ovr_megatron.evaluation.grading import grade
from ovr_megatron.evaluation.problems import open_problems
from ovr_megatron.evaluation.scoring import GradedResponse, score
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.rules import check


def graded(id, correct, source="all"):
    return GradedResponse(0, None, id, source, "?", "8", (), "boxed", response="..", correct=correct)


def variants(*right):
    """Ten variants of each question, the first of them right as often as told."""
    return [graded(str(n), at < count) for n, count in enumerate(right) for at in range(10)]


def test_the_worst_case_wants_every_variant():
    found = worst_case(variants(10, 9, 0))
    assert found and found["accuracy"] == pytest.approx(1 / 3)
    assert worst_case(variants(10, 9, 0)[:-1]) is None, "a variant was not asked"


def wemath(*problems):
    """Responses of problems: verdicts of the steps, and of the whole at the end."""
    for number, verdicts in enumerate(problems):
        *steps, whole = verdicts
        kind = f"{len(steps)}steps"
        for at, right in enumerate(steps, 1):
            yield graded(f"{kind}_{number}/{kind}_{at}", right)
        yield graded(f"{kind}_{number}/{kind}_multi", whole)


def test_four_dimensions_by_hand():
    responses = list(
        wemath(
            (True, True, True),  # mastered
            (True, False, True),  # by rote; loosely mastered
            (False, False, True),  # by rote
            (True, True, False),  # does not generalise: a half
            (True, True, True, False),  # likewise, three steps
            (False, True, False),  # does not know
            (False, True, True, True),  # by rote; loosely mastered
            (False, False, False),  # does not know
        )
    )
    assert four_dimensions(responses, strict=True)["accuracy"] == pytest.approx((1 + 2 / 2) / 8)
    assert four_dimensions(responses, strict=False)["accuracy"] == pytest.approx((3 + 2 / 2) / 8)
    assert four_dimensions(responses[:-1], strict=True) is None, "the whole problem was not asked"
    assert four_dimensions(responses[1:], strict=True) is None, "a step was not asked"


def test_mmmu_pro_is_the_mean_of_its_two_settings():
    standard = [graded("a", True, "standard"), graded("b", True, "standard")]
    vision = [graded("a", True, "vision"), graded("b", False, "vision")]
    assert mean_of_settings(standard + vision)["accuracy"] == 0.75
    assert mean_of_settings(standard) is None and mean_of_settings(standard + vision[:1]) is None


def test_the_paper_is_compared_with_the_score_that_it_gives():
    official = BENCHMARKS["dynamath"].official
    found = score(variants(10, 5), official)
    assert found["greedy"]["accuracy"] == 0.75
    title = "DynaMath, worst case"
    assert paper_score("dynamath", title, found)["accuracy"] == 0.5
    assert paper_score("dynamath", title, score(variants(10, 5)[:12], official)) is None, "no average in its place"
    judged = score(variants(10, 10), official)
    assert paper_score("dynamath", title, found | {"judged": judged | {"missing": {"refused": 1}}})["accuracy"] == 1.0
    half = found | {"judged": judged | {"missing": {"not asked": 7}}}
    assert paper_score("dynamath", title, half)["accuracy"] == 0.5, "the judge is not through"
    drawn = [GradedResponse(0, n, "1", "all", "?", "8", (), "boxed", "..", correct=n < 3) for n in range(4)]
    assert paper_score("aime2024", "AIME 2024", score([graded("1", False), *drawn]))["accuracy"] == 0.75
    assert paper_score("math500", "MATH500", score([graded("1", True)]))["accuracy"] == 1.0


def test_the_table_names_what_runs_every_set():
    lines = format_benchmarks().splitlines()[1:]
    assert len(lines) == len(BENCHMARKS) == 25
    for line, benchmark in zip(lines, BENCHMARKS.values(), strict=True):
        assert line.startswith(benchmark.name) and (benchmark.paths or benchmark.command) and benchmark.harness in line
        for rule in benchmark.rules.values():
            check(rule)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_copy_of_a_benchmark_keeps_its_rules(tmp_path):
    kinds = [("float", "2.0944"), ("text", "Sep"), ("multiple choice", "B")]
    image = {"bytes": "aGVsbG8=", "path": None}
    rows = [
        {"id": str(n), "question": "Q?", "ground_truth": answer, "answer_type": kind, "decoded_image": image}
        for n, (kind, answer) in enumerate(kinds)
    ]
    problems = open_problems(SourceConfig(name="dynamath", path=write(tmp_path / "rows.jsonl", rows)))
    assert problems.benchmark is BENCHMARKS["dynamath"]
    metrics = [problems.metric_of(problems.rows[at], "auto") for at in range(3)]
    assert metrics == [("within:0.001", "2.0944"), ("boxed", "Sep"), ("boxed", "B")]
    other = open_problems(SourceConfig(name="other", path=str(tmp_path / "rows.jsonl")))
    assert other.metric_of(other.rows[0], "auto") == ("boxed", "2.0944")
    given = [("\\boxed{2.095}", 0), ("\\boxed{2.097}", 0), ("\\boxed{sep}", 1), ("\\boxed{b}", 2)]
    asked = [
        GradedResponse(at, None, "", kinds[at][0], "Q?", metrics[at][1], (), metrics[at][0], response=response)
        for response, at in given
    ]
    with GraderPool(1) as grader:
        assert [r.correct for r in grade(grader, asked)] == [True, False, True, True]


def test_rows_of_one_kind_alone(tmp_path):
    image = {"bytes": "aGVsbG8=", "path": None}
    rows = [
        {"problem_version": version, "question": "", "image": image, "answer": "4", "question_type": "free-form"}
        for version in ("Text Lite", "Vision Only", "Vision Only", "Text Lite")
    ]
    problems = open_problems(SourceConfig(name="mathverse", path=write(tmp_path / "rows.jsonl", rows)))
    assert problems.count == 2 and {problems.rows[at].source for at in range(2)} == {"Vision Only"}
    with pytest.raises(ConfigError, match="no row is of the source 'Vision Only', which MathVerse"):
        open_problems(SourceConfig(name="mathverse", path=write(tmp_path / "text.jsonl", rows[:1])))


def test_a_benchmark_by_its_name_is_opened_where_it_is_published(monkeypatch):
    """What the hub would be asked for; it is not reached here."""
    asked = []

    class Rows(list):
        pass

    def opened(config):
        asked.append((config.path, config.name))
        return Rows([find_reader("math")({"problem": "?", "answer": str(len(asked))}, "x[0]", None)])

    monkeypatch.setattr("ovr_megatron.evaluation.problems.open_source", opened)
    problems = open_problems(SourceConfig(name="mmmu_pro", path="mmmu_pro"))
    assert [path.partition("config=")[2] for path, _ in asked] == ["standard+(10+options)", "vision"]
    assert problems.count == 2 and not any(name for _, name in asked)
    assert [problems.rows[at].answer for at in range(2)] == ["1", "2"]
    with pytest.raises(IndexError):
        problems.rows[2]
    aime = open_problems(SourceConfig(name="aime2024", path="aime2024"))
    assert aime.resolve_settings(EvaluationSettings(samples=None)).samples == 16
    assert problems.resolve_settings(EvaluationSettings(samples=None)).samples == 0
    assert problems.resolve_settings(EvaluationSettings(samples=3)).samples == 3
    with pytest.raises(ConfigError, match=r"MME is run by VLMEvalKit \(its name there: MME\)"):
        open_problems(SourceConfig(name="mme", path="mme"))
    assert all(bool(b.paths) == (b.harness == OURS) for b in BENCHMARKS.values())
