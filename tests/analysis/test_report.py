"""The page is parsed as a browser would: what it shows, what it loads, what it runs."""

import base64
import io
import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ovr_megatron.analysis.experiment import ExperimentError, read_experiment
from ovr_megatron.analysis.report import duration, render, write_report
from ovr_megatron.analysis.samples import pick_moments, pick_rollouts, read_picture
from ovr_megatron.cli import report as command
from ovr_megatron.evaluation.judge_settings import JudgeConfig
from ovr_megatron.evaluation.judging import judge_behaviours
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.runtime.preflight import commit
from ovr_megatron.runtime.starts import LaunchArgs, record_start

VOID = {"meta", "img", "source", "input"}
SCRIPTS = 2  # ours: the index of the responses, and what shows them
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></pre><a href='https://example.com'>&amp;"


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += [(name, key, value) for key, value in attributes]
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self):
        return "\n".join(data for name, data in self.texts if name not in ("style", "script"))


@pytest.fixture(scope="module")
def finished_page(finished_dir):
    return write_report(read_experiment(finished_dir)).read_text()


@pytest.fixture
def rollouts(experiment_dir):
    """Rewrites the last iteration's rollouts; nothing is left to draw, which takes most of the time."""
    for part in ("base", "cold_start", "rl/metrics", "eval"):
        shutil.rmtree(experiment_dir / part)

    def write(*changes):
        path = experiment_dir / "rl" / "rollouts" / "000059.jsonl"
        row = json.loads(path.read_text().splitlines()[0])
        path.write_text("".join(json.dumps(row | change) + "\n" for change in changes))

    return write


def test_page_is_whole_and_loads_nothing(finished_page):
    page, text = Page(finished_page), finished_page
    assert page.tags.count("script") == SCRIPTS and "link" not in page.tags and "iframe" not in page.tags
    loaded = [value for _, key, value in page.attributes if key in ("src", "srcset", "href", "data", "action")]
    assert loaded and all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    assert len(text) < 5_000_000
    for value in loaded:
        with PIL.Image.open(io.BytesIO(base64.b64decode(value.partition(",")[2]))) as image:
            image.verify()


def test_page_tells_the_story(finished_page):
    text = Page(finished_page).text
    assert "On 500 held-out visual puzzles RL ends 24.0 points above the cold start." in text
    for told in ("88.2 %", "2.0e-05", "14 min", "5.1 GB", "Early: iteration 0", "Late: iteration 59", "37.5 %"):
        assert told in text
    assert "iterations: 60" in text  # settings
    assert "Not complete yet" not in text


def test_every_look_of_a_figure_is_there(finished_page):
    page = Page(finished_page)
    media = [value for name, key, value in page.attributes if name == "source" and key == "media"]
    assert page.tags.count("picture") == 6
    assert media.count("(prefers-color-scheme: dark)") == 6
    assert media.count("(max-width: 640px)") == 6
    alternatives = [value for name, key, value in page.attributes if name == "img" and key == "alt"]
    assert len(alternatives) == page.tags.count("img") and all(alternatives)


def test_model_output_is_text_and_nothing_else(experiment_dir, rollouts):
    plain = Page(render(read_experiment(experiment_dir)))
    fields = ("prompt", "response", "source", "answer")
    rollouts({field: f"{field}: {ATTACK}" for field in fields})
    page = Page(render(read_experiment(experiment_dir)))
    for field in fields:
        assert f"{field}: {ATTACK}" in page.text
    assert page.tags.count("script") == SCRIPTS and "a" not in page.tags
    assert {key for _, key, _ in page.attributes} == {key for _, key, _ in plain.attributes}


def test_a_set_none_of_whose_prompts_was_answered_has_a_score_without_tokens(experiment_dir):
    path = experiment_dir / "eval/rl/visual.json"
    result = json.loads(path.read_text())
    result["greedy"] |= {"accuracy": 0.0, "low": 0.0, "correct": 0, "tokens": None, "stopped": None}
    path.write_text(json.dumps(result))
    assert "None tokens" not in render(read_experiment(experiment_dir))


def test_an_attack_in_names_and_settings_is_text_too(experiment_dir):
    shutil.rmtree(experiment_dir / "rl" / "metrics")
    (experiment_dir / "rl" / "config.yaml").write_text(f"iterations: 60\nnote: |\n  {ATTACK}\n")
    score = json.loads((experiment_dir / "eval" / "rl" / "visual.json").read_text())
    score["sources"] = {ATTACK: score["sources"]["visual"], "other": score["sources"]["visual"]}
    (experiment_dir / "eval" / "rl" / "<b>.json").write_text(json.dumps(score))
    page = Page(render(read_experiment(experiment_dir)))
    assert ATTACK in page.text
    assert "<b>" in page.text
    assert page.tags.count("script") == SCRIPTS and "a" not in page.tags and page.tags.count("b") == 8


@pytest.mark.parametrize("image", ["../../secret.png", "/etc/hostname", "rollouts/nothing.png", "config.yaml"])
def test_images_that_cannot_be_shown_are_said_to_be_missing(experiment_dir, rollouts, image):
    PIL.Image.new("RGB", (9, 9)).save(experiment_dir.parent / "secret.png")
    rollouts({"image": image})
    assert f"The image {image} is missing." in Page(render(read_experiment(experiment_dir))).text


def test_long_responses_keep_both_ends(experiment_dir, rollouts):
    rollouts({"response": "start" + "x" * 50_000 + "end"})
    text = Page(render(read_experiment(experiment_dir))).text
    assert "44,008 characters left out" in text
    assert "startxxx" in text and "xxxend" in text


def test_large_images_are_made_smaller(tmp_path):
    PIL.Image.new("RGB", (2000, 500)).save(tmp_path / "large.png")
    found = read_picture(tmp_path, "large.png")
    assert found is not None and found.width == 512
    with PIL.Image.open(io.BytesIO(found.png)) as image:
        assert image.size == (512, 128)


def test_tokens_are_shaded_by_advantage_and_unlikely_ones_marked(experiment_dir, rollouts, tmp_path):
    run = experiment_dir / "rl"
    make_tiny_model(tmp_path / "model")
    (run / "companions").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "model/tokenizer.json", run / "companions")
    text = "So <b>5 €</b>"
    ids = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json")).encode(text).ids
    rollouts({"number": 3, "sample": 1}, {"number": 4, "sample": 1})
    folder = run / "rollouts/000059"
    folder.mkdir()
    numbers = {
        "index": np.array([[i, 1, len(ids)] for i in (2, 3, 4)]),
        "tokens": np.array([0] * len(ids) + 2 * ids, np.int32),
        "logprobs": np.log(np.tile(np.where(np.arange(len(ids)) == 1, 0.03, 0.5), 3)).astype(np.float32),
        "advantages": np.tile(np.linspace(-1, 1, len(ids)), 3),
    }
    save_file(numbers, folder / "0.safetensors")
    (folder / "1.safetensors").write_bytes(b"cut off")
    *_, late = pick_moments(run)
    assert all("".join(token.text for token in told) == text for told in late.tokens)
    told = late.tokens[0]
    assert [round(math.exp(token.logprob), 2) for token in told][:2] == [0.5, 0.03]
    assert len(told) == len(ids) - 2, "the euro's three bytes are one piece"
    assert told[0].advantage == -1 and told[-1].advantage == 1
    page = render(read_experiment(experiment_dir))
    assert 'class="down3" title="advantage -1.000, probability 0.500"' in page
    assert 'class="unlikely' in page and "&lt;" in page and Page(page)


def test_the_papers_scores_stand_beside_ours(experiment_dir):
    shutil.rmtree(experiment_dir / "rl/rollouts")
    assert "Beside the paper" not in Page(render(read_experiment(experiment_dir))).text
    shutil.copy(experiment_dir / "eval/rl/text.json", experiment_dir / "eval/rl/math500.json")
    page = Page(render(read_experiment(experiment_dir)))
    told = page.text.split("Beside the paper")[1].split("Time and throughput")[0].split("\n")
    row = told[told.index("MATH500") :]
    assert row[1:3] == ["\N{EN DASH}", "\N{EN DASH}"] and row[3] == "93.8 %" and "95.3 %" in row
    row = told[told.index("CharXiv, descriptive") :]
    assert row[1:6] == ["\N{EN DASH}"] * 4 + ["73.6 %"]


def test_behaviours_are_drawn_and_stand_beside_the_papers_rates(experiment_dir, rollouts, tmp_path):
    files = {}
    for name, share in (("base", 1), ("cold_start", 3), ("rl", 5)):
        texts = ["So it is 4."] * (6 - share) + ["Wait, that is wrong. Let me look at the image again. Now 5."] * share
        rows = [{"id": str(i), "sample": None, "question": "Q?", "response": text} for i, text in enumerate(texts)]
        for row in rows:
            row |= {"correct": row["response"].endswith("5."), "reason": "same text"}
        files[name] = tmp_path / f"{name}.responses.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge_behaviours(files, [JudgeConfig()], experiment_dir / "behaviours", 0, 0, False)
    page = Page(render(read_experiment(experiment_dir)))
    assert "Cognitive behaviours" in page.text and "2.5, 8.2, 17.3 %" in page.text
    assert "6 traces of each model, judged by wording, an approximation." in page.text
    assert "Backtracking to visual reflection" in page.text
    cells = page.text.split("Backtracking: with")[1].split("\n")
    assert "100.0 %" in cells and "0.0 %" in page.text.split("Backtracking: without")[1].split("\n")
    assert "Verification: with" not in page.text, "no trace has it"
    assert any("shows" in value or "show each behaviour" in value for _, key, value in page.attributes if key == "alt")
    assert (experiment_dir / "behaviours/counts.jsonl").read_text().count("\n") == 18


def test_where_no_behaviour_was_counted_one_sentence_says_so(experiment_dir, rollouts, tmp_path):
    path = tmp_path / "rl.responses.jsonl"
    path.write_text(3 * (json.dumps({"id": "0", "sample": None, "question": "Q?", "response": "So it is 4."}) + "\n"))
    judge_behaviours({"rl": path}, [JudgeConfig()], experiment_dir / "behaviours", 0, 0, False)
    page = Page(render(read_experiment(experiment_dir)))
    assert "Nothing was counted: none of the 3 traces of each model, judged by wording" in page.text
    assert "Transfer rate" not in page.text
    assert not any("show each behaviour" in value for _, key, value in page.attributes if key == "alt")


def test_the_page_names_what_started_each_run(experiment_dir, rollouts):
    record_start(experiment_dir / "rl", LaunchArgs("tiny_rl", ["run.seed=1"]), 2)
    record_start(experiment_dir / "rl", LaunchArgs("tiny_rl", ["run.seed=2", "iterations=60"]), 2)
    page = Page(render(read_experiment(experiment_dir)))
    assert "tiny_rl run.seed=2 iterations=60" in page.text and "tiny_rl run.seed=1" in page.text
    assert commit() in page.text and f"torch {torch.__version__}" in page.text and "2 x " in page.text
    assert ("a", "href", "rl/config.yaml") in page.attributes


def test_runs_are_found_under_any_name(experiment_dir):
    (experiment_dir / "cold_start").rename(experiment_dir / "cold")
    (experiment_dir / "cold/config.yaml").write_text("steps: 80\npacks_per_step: 2\n")
    (experiment_dir / "rl").rename(experiment_dir / "second")
    experiment = read_experiment(experiment_dir)
    assert [(name, stage.dir.name) for name, stage in experiment.stages.items()] == [
        ("base", "base"),
        ("cold_start", "cold"),
        ("rl", "second"),
    ]
    assert experiment.stages["rl"].done == 60


def test_samples_show_every_source_right_and_wrong_with_images(finished_dir):
    found = pick_moments(finished_dir / "rl")
    assert [(moment.name, moment.iteration) for moment in found] == [("Early", 0), ("Middle", 30), ("Late", 59)]
    for moment in found:
        kinds = [(r["source"], r["reward"], bool(r["image"])) for r in moment.rollouts]
        assert sorted(kinds) == [("text", 0, False), ("text", 1, False), ("visual", 0, True), ("visual", 1, True)]
        assert len({(r["prompt"], r["image"]) for r in moment.rollouts if r["image"]}) == 2


def test_prompts_whose_image_was_not_kept_are_not_shown():
    images = [None, None, "a.png", None]
    rollouts = [{"prompt": str(i), "image": image, "reward": 1.0, "source": "v"} for i, image in enumerate(images)]
    assert [rollout["prompt"] for rollout in pick_rollouts(rollouts)] == ["2"]
    assert pick_rollouts([]) == []


def test_a_run_that_is_going_is_reported_with_what_is_missing(experiment_dir, capsys):
    for part in ("base", "eval", "export", "measured", "rl"):
        shutil.rmtree(experiment_dir / part)
    command.main([str(experiment_dir)])
    page = Page((experiment_dir / "report.html").read_text())
    told = "Evaluation: nothing yet of Base, Cold start, RL, Average."
    assert told in page.text
    assert f"missing: {told}" in capsys.readouterr().out
    assert json.loads((experiment_dir / "summary.json").read_text())["accuracy"]["rl"] is None


def test_the_report_of_a_single_run_speaks_of_this_run_alone(experiment_dir, capsys):
    run = experiment_dir / "cold_start"
    with (run / "metrics/train.jsonl").open("a") as file:
        for step, loss in ((39, 0.5), (79, 0.625)):
            file.write(json.dumps({"step": step, "validation/loss": loss}) + "\n")
    command.main([str(run)])
    page = Page((run / "report.html").read_text())
    assert "that of validation to 0.625 (lowest 0.500)." in page.text
    assert "visual puzzles" not in page.text and "Not complete yet" not in page.text
    assert "missing:" not in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["loss"]["validation"] == 0.625 and summary["loss"]["lowest_validation"] == 0.5


def test_a_run_that_has_just_begun_is_reported(tmp_path):
    (tmp_path / "base").mkdir()
    page = Page(render(read_experiment(tmp_path)))
    assert "Nothing to compare yet." in page.text
    assert "Base model: no metrics yet." in page.text


def test_a_page_follows_a_run_that_goes_on(experiment_dir, capsys, monkeypatch):
    """First there is no run, then one whose files are being written, then more of it; Ctrl-C ends."""
    run, metrics = experiment_dir.with_name("later"), "rl/metrics/train.jsonl"
    moments = iter([lambda: shutil.copytree(experiment_dir, run), lambda: lose_half(run / metrics), None])
    pages = []

    def sleep(seconds):
        assert seconds == 7
        pages.append((run / "report.html").read_text() if run.exists() else "")
        happen = next(moments)
        if happen is None:
            raise KeyboardInterrupt
        happen()

    monkeypatch.setattr(command.time, "sleep", sleep)
    command.main([str(run), "--every", "7"])
    assert "not now: " in capsys.readouterr().out.splitlines()[0]
    assert pages[0] == "" and all('http-equiv="refresh" content="7"' in page for page in pages[1:])
    assert pages[1] != pages[2] and sorted(path.name for path in run.glob(".*")) == []


def lose_half(path):
    """What a reader sees of a file while its last line is being written."""
    text = path.read_text()
    path.write_text(text[: len(text) // 2])


def test_command_refuses_a_folder_without_a_run(tmp_path):
    with pytest.raises(ExperimentError, match="neither a run folder"):
        command.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("seconds", "told"), [(None, "\N{EN DASH}"), (45.4, "45 s"), (840.5, "14 min"), (7500, "2 h 5 min")]
)
def test_durations_are_told_as_people_do(seconds, told):
    assert duration(seconds) == told
