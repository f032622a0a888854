import itertools
import os
from dataclasses import replace

import pytest

from ovr_megatron.data.schema import Message, Row, RowError, TextPart
from ovr_megatron.evaluation.command import without_verdict
from ovr_megatron.evaluation.grading import grade as grade_responses
from ovr_megatron.evaluation.scoring import GradedResponse, add_votes, k_values, majority_is_right, reference_of, score
from ovr_megatron.rewards.grader import grade
from ovr_megatron.rewards.pool import GradeRequest, GraderPool


def row(response=None, answer=None):
    messages = [Message("user", (TextPart("Add 3+5."),))]
    if response is not None:
        messages.append(Message("assistant", (TextPart(response),)))
    return Row(tuple(messages), answer=answer, where="rows.jsonl:7")


def graded(index, source, greedy, *drawn, tokens=10):
    """One problem: its greedy verdict and those of its samples; None is a prompt that was not asked."""
    verdicts = [greedy, *drawn]
    for number, right in enumerate(verdicts):
        asked = {} if right is None else {"response": "...", "tokens": tokens, "stopped": True, "correct": right}
        yield GradedResponse(index, number - 1 if number else None, f"{index}", source, "?", "8", (), "boxed", **asked)


def test_a_caption_is_compared_as_text_and_a_solution_by_its_box():
    assert reference_of(row("List: red3.", "List: red3."), "auto") == ("exact", "List: red3.")
    assert reference_of(row("List: red3."), "auto") == ("exact", "List: red3.")
    assert reference_of(row("So</think>\\boxed{8}", "8"), "auto") == ("boxed", "8")
    assert reference_of(row(answer="8"), "auto") == ("boxed", "8")
    assert reference_of(row(answer="List: red3."), "exact") == ("exact", "List: red3.")


def test_a_row_without_reference_is_refused():
    with pytest.raises(RowError, match=r"rows\.jsonl:7: answer: is missing; .*--metric exact"):
        reference_of(row("List: red3."), "boxed")


def test_scores_by_hand():
    responses = [
        *graded(0, "grid", True, True, False, True, True),  # pass@1 3/4, pass@2 1
        *graded(1, "grid", False, False, False, False, True),  # pass@1 1/4, pass@2 1 - C(3,2)/C(4,2) = 1/2
        *graded(2, "text", False, False, False, False, False, tokens=40),
    ]
    found = score(responses)
    assert found["problems"] == 3
    assert found["dropped"] == 0
    assert found["greedy"]["correct"] == 1
    assert found["greedy"]["accuracy"] == pytest.approx(1 / 3)
    assert found["greedy"]["low"] < 1 / 3 < found["greedy"]["high"]
    assert found["greedy"]["tokens"] == 20
    assert found["sampled"]["samples"] == 4
    assert {k: share["accuracy"] for k, share in found["sampled"]["pass"].items()} == pytest.approx(
        {"1": 1 / 3, "2": 1.5 / 3, "4": 2 / 3}
    )
    assert found["sources"]["grid"]["greedy"]["accuracy"] == 0.5
    assert found["sources"]["text"]["sampled"]["pass"]["4"]["accuracy"] == 0
    assert found["sources"]["text"]["greedy"]["problems"] == 1


@pytest.mark.parametrize(
    ("answers", "chance"),
    [
        ("8 8 5", 1.0),
        ("5 8 5", 0.0),
        ("8.0 8 5 5", 0.5),  # the right ones are one answer, and the tie is broken by lot
        ("8 5 7", 1 / 3),
        ("- - 8", 1.0),  # no box, no vote
        ("- -", 0.0),
    ],
)
def test_the_majority_by_hand(answers, chance):
    group = [
        GradedResponse(0, number, "0", "a", "?", "8", (), "boxed", "So" if answer == "-" else f"\\boxed{{{answer}}}",
               correct=answer.startswith("8"))
        for number, answer in enumerate(answers.split())
    ]  # fmt: skip
    assert majority_is_right(group) == pytest.approx(chance)
    sampled = score([*graded(0, "a", True), *group])["sampled"]
    assert sampled["majority"]["accuracy"] == pytest.approx(chance)
    assert sampled["average"] == sampled["pass"]["1"]


def test_answers_are_grouped_as_the_grader_would():
    """maj@k of "3, 3.0, 1/2, 0.5" where 3 is right is a lot, however the wrong one is written."""
    cases = [
        (["3", "3.0", "\\frac12", "0.5", "1/2"], "3", (), 0.0),
        (["A", "A", "B", "(B)", "\\text{B}"], "A", ("1", "2", "3", "4"), 0.0),
        (["A", "A", "B", "B. 2"], "A", ("1", "2", "3", "4"), 0.5),
        (["12", "12", "13", "13 \\text{ cm}", "$13$"], "12", (), 0.0),
        (["12", "12", "13 cm", "13 m", "14"], "12", (), 1.0),
    ]
    groups = []
    for index, (boxes, reference, options, _) in enumerate(cases):
        for sample, box in enumerate(boxes):
            text = f"so \\boxed{{{box}}}"
            right = grade(GradeRequest(text, reference, options)).correct
            groups.append(
                GradedResponse(index, sample, "q", "s", "?", reference, options, "boxed", text, 5, True, correct=right)
            )
    with GraderPool(1) as grader:
        groups = add_votes(grader, groups)
    chances = [majority_is_right([r for r in groups if r.index == index]) for index in range(len(cases))]
    assert chances == [chance for *_, chance in cases]


def test_a_response_without_a_verdict_is_counted(tmp_path, monkeypatch):
    """A rule that raises an error: its responses count as wrong, and the scores say that nothing is known of them."""
    (tmp_path / "broken_rule.py").write_text("def reward(response, answer, options):\n    raise ValueError('broken')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    metrics = ("broken_rule:reward", "boxed")
    asked = [
        GradedResponse(0, None, "0", "a", "?", "8", (), metric, r"\boxed{8}", 3, stopped=True) for metric in metrics
    ]
    with GraderPool(1) as grader:
        graded_responses = grade_responses(grader, asked)
    scores = score([*graded_responses, replace(graded_responses[0], sample=0)])
    assert (scores["greedy"]["correct"], scores["greedy"]["failed"], scores["sampled"]["failed"]) == (1, 1, 1)
    assert without_verdict(scores) == (
        "; no verdict on 1 greedy, 1 sampled responses, counted as wrong: their graders failed"
    )
    assert without_verdict(score(graded_responses[1:])) == ""


def test_a_prompt_that_was_not_asked_counts_as_wrong_and_not_in_the_lengths():
    found = score([*graded(0, "a", True, True), *graded(1, "a", None, None)])
    assert (found["problems"], found["dropped"]) == (2, 1)
    assert found["greedy"]["accuracy"] == 0.5
    assert found["greedy"]["tokens"] == 10
    assert found["sampled"]["pass"]["1"]["accuracy"] == 0.5


def test_nothing_sampled_is_said_to_be_so():
    assert score(list(graded(0, "a", True)))["sampled"] is None


def test_reported_k_rise_to_the_number_of_samples():
    expected = [[1], [1, 2], [1, 2, 3], [1, 2, 4, 8], [1, 2, 4, 8, 12]]
    assert [k_values(samples) for samples in (1, 2, 3, 8, 12)] == expected


def test_responses_sort_by_problem_with_the_greedy_one_first():
    responses = [*graded(1, "a", True, True, True), *graded(0, "a", True, True)]
    for shuffled in itertools.islice(itertools.permutations(responses), 20):
        order = [(r.index, r.sample) for r in sorted(shuffled, key=lambda r: r.order)]
        assert order == [(0, None), (0, 0), (1, None), (1, 0), (1, 1)]
