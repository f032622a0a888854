"""Every rule by a row that breaks it and one that does not."""

from typing import Any

import pytest

from ovr_megatron.config import ConfigError
from ovr_megatron.curation.patterns import broken_rule
from ovr_megatron.curation.settings import PatternsConfig

GOOD = "We add the two numbers, so that it is five.</think>The answer is \\boxed{5}."
SPANISH = "Sumamos los dos numeros y obtenemos cinco porque dos mas tres son cinco. "
LONG_SPANISH = " ".join(f"{SPANISH}{word}" for word in ("primero", "segundo", "tercero", "cuarto", "quinto"))
EN = PatternsConfig(language="en")


def row(response: str | None, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "2+3?"}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return {"messages": messages, "answer": "5", **more}


@pytest.mark.parametrize(
    ("response", "config", "reason"),
    [
        (GOOD, EN, None),
        (None, EN, None),
        (" ", EN, "response too short"),
        (GOOD, PatternsConfig(max_characters=20), "response too long"),
        (GOOD.removesuffix("\\boxed{5}."), EN, "no box"),
        ("So \\boxed{5}</think>five", EN, "no box"),
        ("So</think>\\boxed{ }", EN, "no box"),
        ("So</think>\\boxed{5", EN, "no box"),
        ("So \\boxed{5}", EN, "thought without end"),
        ("So</think>\\boxed{5}</think>", EN, "several ends of thought"),
        ("</think>\\boxed{5}", EN, "empty thought"),
        ("So \\boxed{5}</think>\n", EN, "nothing after the thought"),
        (GOOD + "<|im_end|>", EN, "leaked template token"),
        (GOOD + "\nHuman: and 3+4?", EN, "leaked template token"),
        ("<think>" + GOOD, EN, "leaked template token"),
        (GOOD + " if x<|y|>z", EN, None),
        (GOOD + " if x < |y| and z > 3, then [INSTEAD]", EN, None),
        ("\u0421\u043b\u043e\u0436\u0438\u043c" + GOOD, EN, "foreign script"),
        ("\u6211\u4eec\u628a\u4e24\u4e2a\u6570\u76f8\u52a0\u5f97\u5230\u4e94</think>\\boxed{5}", EN, "foreign script"),
        ("\u6211\u4eec\u628a\u4e24\u4e2a\u6570\u76f8\u52a0</think>\\boxed{5}", PatternsConfig(language="zh"), None),
        (GOOD, PatternsConfig(language="zh"), "other language"),
        (LONG_SPANISH + "</think>\\boxed{5}", EN, "other language"),
        (LONG_SPANISH + "</think>\\boxed{5}", PatternsConfig(max_repetition=1), None),
        ("Wait, let me check this again. " * 30 + GOOD, EN, "repetition"),
        ("Wait, let me check this again. " * 30 + GOOD, PatternsConfig(max_repetition=1.0), None),
        (GOOD, PatternsConfig(drop={"five": r"it is f\w+e"}), "pattern five"),
    ],
)
def test_rules(response: str | None, config: PatternsConfig, reason: str | None) -> None:
    assert broken_rule(config, True, row(response)) == reason


def test_answers_that_no_grader_verifies() -> None:
    assert broken_rule(EN, True, row(None, answer="The proof is complete. QED")) == "unverifiable answer"
    assert broken_rule(PatternsConfig(verifiable=False), True, row(None, answer="QED")) is None


def test_rows_that_a_function_of_the_users_grades_need_no_box_and_any_answer() -> None:
    rules = {"essays": "mine:score", "geometry": "numeric"}
    proof = row(None, answer="The proof is complete. QED", source="essays")
    essay = row("I weigh both sides.</think>Both are right.", source="essays")
    assert broken_rule(EN, True, proof, rules) is None and broken_rule(EN, True, essay, rules) is None
    assert broken_rule(EN, True, proof | {"source": "geometry"}, rules) == "unverifiable answer"
    assert broken_rule(EN, True, essay | {"source": "geometry"}, rules) == "no box"
    assert broken_rule(EN, True, essay | {"source": "other"}, rules) == "no box"


def test_without_the_think_template_a_thought_is_not_needed() -> None:
    assert broken_rule(EN, False, row("So it is \\boxed{5}.")) is None


def test_a_pattern_that_does_not_compile_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"patterns\.drop\.bad='\(' is no regular expression"):
        PatternsConfig(drop={"bad": "("})
