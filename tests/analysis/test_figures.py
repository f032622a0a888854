import csv
import io
import json
import shutil

import PIL.Image
import pytest
from matplotlib.colors import to_hex

from ovr_megatron.analysis.experiment import read_experiment
from ovr_megatron.analysis.figures import (
    draw_accuracy,
    draw_dynamics,
    draw_evaluations,
    draw_figures,
    draw_loss,
    draw_sources,
    list_periodic_evaluations,
    list_sources,
    list_switches,
    write_figures,
)
from ovr_megatron.analysis.numbers import write_numbers
from ovr_megatron.analysis.themes import DARK, LIGHT, NARROW, WIDE

NAMES = ["base_loss", "cold_start_loss", "rl_dynamics", "rl_sources", "rl_health", "accuracy"]


@pytest.fixture
def experiment(finished_dir):
    return read_experiment(finished_dir)


def test_every_figure_is_written_as_png_and_pdf_and_its_numbers_as_csv(experiment_dir):
    experiment = read_experiment(experiment_dir)
    images = [path for path in write_figures(experiment) if path.suffix == ".png"]
    assert [path.stem for path in images] == NAMES
    for path in images:
        with PIL.Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width > 1000
            assert len(image.convert("RGB").resize((200, 100)).getcolors(20000)) > 20
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
    tables = {path.stem: list(csv.DictReader(path.open())) for path in write_numbers(experiment)}
    assert {name: len(rows) for name, rows in tables.items()} == {"base": 300, "cold_start": 80, "rl": 60, "scores": 24}
    assert float(tables["rl"][41]["rollout/mismatch_max"]) == 2e-5
    row = next(r for r in tables["scores"] if (r["model"], r["set"], r["source"]) == ("rl", "visual", ""))
    assert (row["response"], float(row["accuracy"]), int(row["correct"])) == ("greedy", 441 / 500, 441)


def test_reward_and_length_by_source(experiment):
    stage = experiment.stages["rl"]
    assert list_sources(stage) == ["text", "visual"]
    reward, length = draw_sources(stage, LIGHT).axes
    assert [line.get_label() for line in reward.get_lines()] == ["text", "visual"]
    assert [len(line.get_ydata()) for line in length.get_lines()] == [60, 60]


def test_the_first_values_of_the_critic_are_told(experiment):
    stage = experiment.stages["rl"]
    caption = next(chart.caption for chart in draw_figures(experiment, LIGHT) if chart.name == "rl_health")
    assert caption.endswith(
        "The critic's first values had the mean 0.012 (returns 0.45) and the standard deviation 0.09, and explained "
        "0.00 of the returns' variance."
    )
    for line in stage.metrics:
        del line["critic/value_mean"]  # a run of an earlier version
    caption = next(chart.caption for chart in draw_figures(experiment, LIGHT) if chart.name == "rl_health")
    assert "first values" not in caption


def test_looks_differ_in_colour_and_width(experiment_dir):
    for part in ("base", "cold_start", "rl"):
        shutil.rmtree(experiment_dir / part)
    experiment = read_experiment(experiment_dir)
    light, dark, narrow = (draw_figures(experiment, *look)[-1].png for look in ((LIGHT,), (DARK,), (LIGHT, NARROW)))
    images = [PIL.Image.open(io.BytesIO(png)).convert("RGB") for png in (light, dark, narrow)]
    assert [image.getpixel((2, 2)) for image in images] == [(255, 255, 255), (27, 30, 36), (255, 255, 255)]
    assert images[2].width / images[0].width == pytest.approx(NARROW / WIDE, abs=0.01)


def test_accuracy_while_training_is_drawn_where_there_is_any(experiment_dir):
    path = experiment_dir / "rl" / "metrics" / "train.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines[9::10]:
        line["evaluation/visual"], line["evaluation/visual/pass@2"] = line["step"] / 100, 1.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment = read_experiment(experiment_dir)
    assert "evaluation" in [chart.name for chart in draw_figures(experiment, LIGHT)]
    ((stage, keys),) = list_periodic_evaluations(experiment)
    assert (stage.name, keys) == ("rl", ["evaluation/visual"])
    (line,) = draw_evaluations([(stage, keys)], LIGHT).axes[0].lines
    assert list(line.get_xdata()) == [10, 20, 30, 40, 50, 60]
    assert list(line.get_ydata()) == [0.09, 0.19, 0.29, 0.39, 0.49, 0.59]


def test_loss_is_drawn_by_step_as_logged(experiment):
    stage = experiment.stages["cold_start"]
    axes = draw_loss(stage, LIGHT).axes[0]
    faint = axes.lines[0]
    assert list(faint.get_xdata()) == list(range(80))
    assert list(faint.get_ydata()) == [line["loss/train"] for line in stage.metrics]
    assert axes.get_ylim()[0] == 0


def test_curriculum_switches_are_vertical_lines_in_both_panels(experiment):
    assert list_switches(experiment.stages["rl"]) == [(30, 96, 128)]
    figure = draw_dynamics(experiment.stages["rl"], LIGHT)
    assert len(figure.axes) == 2
    for axes in figure.axes:
        marks = [line for line in axes.lines if line.get_gid() == "switch"]
        assert [list(line.get_xdata()) for line in marks] == [[30, 30]]
    assert "96 to 128 tokens" in [text.get_text() for text in figure.axes[0].texts]


def test_bars_are_the_accuracies_with_their_intervals(experiment):
    axes = draw_accuracy(experiment, LIGHT).axes[0]
    bars = {container.get_label(): container for container in axes.containers if hasattr(container, "patches")}
    assert list(bars) == ["Base", "Cold start", "RL", "Average"]
    assert [bar.get_height() for bar in bars["RL"].patches] == [0.882, 0.938, 0.754]
    (intervals,) = bars["RL"].errorbar.lines[2]
    assert [tuple(segment[:, 1].round(3)) for segment in intervals.get_segments()] == [
        (0.852, 0.912),
        (0.908, 0.968),
        (0.724, 0.784),
    ]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["Visual puzzles", "Text puzzles", "Captions"]


def test_a_model_that_was_not_evaluated_is_marked(experiment_dir):
    shutil.rmtree(experiment_dir / "eval" / "average")
    figure = draw_accuracy(read_experiment(experiment_dir), LIGHT)
    assert [text.get_text() for text in figure.axes[0].texts].count("not run") == 3
    assert [to_hex(patch.get_facecolor()) for patch in figure.legends[0].get_patches()] == list(LIGHT.models)


def test_a_run_that_is_going_gives_the_figures_it_can(experiment_dir):
    for part in ("eval", "rl"):
        shutil.rmtree(experiment_dir / part)
    metrics = experiment_dir / "cold_start" / "metrics" / "train.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    assert [chart.name for chart in draw_figures(read_experiment(experiment_dir), LIGHT)] == [
        "base_loss",
        "cold_start_loss",
    ]


def test_a_validation_loss_is_drawn_beside_the_loss(experiment_dir):
    metrics = experiment_dir / "cold_start" / "metrics" / "train.jsonl"
    with metrics.open("a") as file:
        for step, loss in ((9, 2.5), (19, 1.25)):
            file.write(json.dumps({"step": step, "validation/loss": loss}) + "\n")
    figure = draw_loss(read_experiment(experiment_dir).stages["cold_start"], LIGHT)
    [line] = [line for line in figure.axes[0].get_lines() if line.get_label() == "validation"]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([9, 19], [2.5, 1.25])
