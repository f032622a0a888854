"""Rules for perception: responses by hand, and the measures against torchvision, SciPy and their definitions."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from ovr_megatron.data.schema import ImageSize
from ovr_megatron.rewards.distances import edit_distance, overlap
from ovr_megatron.rewards.grounding import MAX_TEXT
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Reason
from ovr_megatron.rewards.rules import RuleError, answer_problem, check, rule

CASES = [json.loads(line) for line in (Path(__file__).parent / "cases/perception.jsonl").read_text().splitlines()]


def request_of(case):
    image = ImageSize(*case["image"]) if "image" in case else None
    thinking = case.get("thinking", False)
    return GradeRequest(case["response"], case["answer"], (), case["rule"], thinking, image=image)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['rule']}: {case['note']}")
def test_responses_judged_by_hand(case):
    assert answer_problem(case["rule"], case["answer"], ()) is None
    verdict = rule(case["rule"])(request_of(case))
    assert verdict.reward == pytest.approx(case["reward"], abs=1e-12)
    assert not verdict.failed


def test_graders_reward_as_the_rules_do():
    requests = [request_of(case) for case in CASES]
    with GraderPool(1) as pool:
        verdicts = pool.grade(requests)
    assert [v.reward for v in verdicts] == pytest.approx([case["reward"] for case in CASES])


def random_boxes(generator, count):
    # Few distinct coordinates, so that boxes touch, coincide and have no area now and then.
    corners = generator.integers(0, 12, (count, 2, 2)).astype(float)
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def test_overlap_is_torchvisions():
    generator = np.random.default_rng(0)
    first = random_boxes(generator, 400)
    second = random_boxes(generator, 400)
    expected = box_iou(torch.from_numpy(first), torch.from_numpy(second)).diagonal().nan_to_num(0.0)  # 0/0: no area
    values = [overlap(tuple(a), tuple(b)) for a, b in zip(first, second, strict=True)]
    assert values == pytest.approx(expected.tolist(), abs=1e-15)
    assert 0 < sum(value > 0 for value in values) < 400


def largest_sum(gains):
    if gains.shape[0] > gains.shape[1]:
        gains = gains.T
    rows, columns = gains.shape
    choices = itertools.permutations(range(columns), rows)
    return max(sum(gains[row, column] for row, column in enumerate(choice)) for choice in choices)


def table_distance(first, second):
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def test_the_edit_distance_is_that_of_the_table():
    generator = random.Random(3)
    for _ in range(1500):
        first, second = ("".join(generator.choices("abé字", k=generator.randrange(80))) for _ in range(2))
        assert edit_distance(first, second) == table_distance(first, second)


def test_boxes_score_as_defined_by_trying_every_matching():
    generator = np.random.default_rng(4)
    for _ in range(60):
        boxes = random_boxes(generator, int(generator.integers(1, 5)))
        references = random_boxes(generator, int(generator.integers(1, 5)))
        shares = box_iou(torch.from_numpy(boxes), torch.from_numpy(references)).nan_to_num(0.0).numpy()
        for name, gains in (("boxes", shares), ("boxes:0.3", (shares >= 0.3).astype(float))):
            response = json.dumps([{"bbox_2d": box.tolist()} for box in boxes])
            verdict = rule(name)(GradeRequest(response, json.dumps(references.tolist())))
            expected = 2 * largest_sum(gains) / (len(boxes) + len(references))
            assert verdict.reward == pytest.approx(expected, abs=1e-12)


HOSTILE = [
    "[" * MAX_TEXT,
    '{"a":' * (MAX_TEXT // 5),
    "(" * MAX_TEXT,
    "(1," * (MAX_TEXT // 3),
    " " * MAX_TEXT,
    "<ref>" * (MAX_TEXT // 5),
    "(1,2)," * (MAX_TEXT // 6),
    "<points x1=" * (MAX_TEXT // 11),
    "9" * MAX_TEXT,
    "[9" * (MAX_TEXT // 2),
    "[" + "9" * 4000 + "," + "9" * 4000 + "]",
    "`" * MAX_TEXT,
    "\\(" * 30_000,
    "$$a" * 20_000,
    "\ud800",
    "\x00(1,2),(3,4)",
]


def test_hostile_text_takes_little_cpu_time_and_raises_nothing():
    references = {"box": "[0, 0, 1, 1]", "boxes": "[0, 0, 1, 1]", "point": "[0, 0, 1, 1]", "count": "3", "ocr": "x"}
    rules = [*references, "language:en", "format", "repetition"]
    requests = [GradeRequest(text, references.get(name, ""), (), name) for text in HOSTILE for name in rules]
    with GraderPool(1, timeout_s=2.0) as pool:
        verdicts = pool.grade(requests)
    failures = [
        (request.rule, request.response[:12], verdict.reason)
        for request, verdict in zip(requests, verdicts, strict=True)
        if verdict.failed
    ]
    assert failures == []
    assert all(0 <= verdict.reward <= 1 for verdict in verdicts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("box:1.5", "box: '1.5' is no parameter of this rule; it takes a number above 0 and at most 1 or original"),
        ("box:0.5:0.6", "'0.6' is no parameter"),
        ("box:nan", "'nan' is no parameter"),
        ("boxes:label", "'label' is no parameter of this rule"),
        ("point:-1", "'-1' is no parameter of this rule; it takes a number above 0 or original"),
        ("count:0.1", "count: '0.1' is no parameter of this rule; it takes graded"),
        ("ocr:original", "'original' is no parameter"),
    ],
)
def test_a_parameter_that_does_not_work_is_refused(name, message):
    with pytest.raises(RuleError, match=message):
        check(name)


@pytest.mark.parametrize(
    ("name", "answer", "problem"),
    [
        ("box", "the dog", "it is no box"),
        ("box", "[[1, 2, 3, 4], [5, 6, 7, 8]]", "it has 2 boxes, which the rule boxes compares"),
        ("boxes", "[[1, 2, 3, 4], [5, 6]]", "it is no box"),
        ("point", "[5, 6]", "it is a point, which needs a distance in pixels, as in point:20"),
        ("point", "here", "it has no box and no point"),
        ("count", "3 or 4", "it is not one whole number"),
        ("ocr", " ", "it is empty"),
    ],
)
def test_a_reference_that_the_rule_cannot_read_is_refused(name, answer, problem):
    assert answer_problem(name, answer, ()) == problem
    verdict = rule(name)(GradeRequest("[1, 2, 3, 4]", answer))
    assert (verdict.reason, verdict.box) == (Reason.BAD_REFERENCE, problem)


def test_scaling_needs_the_size_of_the_image():
    verdict = rule("box:original")(GradeRequest("[1, 2, 3, 4]", "[1, 2, 3, 4]"))
    assert verdict.failed and "size of the image is not known" in (verdict.box or "")
