"""Rules by name: built in, and functions of the user's in a worker."""

import time

import pytest
from PIL import Image

from ovr_megatron.data.images import png_bytes
from ovr_megatron.data.schema import ImagePart, Message, Row, TextPart
from ovr_megatron.rewards.combination import combine, is_unknown
from ovr_megatron.rewards.pool import GradeRequest, GraderPool, Reason, Verdict
from ovr_megatron.rewards.rules import RuleError, cache_key, check, rule

OWN = """
def half(response, answer, options):
    return 0.5 if answer in response else 0.0

def whole(response, answer, options):
    return len(options) / 2

def wrong(response, answer, options):
    return 7

def broken(response, answer, options):
    return {}[answer]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def graded(name, box, answer, options=()):
    return rule(name)(GradeRequest(f"so \\boxed{{{box}}}", answer, options, name)).reason


@pytest.mark.parametrize(
    ("name", "box", "answer", "options", "reason"),
    [
        ("auto", r"\frac{1}{2}", "0.5", (), Reason.NUMBER),
        ("auto", "b", "B", ("x", "y"), Reason.LETTER),
        ("math", "2x+x", "3x", (), Reason.MATH),
        ("math", "A", "A", ("3", "4"), Reason.LETTER),
        ("exact", r"\frac{1}{2}", "0.5", (), Reason.DIFFERENT),
        ("exact", "0.5", "0.5", (), Reason.TEXT),
        ("choice", "(C)", "C", (), Reason.LETTER),
        ("choice", "B", "four", ("three", "four"), Reason.LETTER),
        ("choice", "four", "B", ("three", "four"), Reason.DIFFERENT),
        ("choice", "A", "four", ("three", "four"), Reason.OTHER_OPTION),
        ("numeric", "100.9", "100", (), Reason.NUMBER),
        ("numeric", "101.1", "100", (), Reason.DIFFERENT),
        ("numeric:0.05", "96", "100", (), Reason.NUMBER),
        ("numeric:0", "100.01", "100", (), Reason.DIFFERENT),
        ("numeric", "1.5 m", "150 cm", (), Reason.NUMBER),
        ("numeric", "two", "2", (), Reason.DIFFERENT),
        ("numeric", "0", "0", (), Reason.NUMBER),
        ("numeric", " ", "0", (), Reason.EMPTY_BOX),
        ("within:0.001", "2.0951", "2.0944", (), Reason.NUMBER),
        ("within:0.001", "2.0955", "2.0944", (), Reason.DIFFERENT),
        ("within:2", "4", "2", (), Reason.NUMBER),
        ("letters", "D, B", "B, D", (), Reason.LETTER),
        ("letters", "(b) and (d)", "B, D", (), Reason.LETTER),
        ("letters", "B", "B, D", (), Reason.DIFFERENT),
        ("letters", "B, D, E", "B, D", (), Reason.DIFFERENT),
        ("letters", "3", "3", (), Reason.LETTER),
        ("letters", "B because D", "B, D", (), Reason.DIFFERENT),
        ("letters", "x", "no answer is known", (), Reason.DIFFERENT),
        ("letters", "and", "no answer is known", (), Reason.DIFFERENT),
        ("letters", "BD", "B, D", (), Reason.LETTER),
        ("letters", "B/D", "B, D", (), Reason.LETTER),
        ("letters", "B: cat", "B", (), Reason.LETTER),
        ("letters", "B. 12", "D", (), Reason.DIFFERENT),
    ],
)
def test_rules_by_hand(name, box, answer, options, reason):
    assert graded(name, box, answer, options) is reason


@pytest.mark.parametrize("name", ["exact", "choice", "numeric", "auto"])
def test_no_box_is_no_answer(name):
    assert rule(name)(GradeRequest("the answer is 5", "5")).reason is Reason.NO_BOX


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", r"rule='maths' is not known \(did you mean math\?\); choose one of auto, math, exact, choice, "),
        ("numeric:x", "the tolerance must be a number"),
        ("numeric:1.5", "the tolerance must be a number"),
        ("no_such_module_of_mine:f", "No module named"),
        ("json:no_such_function", "json/__init__.py has no no_such_function; correct the name behind the colon"),
        ("json:dmps", r"json/__init__.py has no dmps; did you mean json:dumps\?"),
        ("json.py:dumps", "write the module without .py: json"),
        ("json:__doc__", "rule=json:__doc__ is of type str; make it a function"),
        ("json:a b", "rule='json:a b' is not known"),
        ("exact:nocase", "^exact:nocase: the rule exact takes no parameter; a module of yours needs another name$"),
        ("format:f", "the rule format takes no parameter"),
    ],
)
def test_a_rule_that_does_not_work_is_refused(name, message):
    with pytest.raises(RuleError, match=message):
        check(name)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_library\ndef f(response, answer, options): ...", "correct what other_rewards imports"),
        ("def f(response, answer): ...", r"other_rewards:f\(response, answer\) cannot be called with three values"),
        ("def f(a, b, c, d, e): ...", r"missing a required argument: 'd'\); write it as \(response, answer, options\)"),
        ("def f(data_source, solution_str, ground_truth, extra_info=None): ...", "data_source of a reward of verl; "),
        (
            "def f(completions, **columns): ...",
            "has the parameter completions of a reward of TRL and ms-swift; write it",
        ),
    ],
)
def test_a_function_that_takes_other_values_is_refused(source, message, tmp_path, monkeypatch):
    (tmp_path / "other_rewards.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuleError, match=message):
        check("other_rewards:f")


@pytest.mark.usefixtures("own")
def test_functions_of_the_users_run_in_the_workers():
    asked = [
        GradeRequest("it is 5", "5", (), "my_rewards:half"),
        GradeRequest("it is 6", "5", (), "my_rewards:half"),
        GradeRequest("x", "5", ("a", "b"), "my_rewards:whole"),
        GradeRequest("x", "5", (), "my_rewards:wrong"),
        GradeRequest("x", "5", (), "my_rewards:broken"),
        GradeRequest(r"\boxed{5}", "5"),
    ]
    with GraderPool(1) as pool:
        verdicts = pool.grade(asked)
    assert [verdict.reward for verdict in verdicts] == [0.5, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert [verdict.correct for verdict in verdicts] == [False, False, True, False, False, True]
    assert verdicts[3].reason is verdicts[4].reason is Reason.RAISED
    assert "KeyError" in (verdicts[4].box or "") and "not in 0..1" in (verdicts[3].box or "")


def test_verdicts_are_remembered_by_what_they_depend_on():
    first, second = (GradeRequest(rf"{text} \boxed{{\sqrt{{20}}}}", r"2\sqrt{5}") for text in "ab")
    with GraderPool(1) as pool:
        [verdict] = pool.grade([first])
        pool.submit("x", second)
        assert verdict.correct and pool.collect(wait=False) == [("x", verdict)]
    assert cache_key(second) == ("auto", r"2\sqrt{5}", (), r"\sqrt{20}")
    assert cache_key(GradeRequest("x", "y", (), "my_rewards:half")) is None


def test_what_is_pending_can_be_forgotten_and_collected_without_waiting():
    with GraderPool(1, cache=0) as pool:
        for number in range(3):
            pool.submit(number, GradeRequest(r"\boxed{5}", "5"))
        assert pool.pending == 3
        found = []
        deadline = time.monotonic() + 60
        while pool.pending and time.monotonic() < deadline:
            found += pool.collect(wait=False)
        assert sorted(key for key, _ in found) == [0, 1, 2]
        pool.submit(7, GradeRequest(r"\boxed{5}", "5"))
        pool.cancel()
        assert pool.pending == 0 and pool.collect(wait=False) == []


ROWS = """
from ovr_megatron.config import DataConfig
from ovr_megatron.data.images import load_media

def by_name(response, answer, options, *, row):
    return row.metadata["share"] if row.answer == answer else 0.0

def fourth(response, answer, options, item):
    [image], _ = load_media(item, DataConfig())
    return image.getpixel((0, 0))[0] / 255
"""


@pytest.fixture
def own_with_row(tmp_path, monkeypatch):
    (tmp_path / "row_rewards.py").write_text(ROWS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def row_with(*parts, **fields):
    return Row((Message("user", parts),), where="rows.jsonl:1", **fields)


@pytest.mark.usefixtures("own_with_row")
def test_a_function_gets_the_row_with_images_and_metadata(tmp_path):
    Image.new("RGB", (4, 4), (51, 0, 0)).save(tmp_path / "red.png")
    picture = Image.new("RGB", (4, 4), (102, 0, 0))
    question = TextPart("Which?")
    rows = [
        row_with(question, answer="5", metadata={"share": 0.25, "nested": {"a": [1, None]}}),
        row_with(ImagePart(path=tmp_path / "red.png", root=tmp_path), question, answer="5"),
        row_with(ImagePart(image=picture), question, answer="5"),
        row_with(ImagePart(data=png_bytes(picture)), question, answer="5"),
    ]
    rules = ["row_rewards:by_name", *["row_rewards:fourth"] * 3]
    requests = [GradeRequest("r", "5", (), rule, row=row) for rule, row in zip(rules, rows, strict=True)]
    with GraderPool(1) as pool:
        # Twice: the first time the worker asks for the row, the second time the pool knows that it does.
        for _ in range(2):
            assert [verdict.reward for verdict in pool.grade(requests)] == [0.25, 0.2, 0.4, 0.4]
        [without] = pool.grade([GradeRequest("r", "5", (), "row_rewards:by_name")])
    assert without.failed and without.reason is Reason.NEEDS_ROW


@pytest.mark.usefixtures("own_with_row")
def test_every_worker_that_asks_gets_the_row():
    """Both workers have a request without its row before the first of them asks for one."""
    row = row_with(TextPart("Which?"), answer="5", metadata={"share": 0.25, "nested": {}})
    with GraderPool(2) as pool:
        while not all(worker.ready for worker in pool._workers):
            pool.grade([GradeRequest(r"\boxed{5}", "5", (), "math")] * 4)
        verdicts = pool.grade([GradeRequest(f"r{i}", "5", (), "row_rewards:by_name", row=row) for i in range(6)])
    assert [verdict.reward for verdict in verdicts] == [0.25] * 6


MIXED = {"math": 0.9, "format": 0.1}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"<think>2 + 3</think>\boxed{5}", 1.0),
        (r"\boxed{5}", 0.9),
        (r"<think>2 + 3</think>\boxed{6}", 0.1),
        ("6", 0.0),
    ],
)
def test_weighted_rules_add_up(response, reward):
    with GraderPool(1) as pool:
        [verdict] = pool.grade([GradeRequest(response, "5", (), MIXED)])
    assert verdict.reward == pytest.approx(reward, abs=1e-12)
    assert (verdict.reward == 1.0) == (reward == 1.0) == verdict.correct
    assert verdict.reason is Reason.WEIGHTED and "math" in verdict.box and "format" in verdict.box


def test_weights_that_add_up_to_1_only_nearly_give_the_full_reward():
    right = Verdict(Reason.SCORE, None, 1.0)
    weights = {"ocr": 0.7, "format": 0.2, "repetition": 0.1}
    assert combine(weights, dict.fromkeys(weights, right)).reward == 1.0


@pytest.mark.usefixtures("own")
def test_where_one_rule_knows_nothing_all_of_them_do():
    hostile = "\\boxed{9^{9^{9^{9^9}}}}"
    requests = [
        GradeRequest(r"<think>a</think>\boxed{5}", "x", (), {"math": 0.5, "my_rewards:broken": 0.5}),
        # An expression that no grader can finish is wrong, and the other rule still counts.
        GradeRequest(f"<think>a</think>{hostile}", "\\sqrt{2}", (), {"math": 0.5, "format": 0.5}),
    ]
    with GraderPool(2, timeout_s=0.5) as pool:
        unknown, wrong = pool.grade(requests)
    assert unknown.reason is Reason.RAISED and is_unknown(unknown, requests[0].rule)
    assert "my_rewards:broken 0" in unknown.box
    assert wrong.reward == 0.5 and not is_unknown(wrong, requests[1].rule) and "timeout" in wrong.box


def test_weighted_verdicts_keep_the_callers_keys():
    with GraderPool(1, cache=16) as pool:
        for key in "ab":
            pool.submit(key, GradeRequest(r"\boxed{5}", "5", (), {"math": 0.5, "exact": 0.5}))
        pool.submit("c", GradeRequest(r"\boxed{5}", "5"))
        verdicts = {}
        while pool.pending:
            verdicts |= dict(pool.collect())
    assert {key: verdict.reward for key, verdict in verdicts.items()} == {"a": 1.0, "b": 1.0, "c": 1.0}


@pytest.mark.parametrize(
    ("name", "response", "thinking", "reward"),
    [
        ("format", r"So.</think>\boxed{5}", True, 1.0),
        ("format", r"<think>So.</think>\boxed{5}", False, 1.0),
        ("format", r"<think>So.</think>\boxed{5}", True, 0.0),
        ("format", r"So.</think>\boxed{5}", False, 0.0),
        ("format", r"</think>\boxed{5}", True, 0.0),
        ("format", r"So.</think>5", True, 0.0),
        ("format", r"So.</think>\boxed{ }", True, 0.0),
        ("format", r"So.</think>\boxed{5} or \boxed{6}", True, 0.0),
        ("format", r"So.</think>No.</think>\boxed{5}", True, 0.0),
        ("format", r"So \boxed{5}", True, 0.0),
        ("language:en", "The answer is $答案$ five.", False, 1.0),
        ("language:en", "ab 答案", False, 0.5),
        ("language:zh", r"答案 \frac{1}{2} $x$", False, 1.0),
        ("language:zh", "答案 is", False, 0.5),
        ("language:en", "да", False, 0.0),
        ("repetition", "abc", False, 1.0),
        ("repetition", "aaaa", False, 1 - 6 / 10),
    ],
)
def test_rules_of_style_by_hand(name, response, thinking, reward):
    verdict = rule(name)(GradeRequest(response, "", (), name, thinking))
    assert verdict.reward == pytest.approx(reward)


def test_the_language_is_that_of_the_question():
    rows = [row_with(TextPart("图中有几只猫? (A) cat"), answer="1"), row_with(TextPart("How many?"), answer="1")]
    with GraderPool(1) as pool:
        verdicts = pool.grade([GradeRequest("三只猫", "1", (), "language", row=row) for row in rows])
        [unknown] = pool.grade([GradeRequest("三只猫", "1", (), "language")])
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0]
    assert unknown.reason is Reason.BAD_REFERENCE
