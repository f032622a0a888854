"""On-policy distillation: runs with a teacher of another size, its log-probabilities, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ovr_megatron.config import AlgorithmConfig, ConfigError, DataConfig, SourceConfig, build
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import RowError
from ovr_megatron.data.stream import open_stream
from ovr_megatron.data_checks import checks_of
from ovr_megatron.families import ModelShape
from ovr_megatron.launch import compose
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.rl.sample_readers import check_reads_samples
from tests.ppo.reference import Iteration
from tests.ppo.test_loops import curve, weights


@pytest.mark.both_cores
@pytest.mark.parametrize(("name", "number"), [("taught", 0), ("taught", 2), ("taught_mixed", 0)])
def test_the_teachers_log_probabilities_are_those_of_transformers(runs: Path, name: str, number: int) -> None:
    """Of every token, of prompts with an image, too; the metric is their mean distance from the policy's."""
    iteration = Iteration(runs / name, number)
    with torch.no_grad():
        taught = iteration.scores(iteration.load(runs / "teacher"), iteration.answers)
        own = iteration.scores(iteration.load(iteration.policy_folder), iteration.answers)
    assert any(len(iteration.samples[answer.prompt].patches) > 0 for answer in iteration.answers)
    distances = []
    for answer, (theirs, _), (policy, _) in zip(iteration.answers, taught, own, strict=True):
        np.testing.assert_allclose(answer.saved["teacher"], theirs.numpy(), atol=1e-4)
        distances.append((policy - theirs).numpy())
    logged = curve(runs / name)[number]["policy/teacher_kl"]
    # Of two optimizer steps each has half of the responses, and so not half of the tokens.
    within = 1e-4 if name == "taught" else 0.05
    assert logged == pytest.approx(np.concatenate(distances).mean(), rel=within)
    assert logged > 0.01, "the two models are the same"


@pytest.mark.both_cores
def test_a_teacher_alone_takes_nothing_from_the_rewards(runs: Path) -> None:
    for number in (0, 1, 2):
        answers = Iteration(runs / "taught", number).answers
        assert len({answer.line["reward"] for answer in answers}) == 2
        assert all(not answer.saved["advantages"].any() for answer in answers)
    assert all(line["policy/grad_norm"] > 0 for line in curve(runs / "taught"))
    mixed = Iteration(runs / "taught_mixed", 0).answers
    assert any(answer.saved["advantages"].any() for answer in mixed)


@pytest.mark.both_cores
def test_the_policys_own_weights_teach_nothing(runs: Path) -> None:
    for answer in Iteration(runs / "taught_by_itself", 0).answers:
        np.testing.assert_allclose(answer.saved["teacher"], answer.saved["logprobs"], atol=2e-5)
    (line,) = curve(runs / "taught_by_itself")
    assert abs(line["policy/teacher_kl"]) < 1e-6
    assert line["policy/grad_norm"] < 1e-4 * curve(runs / "taught")[0]["policy/grad_norm"]


@pytest.mark.both_cores
def test_a_resumed_run_is_the_run_itself(runs: Path) -> None:
    one, two = weights(runs / "taught"), weights(runs / "taught_resumed")
    assert [key for key in one if not np.array_equal(one[key], two[key])] == []
    assert curve(runs / "taught_resumed") == curve(runs / "taught")[2:]


@pytest.mark.both_cores
def test_layouts_of_policy_and_teacher_change_nothing(runs: Path) -> None:
    replays = json.loads((runs / "taught.json").read_text())
    assert len(replays) == 6
    for layout, lines in replays.items():
        assert {line["name"] for line in lines} >= {"teacher", "policy/teacher_kl", "policy/grad_norm"}
        for line in lines:
            bound = 0.0 if layout == "same" else 1e-4
            assert line["difference"] <= bound or abs(line["now"] - line["saved"]) < 1e-6, (layout, line)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("student") / "model", seed=5)


def other_tokenizer(folder: Path) -> None:
    make_tiny_model(folder, seed=6, corpus=["a corpus of other words entirely", "zebra quartz"])


def other_pixels(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))


def other_template(folder: Path) -> None:
    for path in folder.glob("chat_template*"):
        path.write_text(path.read_text().replace("You are a helpful assistant.", "You are a helpful teacher."))


REFUSED = {
    "vocabularies": other_tokenizer,
    "pixels of a prompt with an image": other_pixels,
    "token ids of a prompt with an image": other_template,
}


@pytest.mark.parametrize("difference", REFUSED)
def test_a_teacher_that_reads_prompts_in_another_way_is_refused(student: Path, tmp_path: Path, difference: str) -> None:
    change: Callable[[Path], None] = REFUSED[difference]
    # A limit that the fixed prompt would pass: it is not the run's.
    processor = Processor(student, DataConfig(template="model", max_prompt_tokens=8, max_images=1))
    teacher = make_tiny_model(tmp_path / "teacher", seed=6)

    def check(longest: int = 128, **sizes: object) -> None:
        shape = replace(ModelShape.from_hf(teacher), **sizes)
        check_reads_samples(f"algorithm.teacher={teacher}", teacher, shape, processor, longest, same_template=True)

    check()
    with pytest.raises(ConfigError, match="is a model of family another"):
        check(family="another")
    with pytest.raises(ConfigError, match="with the longest prompt and response comes to 1000000 tokens"):
        check(longest=1_000_000)
    change(teacher)
    with pytest.raises(ConfigError, match=f"have different {difference}") as error:
        check()
    assert str(teacher) in str(error.value) and str(student) in str(error.value)


def test_chats_without_answers_are_prompts_of_a_teacher_alone(student: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "1 + 2?"}, {"role": "assistant", "content": "It is three, I think."}]
    rows.write_text(json.dumps({"messages": messages}) + "\n")
    data = DataConfig(sources=[SourceConfig(path=str(rows))])
    processor = Processor(student, data)
    (row,) = PromptStream(open_stream(data, 1), processor, {}, needs_answers=False).draw(1)
    assert row.answer is None
    (sample,) = processor.encode([row], generation=True)
    assert "three" not in processor.decode(sample.tokens)
    with pytest.raises(RowError, match="answer"):
        PromptStream(open_stream(data, 1), processor, {}).draw(1)
    counts = []
    for settings in ([], ["algorithm.estimator=none", "algorithm.teacher=7B"]):
        config = compose("grpo_3b_1gpu", [f"data.sources=[{{path: {rows}}}]", *settings])
        counts.append(len(checks_of(config, None)))
    assert counts == [2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "none"}, "there is no teacher"),
        ({"teacher_parallel": {"tp": 2}}, "give algorithm.teacher"),
        ({"teacher": "7B", "teacher_coefficient": 0}, "teacher_coefficient"),
    ],
)
def test_settings_without_a_teacher_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(AlgorithmConfig, OmegaConf.create(settings))
