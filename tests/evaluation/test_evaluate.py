"""A tiny model through vLLM: what it answers against Transformers, what it scores against its own answers."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from ovr_megatron.config import ConfigError, DataConfig, EvaluationConfig, EvaluationSettings, SourceConfig
from ovr_megatron.data.schema import ImageSize
from ovr_megatron.errors import UserError
from ovr_megatron.evaluation.command import (
    build_parser,
    cut_off,
    data_config,
    dtype_of,
    image_budget,
    main,
    parse_sets,
    response_limit,
)
from ovr_megatron.evaluation.grading import grade, request_maker
from ovr_megatron.evaluation.problems import open_problems
from ovr_megatron.evaluation.scoring import GradedResponse
from ovr_megatron.evaluation.statistics import wilson
from ovr_megatron.families import ModelShape
from ovr_megatron.families.presets import write_config
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.rewards.pool import GraderPool

ROOT = Path(__file__).resolve().parents[2]
PUZZLES = "puzzle:digits?form=image&task=sum&split=heldout&count=8&answered=0"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("evaluate") / "model", std=0.1, perturb=True)


@pytest.fixture(scope="module")
def out(model, loaded_python):
    """The results of tests/evaluation/bench.py, one start of vLLM."""
    folder = model.parent / "out"
    script = ROOT / "tests" / "evaluation" / "bench.py"
    command = [loaded_python, str(script), str(model), str(folder)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_responses_are_those_of_transformers(model, out):
    processor = AutoProcessor.from_pretrained(model)
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    banned = json.loads((out / "banned.json").read_text())
    responses = lines(out / "first.responses.jsonl")
    assert len(responses) == 8
    for found, row in zip(responses, open_problems(SourceConfig(path=PUZZLES, name="first")).rows, strict=False):
        image, text = row.prompt[0].parts
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text.text}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=[prompt], images=[image.image], return_tensors="pt")
        tokens = reference.generate(**inputs, do_sample=False, max_new_tokens=12, suppress_tokens=banned)
        told = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found["response"] == told
        assert (found["question"], found["reference"], found["metric"]) == (text.text, row.answer, "boxed")


def test_half_of_the_references_are_the_models_own(out):
    result = json.loads((out / "known.json").read_text())
    expected = wilson(4, 9)
    assert (result["problems"], result["dropped"]) == (9, 1)
    assert result["greedy"]["correct"] == 4
    assert [result["greedy"][key] for key in ("accuracy", "low", "high")] == pytest.approx(
        [expected.value, expected.low, expected.high]
    )
    by_source = {name: part["greedy"]["accuracy"] for name, part in result["sources"].items()}
    assert by_source == {"known": 0.5, "other": 0.4}
    assert result["settings"]["max_prompt_tokens"] == 120
    assert result["settings"]["min_pixels"] == 3136


def test_every_response_is_kept_and_the_verdicts_are_the_scores(out):
    responses = lines(out / "known.responses.jsonl")
    assert [(r["index"], r["sample"]) for r in responses] == [(i, s) for i in range(9) for s in (None, 0, 1, 2, 3)]
    assert all(r["metric"] == "exact" for r in responses)
    assert [r["correct"] for r in responses if r["sample"] is None] == [i % 2 == 0 for i in range(8)] + [False]
    assert {r["reason"] for r in responses[-5:]} == {"prompt too long"}
    assert responses[-1]["response"] is None
    result = json.loads((out / "known.json").read_text())
    drawn = [r for r in responses if r["sample"] is not None]
    assert result["sampled"]["pass"]["1"]["accuracy"] == pytest.approx(sum(r["correct"] for r in drawn) / 36)
    assert list(result["sampled"]["pass"]) == ["1", "2", "4"]


def test_samples_differ_from_each_other_and_not_from_run_to_run(out):
    first = lines(out / "known.responses.jsonl")
    texts = [{r["response"] for r in first if r["index"] == i and r["sample"] is not None} for i in range(8)]
    assert all(len(different) > 1 for different in texts)
    assert lines(out / "again" / "known.responses.jsonl") == first


def test_an_interrupted_evaluation_goes_on_without_a_lost_or_doubled_response(out):
    """Of 8 problems 5 greedy responses were left: the other 3 are asked, and all samples."""
    assert json.loads((out / "asked.json").read_text()) == [8, 3 + 8]
    assert lines(out / "resumed/known.responses.jsonl") == lines(out / "known.responses.jsonl")
    assert not list((out / "resumed").glob(".known*")), "what was kept on the way is gone"


def test_responses_are_graded_by_box_or_by_text():
    def response(metric, text):
        return GradedResponse(0, None, "", "", "", "8", (), metric, text)

    asked = [
        response("boxed", "3+5, so \\boxed{8}"),
        response("boxed", "\\boxed{8} no, \\boxed{9}"),
        response("boxed", "8"),
        response("exact", " 8\n"),
        response("exact", "\\boxed{8}"),
        response("boxed", None),
    ]
    with GraderPool(1) as grader:
        graded = grade(grader, asked)
    assert [r.correct for r in graded] == [True, False, False, True, False, False]
    assert [r.reason for r in graded][2:] == ["no box", "same text", "different", ""]


def test_a_set_is_graded_by_its_rule(tmp_path):
    """The row and the size of its image come from the set; a reward below 1 is wrong."""
    Image.new("RGB", (100, 100)).save(tmp_path / "image.png")
    asked = [{"type": "image", "image": "image.png"}, {"type": "text", "text": "Where?"}]
    rows = [{"messages": [{"role": "user", "content": asked}], "answer": [10, 10, 60, 60]}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [SourceConfig(path=str(tmp_path / "rows.jsonl"), name=name) for name in ("boxes", "scaled", "other")]
    settings = EvaluationSettings(sources=sources, rules={"boxes": "box:0.5", "scaled": "box:original"}, metric="count")
    boxes, scaled, other = (open_problems(source) for source in sources)
    processor = SimpleNamespace(config=DataConfig(), image_size=lambda row: ImageSize(100, 100, 200, 200))
    responses = ["x</think>[10, 10, 60, 50]", "x</think>[20, 20, 120, 120]"]

    def graded(problems):
        metric = problems.resolve_settings(settings).metric
        problems.check_references(metric)
        reference = problems.metric_of(problems.rows[0], metric)[1]
        made = [GradedResponse(i, None, "", "", "", reference, (), metric, text) for i, text in enumerate(responses)]
        return [r.correct for r in grade(grader, made, request_maker(processor, problems))]

    with GraderPool(1) as grader:
        assert graded(boxes) == [True, False]
        assert graded(scaled) == [False, True]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: answer: it is not one whole number"):
        graded(other)
    with pytest.raises(UserError, match="have its responses judged by ovr judge afterwards"):
        boxes.check_references("judge:x")


def test_problem_sets_have_names():
    sources = ["visual=puzzle:digits?task=sum", "puzzle:digits?task=pick&split=heldout", "data/math500.json"]
    assert parse_sets(sources) == {
        "visual": "puzzle:digits?task=sum",
        "digits_task_pick_split_heldout": "puzzle:digits?task=pick&split=heldout",
        "math500": "data/math500.json",
    }
    with pytest.raises(ConfigError, match=r"two problem sets are called math500; .*OTHER=b/math500\.json"):
        parse_sets(["a/math500.json", "b/math500.json"])


def arguments(model, *more):
    return build_parser().parse_args(["--model", str(model), "--data", "x", "--out", "y", *more])


def test_the_image_budget_is_the_folders_unless_it_is_given(model, tmp_path):
    found = data_config(model, arguments(model))
    assert (found.min_pixels, found.max_pixels) == (3136, 1003520)
    found = data_config(model, arguments(model, "--max-pixels", "50176", "--max-tokens", "96"))
    assert (found.min_pixels, found.max_pixels, found.max_prompt_tokens) == (3136, 50176, 4000)

    nested = {"image_processor": {"size": {"shortest_edge": 784, "longest_edge": 12544}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert image_budget(tmp_path) == {"min_pixels": 784, "max_pixels": 12544}
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 7, "max_pixels": 8, "size": {}}')
    assert image_budget(tmp_path) == {"min_pixels": 7, "max_pixels": 8}


def test_a_response_may_be_as_long_as_the_model_allows(model, tmp_path):
    assert response_limit(model, arguments(model)) == 4096 - 1024
    assert response_limit(model, arguments(model, "--max-prompt-tokens", "96")) == 4000
    assert response_limit(model, arguments(model, "--max-tokens", "96")) == 96
    published = write_config("7B", tmp_path).parent
    assert response_limit(published, arguments(published)) == 32768
    shape = ModelShape.from_hf(model)
    assert shape.response_limit(EvaluationConfig().max_tokens, 96) == 4000, "on the way as afterwards"
    assert shape.response_limit(EvaluationConfig(max_tokens=72).max_tokens, 96) == 72


def test_the_printed_score_says_what_was_cut_off():
    result = {"greedy": {"stopped": 0.25}, "sampled": {"stopped": 0.5}, "settings": {"max_tokens": 1024}}
    assert cut_off(result) == (
        "; cut off at 1,024 tokens: 75.0 % of greedy, 50.0 % of sampled responses, raise --max-tokens"
    )
    assert cut_off(result | {"greedy": {"stopped": 1.0}, "sampled": None}) == ""


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"torch_dtype": "float16"}, "bfloat16"),
    ],
)
def test_number_format_is_the_folders(tmp_path, config, dtype):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dtype_of(tmp_path) == dtype


def test_mistakes_are_told_before_anything_starts(model, tmp_path, capsys):
    with pytest.raises(ConfigError, match="leaves no room for a prompt: the model takes 4096"):
        data_config(model, arguments(model, "--max-tokens", "4096"))
    with pytest.raises(ConfigError, match=r"--max-tokens comes to 4097 tokens, .* has 4096 positions; .*--yarn 2"):
        data_config(model, arguments(model, "--max-tokens", "96", "--max-prompt-tokens", "4001"))
    with pytest.raises(ConfigError, match=r"never ends; give a limit"):
        open_problems(SourceConfig(path="puzzle:digits?task=sum", name="endless"))
    assert open_problems(SourceConfig(path="puzzle:digits?task=sum", name="some"), limit=5).count == 5
    assert open_problems(SourceConfig(path=PUZZLES, name="few"), limit=50).count == 8
    reply = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "So \\boxed{5}."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": reply}) + "\n")
    problems = open_problems(SourceConfig(path=str(tmp_path / "rows.jsonl"), name="replies"))
    problems.check_references("exact")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: answer: is missing; .*--metric exact"):
        problems.check_references("boxed")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        main(["--model", str(tmp_path), "--data", "x", "--out", str(tmp_path)])
