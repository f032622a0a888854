"""Problems that two checkpoints solve, both, one or neither: the counts of a written example, and what is refused."""

import json
from pathlib import Path

import pytest

from ovr_megatron.config import ConfigError
from ovr_megatron.evaluation.scoring import GradedResponse
from ovr_megatron.evaluation.statistics import wilson
from ovr_megatron.evaluation.support import compare
from ovr_megatron.evaluation.support_command import main


def write(path: Path, verdicts: dict[str, str], greedy: bool = True) -> Path:
    """Write an evaluation: for each problem, named SOURCE/ID, the verdicts of its samples, `+` or `-`."""
    lines = []
    for index, (name, signs) in enumerate(verdicts.items()):
        samples = [None] if greedy else []
        for sample in [*samples, *range(len(signs))]:
            # A right greedy response is no sample and must not count.
            correct = True if sample is None else signs[sample] == "+"
            response = GradedResponse(
                index, sample, name, name.split("/")[0], f"Question {name}?", "4", (), "boxed", "4", correct=correct
            )
            lines.append(json.dumps(response.to_json()) + "\n")
    path.write_text("".join(lines))
    return path


BEFORE = {"text/a": "+---", "text/b": "----", "image/c": "---+", "image/d": "----", "image/e": "++++"}
AFTER = {"text/a": "-+--", "text/b": "--+-", "image/c": "----", "image/d": "----", "image/e": "+---"}


def test_a_problem_is_solved_by_both_by_one_or_by_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "before.jsonl", BEFORE)
    after = write(tmp_path / "after.jsonl", AFTER)
    main([str(before), str(after), "--out", str(tmp_path / "support.json")])
    written = json.loads((tmp_path / "support.json").read_text())
    assert written["all"] == {
        "solved_by_both": ["text/a", "image/e"],
        "solved_after_only": ["text/b"],
        "solved_before_only": ["image/c"],
        "solved_by_neither": ["image/d"],
    }
    assert written["sources"]["text"] == {
        "solved_by_both": ["text/a"],
        "solved_after_only": ["text/b"],
        "solved_before_only": [],
        "solved_by_neither": [],
    }
    total = compare(before, after)[""]
    assert total.retention == wilson(2, 3) and total.discovery == wilson(1, 3)
    table = capsys.readouterr().out.splitlines()
    assert table[1].split()[:6] == ["all", "problems", "2", "1", "1", "1"]


def test_only_the_first_samples_count(tmp_path: Path) -> None:
    before = write(tmp_path / "before.jsonl", BEFORE)
    after = write(tmp_path / "after.jsonl", AFTER)
    first = compare(before, after, samples=1)[""]
    assert (
        first.solved_by_both == ("image/e",)
        and first.solved_before_only == ("text/a",)
        and first.solved_after_only == ()
    )
    assert first.solved_by_neither == ("text/b", "image/c", "image/d")


def test_a_share_of_nothing_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "none.jsonl", {"text/a": "--"})
    support = compare(path, path)[""]
    assert support.retention is None and support.discovery is None


@pytest.mark.parametrize(
    ("after", "samples", "message"),
    [
        (AFTER | {"text/a": "-+-+-"}, 0, "problem text/a has 5 samples, and .*give --samples 4"),
        (AFTER, 5, "some problem has 4 samples, and 5 are compared; evaluate with --samples 5 or more"),
        ({**AFTER, "text/f": "++++"}, 0, "has other problems than .*evaluate both on the same set"),
        ({name: "" for name in AFTER}, 0, "some problem has 0 samples, and 1 are compared"),
    ],
)
def test_evaluations_that_cannot_be_compared(tmp_path: Path, after: dict[str, str], samples: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compare(write(tmp_path / "before.jsonl", BEFORE), write(tmp_path / "after.jsonl", after), samples)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"after.jsonl: cannot be read .*; evaluate the model first"):
        compare(write(tmp_path / "before.jsonl", BEFORE), tmp_path / "after.jsonl")
