"""Forms of reasoning traces."""

import pytest

from ovr_megatron.data.traces import continuation, convert, convert_instruction, problem_of, with_thought

OPENTHOUGHTS = (
    "<|begin_of_thought|>\n\nHm.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nIt is 6.\n\n<|end_of_solution|>"
)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (OPENTHOUGHTS, "<think>\nHm.\n</think>\n\nIt is 6."),
        ("\n" + OPENTHOUGHTS, "<think>\nHm.\n</think>\n\nIt is 6."),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>b", "<think>\na\n</think>\n\nb"),
        ("<thinking>\nHm.\n</thinking>\nSix.", "<think>\nHm.\n</think>\n\nSix."),
        ("<reasoning>\nHm.\n</reasoning>\n<answer>\n6\n</answer>", "<think>\nHm.\n</think>\n\n\\boxed{6}"),
        ("<thought>Hm.</thought>Six.", "<think>\nHm.\n</think>\n\nSix."),
        ("<think>Hm.</think><answer>6</answer>", "<think>Hm.</think>\\boxed{6}"),
        ("Hm.</think> <answer> \\boxed{6} </answer>\n", "Hm.</think> \\boxed{6}"),
        ("Hm.</think><answer>First line.\nSecond.</answer>", "Hm.</think>First line.\nSecond."),
        ("<think>\nHm.\n</think>\n\n\\boxed{6}", None),
        ("It is <thinking>6</thinking>.", None),
        ("<thinking>It never ends", None),
        ("<think>Write <answer>6</answer> here.</think>6", None),
        ("", None),
    ],
)
def test_known_forms_become_ours_and_others_stay(reply: str, expected: str | None) -> None:
    assert convert(reply) == (reply if expected is None else expected)
    assert convert(convert(reply)) == convert(reply)


def test_what_the_template_opened_is_taken_off_once() -> None:
    assert continuation("<think>\nHm.</think>6") == continuation("\n\n <think>Hm.</think>6") == "Hm.</think>6"
    assert continuation("<think>\n\nHm.</think>6") == "\nHm.</think>6"
    assert continuation("  Hm.</think>6") == "  Hm.</think>6"


def test_a_thought_that_does_not_fit_is_named() -> None:
    assert problem_of("Hm.</think>6") is None
    assert problem_of("Hm.</think>Write <think> in HTML.") is None
    assert "has <think> after its beginning" in str(problem_of("Hm.</think>\n<think>Well.</think>6"))
    assert "has no </think>" in str(problem_of("Hm."))
    assert "has <think>" in str(problem_of("Well. <think>Hm.</think>6"))


def test_a_thought_and_an_answer_make_a_trace() -> None:
    assert with_thought("\nHm.\n", " 6 ") == "<think>\nHm.\n</think>\n\n6"
    assert problem_of(continuation(with_thought("Hm.", "6"))) is None


def test_an_instruction_asks_for_the_marks_that_are_learned() -> None:
    asked = "Write <|begin_of_thought|> {thought} <|end_of_thought|> <|begin_of_solution|> {answer} <|end_of_solution|>"
    assert convert_instruction(asked) == "Write <think> {thought} </think> {answer} "
    assert convert_instruction("Be brief.") == "Be brief."
