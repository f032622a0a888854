"""Write one self-contained HTML page per experiment: what was trained, how it went, what the model says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TypedDict

from ovr_megatron.analysis.browser import prepare_browser
from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.analysis.figures import draw_figures
from ovr_megatron.analysis.formats import NOTHING, duration, format_number, gigabytes, percent
from ovr_megatron.analysis.moments import show_moments
from ovr_megatron.analysis.origins import read_origins
from ovr_megatron.analysis.page import Cell, PageChart, PageTable, Pieces, data_uri, render_page
from ovr_megatron.analysis.results import make_table, show_accuracy, show_behaviours
from ovr_megatron.analysis.summary import ExperimentSummary, summarise
from ovr_megatron.analysis.themes import DARK, LIGHT, NARROW, WIDE
from ovr_megatron.evaluation.scoring import EvaluationResult
from ovr_megatron.runtime.files import write_whole

# Titles of the phases of an iteration, by the metrics of their seconds.
PHASES = {
    "timing/generate": "Generate",
    "timing/value": "Value and log-probabilities",
    "timing/update": "Update",
    "timing/sync": "Weights to vLLM",
}
# Metrics of the table of stages: of throughput with what is done to the tokens, and of the last value with its format.
_THROUGHPUT = {
    "perf/tokens_per_second": "trained",
    "perf/generate_tokens_per_second": "generated",
    "perf/train_tokens_per_second": "trained",
}
_LAST_VALUES = (
    ("loss/train", "loss", "{:.4f}"),
    ("reward/mean", "mean reward", "{:.3f}"),
)


class Tile(TypedDict):
    """A number at the top of the page; ``model`` is the class that colours it."""

    name: str
    value: str
    model: str


class PhaseShares(TypedDict):
    """Where the time of an iteration goes; ``shares`` are the widths of a bar's parts."""

    title: str
    shares: list[str]
    phases: PageTable


class TimingSection(TypedDict):
    """Progress and throughput of the stages, an iteration of the RL if there was one, measured commands."""

    stages: PageTable
    iteration: PhaseShares | None
    commands: PageTable


class FoldedText(TypedDict):
    """A text behind its title."""

    title: str
    text: str


def write_report(experiment: Experiment, refresh: int = 0) -> Path:
    """Write ``report.html`` into the experiment's folder and return its path; a reader never sees half of a page."""
    return write_whole(experiment.dir / "report.html", render(experiment, refresh))


def render(experiment: Experiment, refresh: int = 0) -> str:
    """Return the page as text; it names every part that the folder does not have yet.

    Args:
        experiment: the folder's content.
        refresh: seconds after which a browser loads the page again; 0: never.
    """
    summary = summarise(experiment)
    # Two of the figures have sections of their own; the others, in their order, make up the training's.
    charts = _draw_charts(experiment)
    accuracy_chart = charts.pop("accuracy", None)
    behaviours_chart = charts.pop("behaviours", None)
    return render_page(
        title=experiment.dir.resolve().name,
        refresh=refresh,
        lead=_lead_text(summary),
        missing=experiment.missing,
        tiles=_tiles(summary, is_single_run=experiment.single_run is not None),
        accuracy=show_accuracy(experiment, accuracy_chart),
        behaviours=show_behaviours(experiment, behaviours_chart),
        charts=list(charts.values()),
        timing=_timing(experiment),
        moments=show_moments(experiment),
        browser=prepare_browser(experiment),
        origins=read_origins(experiment),
        settings=list(_settings(experiment)),
        folder=experiment.dir.resolve(),
        exported=experiment.exported,
    )


def _lead_text(summary: ExperimentSummary) -> str:
    accuracy = summary["accuracy"]
    cold_start = accuracy["cold_start"]
    rl = accuracy["rl"]
    sentences = []
    if cold_start is not None and rl is not None:
        gain = 100 * (rl - cold_start)
        direction = "above" if gain >= 0 else "below"
        sentences.append(
            f"On {accuracy['problems']} held-out visual puzzles RL ends "
            f"{abs(gain):.1f} points {direction} the cold start."
        )
    loss = summary["loss"]
    if loss["first10"] is not None and rl is None:
        sentence = f"The loss went from {loss['first10']:.3f} (first ten steps) to {loss['last10']:.3f} (last ten)"
        if loss["validation"] is not None:
            sentence += f", that of validation to {loss['validation']:.3f} (lowest {loss['lowest_validation']:.3f})"
        sentences.append(f"{sentence}.")
    first = summary["reward"]["first10"]
    last = summary["reward"]["last10"]
    if first is not None:
        means = f"from {first:.3f} (first ten iterations) to {last:.3f} (last ten)"
        sentences.append(f"The mean reward went {means}.")
    return " ".join(sentences) or "Nothing to compare yet."


def _tiles(summary: ExperimentSummary, is_single_run: bool) -> list[Tile]:
    """Return the numbers at the top of the page; of a single run those that it has."""
    tiles = []
    for model, title in MODELS.items():
        accuracy = summary["accuracy"][model]
        tiles.append(_tile(f"{title}, visual puzzles", percent(accuracy), model))
    loss = summary["loss"]
    if is_single_run:
        tiles.append(_tile("Loss, last ten steps", format_number(loss["last10"], ".3f")))
        tiles.append(_tile("Validation loss", format_number(loss["validation"], ".3f")))
    reward = summary["reward"]["last10"]
    tiles.append(_tile("Reward, last ten iterations", format_number(reward, ".3f")))
    mismatch = summary["mismatch"]["max"]
    tiles.append(_tile("Largest mismatch, log-prob", format_number(mismatch, ".1e")))
    tiles.append(_tile("Wall time", duration(summary["wall_seconds"])))
    tiles.append(_tile("Peak memory", gigabytes(summary["peak_memory_bytes"])))
    return [tile for tile in tiles if not is_single_run or tile["value"] != NOTHING]


def _tile(name: str, value: str, model: str = "") -> Tile:
    return {"name": name, "value": value, "model": model}


def _draw_charts(experiment: Experiment) -> dict[str, PageChart]:
    """Return each figure by name: its caption, and its picture for every width and theme as an address."""
    wide_light = draw_figures(experiment, LIGHT, WIDE)
    wide_dark = draw_figures(experiment, DARK, WIDE)
    narrow_light = draw_figures(experiment, LIGHT, NARROW)
    narrow_dark = draw_figures(experiment, DARK, NARROW)
    charts: dict[str, PageChart] = {}
    for looks in zip(wide_light, wide_dark, narrow_light, narrow_dark, strict=True):
        pictures = [data_uri(chart.png) for chart in looks]
        charts[looks[0].name] = {
            "caption": looks[0].caption,
            "wide_light": pictures[0],
            "wide_dark": pictures[1],
            "narrow_light": pictures[2],
            "narrow_dark": pictures[3],
        }
    return charts


def _timing(experiment: Experiment) -> TimingSection | None:
    stages = [stage for stage in experiment.stages.values() if stage.metrics]
    if not stages and not experiment.measured:
        return None
    rl = experiment.stages.get("rl")
    has_iterations = rl is not None and bool(rl.values("timing/iteration"))
    commands: list[list[Cell]] = []
    for name, command in experiment.measured.items():
        wall_time = duration(command.get("wall_seconds"))
        peak_memory = gigabytes(command.get("peak_memory_bytes"))
        commands.append([name, wall_time, peak_memory])
    return {
        "stages": make_table(["Stage", "Done", "Tokens/s", "Last value"], map(_stage_row, stages)),
        "iteration": _phases(rl) if rl and has_iterations else None,
        "commands": make_table(["", "Wall time", "Peak memory"], commands),
    }


def _stage_row(stage: Stage) -> list[Cell]:
    progress = f"{stage.done} {stage.unit}"
    if stage.total:
        progress = f"{stage.done} of {stage.total} {stage.unit}"
    throughput = _throughput(stage)
    last_values = _last_values(stage)
    return [
        stage.title,
        progress,
        throughput or NOTHING,
        last_values or NOTHING,
    ]


def _throughput(stage: Stage) -> Pieces:
    pieces: Pieces = []
    for key, verb in _THROUGHPUT.items():
        rates = stage.values(key)
        if rates:
            rate = median(rates)
            pieces += [f"{rate:,.0f}", {"small": f"{verb}, median"}]
    return pieces


def _last_values(stage: Stage) -> Pieces:
    pieces: Pieces = []
    for key, title, form in _LAST_VALUES:
        values = stage.values(key)
        if values:
            last = form.format(values[-1])
            pieces += [last, {"small": title}]
    return pieces


def _phases(stage: Stage) -> PhaseShares:
    """Return where the time of an iteration goes: means over the run, as a bar and as a table."""
    iteration = _average(stage.values("timing/iteration"))
    phases: dict[str, float] = {}
    for key, title in PHASES.items():
        if seconds_by_step := stage.values(key):
            phases[title] = _average(seconds_by_step)
    # Phases may have been logged in fewer iterations than the total: their means can then exceed its mean.
    phases["Rest (data, grading, saving)"] = max(0.0, iteration - sum(phases.values()))
    widths: list[str] = []
    rows: list[list[Cell]] = []
    for index, (title, seconds) in enumerate(phases.items()):
        share = 0.0
        if iteration:  # an iteration of no time has no shares
            share = seconds / iteration
        widths.append(f"{share:.4f}")
        # The style sheet has a colour for each phase, p0 to p4.
        heading: Cell = [{"key": f"p{index}"}, title]
        rows.append([heading, f"{seconds:.2f} s", percent(share)])
    return {
        "title": f"An RL iteration: {iteration:.2f} s on average",
        "shares": widths,
        "phases": make_table(["Phase", "Mean", "Share"], rows),
    }


def _settings(experiment: Experiment) -> Iterator[FoldedText]:
    for stage in experiment.stages.values():
        path = stage.dir / "config.yaml"
        if path.is_file():
            yield {"title": stage.title, "text": path.read_text()}
    # The first one stands for all: the recipe evaluates every model with the same settings.
    if evaluation := _first_evaluation(experiment):
        settings = evaluation["settings"]
        lines = [f"{key}: {value}" for key, value in settings.items()]
        yield {"title": "Evaluation", "text": "\n".join(lines)}


def _first_evaluation(experiment: Experiment) -> EvaluationResult | None:
    for evaluations in experiment.scores.values():
        for evaluation in evaluations.values():
            return evaluation
    return None


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
