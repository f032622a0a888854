"""Curation grades a row as training grades its source."""

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ovr_megatron.config import ConfigError, DataConfig, RewardConfig, RewardJudgeConfig, SourceConfig
from ovr_megatron.curation.engine_process import pass_rate
from ovr_megatron.curation.prepare import prepare
from ovr_megatron.curation.settings import PatternsConfig, PrepareConfig
from ovr_megatron.rewards.rules import RuleError
from ovr_megatron.rewards.verdict import Reason, Verdict
from tests.rewards.judge_server import Server

ROWS = [
    ("near", "geometry", "100", "So</think>\\boxed{100.4}"),
    ("far", "geometry", "100", "So</think>\\boxed{150}"),
    ("close", "other", "100", "So</think>\\boxed{100.4}"),
    ("half", "essays", "whatever", "So</think>a"),
    ("even", "essays", "It is proved. QED", "So</think>ab"),
    *((f"broken{i}", "broken", "5", f"So</think>\\boxed{{5}}{i}") for i in range(2)),
]
RULES = {"geometry": "numeric", "essays": "tests.ppo.parity:even", "broken": "tests.ppo.parity:broken"}


def config(folder: Path, rules: dict[str, str]) -> PrepareConfig:
    rows = [
        {
            "messages": [{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": response}],
            "answer": answer,
            "source": source,
            "id": name,
        }
        for name, source, answer, response in ROWS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PrepareConfig(
        dir=str(folder / "out"),
        stages=["collect", "patterns", "verify"],
        allow_empty=True,
        data=DataConfig(sources=[SourceConfig(path=str(folder / "rows.jsonl"))]),
        reward=RewardConfig(rules=rules, workers=1),
    )


def kept(folder: Path) -> set[str]:
    lines = (folder / "out/verify/rows.jsonl").read_text().splitlines()
    return {row["id"] for row in map(json.loads, lines)}


BOX = 'So</think>```json\n[{{"bbox_2d": [{}, 100, 200, 200], "label": "dog"}}]\n```'
PERCEPTION = [
    ("exact", "dogs", [100, 100, 200, 200], BOX.format(100)),
    ("off", "dogs", [100, 100, 200, 200], BOX.format(180)),
    ("said", "facts", "no matter", "So</think>It is red."),
    ("unsaid", "facts", "no matter", "So</think>SCORE=1/2"),
    ("chosen", "choices", None, "So</think>It is red."),
    ("compared", "compared", "It is red.", "So</think>It is red."),
    ("unanswered", "compared", None, "So</think>It is red."),
    ("refused", "facts", "no matter", "So</think>REFUSE"),
    ("formal", "form", None, "So</think>\\boxed{5}"),
    ("plain", "form", None, "So</think>5"),
]


def test_boxes_judges_and_style_verify_as_in_training(tmp_path: Path) -> None:
    rows = []
    for name, source, answer, response in PERCEPTION:
        messages = [{"role": "user", "content": f"{name}?"}, {"role": "assistant", "content": response}]
        fields = {} if answer is None else {"answer": answer}
        if source == "choices":
            fields["options"] = ["red", "green"]
        rows.append({"messages": messages, "source": source, "id": name, "metadata": {"facts": ["red"]}, **fields})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with closing(Server()) as server:
        judge = RewardJudgeConfig(base_url=server.url, model="m", attempts=1)
        judges = {"seen": judge, "right": replace(judge, template="answer")}
        rules = {
            "dogs": "box:0.5",
            "facts": "judge:seen",
            "choices": "judge:seen",
            "compared": "judge:right",
            "form": "format",
        }
        settings = PrepareConfig(
            dir=str(tmp_path / "out"),
            stages=["collect", "patterns", "verify"],
            data=DataConfig(sources=[SourceConfig(path=str(tmp_path / "rows.jsonl"))]),
            patterns=PatternsConfig(need_box=False),
            reward=RewardConfig(rules=rules, judges=judges, workers=1),
        )
        prepare(settings)
        assert kept(tmp_path) == {"exact", "said", "chosen", "compared", "unanswered", "formal"}
        report = json.loads((tmp_path / "out/verify/report.json").read_text())
        assert report["dropped"] == {
            "less than 1: score": 2,
            "less than 1: judge": 1,
            "not graded: no verdict of the judge": 1,
        }
        # A row without the answer that its judge compares with is not graded, and passes by default.
        assert report["judges"]["requests"] == 5 and report["judges"]["refused"] == 1
        # Another threshold grades all rows again, and asks only what was refused.
        prepare(replace(settings, reward=replace(settings.reward, rules=rules | {"dogs": "box:0.9"})))
        report = json.loads((tmp_path / "out/verify/report.json").read_text())
        assert (report["judges"]["requests"], report["judges"]["journal"]) == (1, 4)
        assert len(server.report()["asked"]) == 6


def test_scaled_coordinates_need_the_model(tmp_path: Path) -> None:
    settings = config(tmp_path, {"geometry": "box:original"})
    with pytest.raises(ConfigError, match="scales coordinates to the image of the model: give model=FOLDER"):
        prepare(replace(settings, stages=["collect", "verify"]))


def test_a_row_is_graded_by_the_rule_of_its_source(tmp_path: Path) -> None:
    prepare(config(tmp_path, RULES))
    assert kept(tmp_path) == {"near", "even"}
    report = json.loads((tmp_path / "out/verify/report.json").read_text())
    assert report["dropped"] == {
        "not graded: own rule raised an error": 2,
        "wrong: different": 2,
        "less than 1: own rule": 1,
    }
    assert report["examples"]["less than 1: own rule"][0]["reward"] == 0.0
    rewards = report["measures"]["reward by a function"]
    assert (min(rewards.values()), max(rewards.values())) == (0.0, 1.0)
    assert "no_such_name" in report["examples"]["not graded: own rule raised an error"][0]["error"]
    with pytest.raises(RuleError, match="rule for 'geometri', which is the source of no row; there are broken, essays"):
        prepare(config(tmp_path, RULES | {"geometri": "numeric"}))
    with pytest.raises(RuleError, match="rule='maths' is not known"):
        prepare(config(tmp_path, {"geometry": "maths"}))


def test_the_pass_rate_of_what_could_be_graded() -> None:
    right, wrong = Verdict(Reason.USER_RULE, None, 1.0), Verdict(Reason.USER_RULE, None, 0.0)
    failed: dict[str, Any] = {"error": "own rule raised an error: KeyError"}
    raised = Verdict(Reason.RAISED, "KeyError")
    assert pass_rate([right, wrong, raised, raised], "mine:rule") == {"right": 1, "samples": 2}
    assert pass_rate([raised, raised], "mine:rule") == failed
    assert pass_rate([Verdict(Reason.TEXT), Verdict(Reason.TIMEOUT)], "auto") == {"right": 1, "samples": 2}
