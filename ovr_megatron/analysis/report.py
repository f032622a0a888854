"""Write one self-contained HTML page per experiment: what was trained, how it went, what the model says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

from ovr_megatron.analysis import figures
from ovr_megatron.analysis.browser import prepare_browser
from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.analysis.origins import read_origins
from ovr_megatron.analysis.page import Cell, Pieces, data_uri, render_page
from ovr_megatron.analysis.response_card import card_texts, describe_token
from ovr_megatron.analysis.samples import (
    LOW_LOGPROB,
    MAX_TOKENS,
    Moment,
    RolloutLine,
    Token,
    pick_moments,
    read_picture,
    shade,
)
from ovr_megatron.analysis.summary import summarise
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, PAIRS
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, paper_score
from ovr_megatron.runtime.files import write_whole

MAX_CHARACTERS = 6000  # of one response in the page
PAPER_TRANSFER = {"backtracking": "2.5, 8.2, 17.3 %"}  # of base, cold start and RL on MathVision testmini
# Titles of the phases of an iteration, by the metrics of their seconds.
PHASES = {
    "timing/generate": "Generate",
    "timing/value": "Value and log-probabilities",
    "timing/update": "Update",
    "timing/sync": "Weights to vLLM",
}
NOTHING = "\N{EN DASH}"


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
    return render_page(
        title=experiment.dir.resolve().name,
        refresh=refresh,
        lead=_lead_text(summary),
        missing=experiment.missing,
        tiles=list(_tiles(summary)),
        accuracy=_accuracy(experiment, charts.pop("accuracy", None)),
        behaviours=_behaviours(experiment, charts.pop("behaviours", None)),
        charts=list(charts.values()),
        timing=_timing(experiment),
        moments=_moments(experiment),
        browser=prepare_browser(experiment),
        origins=read_origins(experiment),
        settings=list(_settings(experiment)),
        folder=experiment.dir.resolve(),
        exported=experiment.exported,
    )


def _lead_text(summary: dict[str, Any]) -> str:
    accuracy = summary["accuracy"]
    reward = summary["reward"]
    sentences = []
    if accuracy["cold_start"] is not None and accuracy["rl"] is not None:
        gain = 100 * (accuracy["rl"] - accuracy["cold_start"])
        difference = f"{abs(gain):.1f} points {'above' if gain >= 0 else 'below'}"
        sentences.append(f"On {accuracy['problems']} held-out visual puzzles RL ends {difference} the cold start.")
    if reward["first10"] is not None:
        means = f"from {reward['first10']:.3f} (first ten iterations) to {reward['last10']:.3f} (last ten)"
        sentences.append(f"The mean reward went {means}.")
    return " ".join(sentences) or "Nothing to compare yet."


def _tiles(summary: dict[str, Any]) -> Iterator[dict[str, str]]:
    for model, title in MODELS.items():
        yield _tile(f"{title}, visual puzzles", percent(summary["accuracy"][model]), model)
    reward = summary["reward"]["last10"]
    yield _tile("Reward, last ten iterations", NOTHING if reward is None else f"{reward:.3f}")
    mismatch = summary["mismatch"]["max"]
    yield _tile("Largest mismatch, log-prob", NOTHING if mismatch is None else f"{mismatch:.1e}")
    yield _tile("Wall time", duration(summary["wall_seconds"]))
    yield _tile("Peak memory", gigabytes(summary["peak_memory_bytes"]))


def _tile(name: str, value: str, model: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "model": model}


def _draw_charts(experiment: Experiment) -> dict[str, dict[str, str]]:
    """Return each figure by name: its caption, and its picture for every width and theme as an address."""
    looks = {}
    for width_name, width in (("wide", figures.WIDE), ("narrow", figures.NARROW)):
        for theme_name, theme in zip(("light", "dark"), figures.THEMES, strict=True):
            looks[f"{width_name}_{theme_name}"] = figures.draw_figures(experiment, theme, width)
    charts = {}
    for same_chart in zip(*looks.values(), strict=True):
        pictures = {name: data_uri(look.png) for name, look in zip(looks, same_chart, strict=True)}
        charts[same_chart[0].name] = {"caption": same_chart[0].caption} | pictures
    return charts


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], title: str = "") -> dict[str, Any]:
    """Return a table of the template; ``title`` is its name where it is folded."""
    return {"title": title, "head": head, "rows": list(rows)}


def _accuracy(experiment: Experiment, chart: dict[str, str] | None) -> dict[str, Any] | None:
    if not experiment.sets:
        return None
    has_benchmark = any(name in experiment.sets for name in BENCHMARKS)
    return {
        "chart": chart,
        "greedy": _table(["Greedy", *MODELS.values()], _greedy_rows(experiment)),
        "sampled": _table(["", *MODELS.values()], _sampled_rows(experiment), "Pass@k"),
        "by_source": _table(["", *MODELS.values()], _source_rows(experiment), "By source, greedy"),
        "paper": _table(["", *MODELS.values(), "Paper"], _paper_rows(experiment) if has_benchmark else ()),
    }


def _paper_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, benchmark in BENCHMARKS.items():
        for title, value in benchmark.paper.items():
            evaluations = [experiment.evaluation(model, name) for model in MODELS]
            scores = [paper_score(name, title, evaluation) if evaluation else None for evaluation in evaluations]
            yield [title, *map(_cell, scores), f"{value:.1f} %"]


def _behaviours(experiment: Experiment, chart: dict[str, str] | None) -> dict[str, Any] | None:
    """Return the paper's figure 5, the transfer rates beside the paper's, and who judged."""
    behaviours = experiment.behaviours
    if not behaviours:
        return None
    traces = _judged_traces(behaviours)
    if not experiment.shows_behaviours:
        note = f"Nothing was counted: none of the {traces.removesuffix('.')} shows a behaviour."
        return {"note": note, "chart": None, "transfer": None}
    head = ["Transfer rate", *MODELS.values(), "Paper: base, cold start, RL"]
    return {"note": traces, "chart": chart, "transfer": _table(head, _transfer_rows(behaviours))}


def _judged_traces(behaviours: Mapping[str, Any]) -> str:
    """Return how many traces were judged, by whom, and how many of them have no count."""
    traces = max(checkpoint["traces"] for checkpoint in behaviours["checkpoints"].values())
    judge = "by wording, an approximation" if behaviours["approximation"] else f"by {behaviours['judge']}"
    missing = ", ".join(f"{count} {reason}" for reason, count in behaviours["missing"].items())
    return f"{traces} traces of each model, judged {judge}" + (f"; without a count: {missing}" if missing else "") + "."


def _transfer_rows(behaviours: Mapping[str, Any]) -> Iterator[list[Cell]]:
    for linguistic, visual in PAIRS:
        cells: list[Cell] = []
        for model in MODELS:
            transfer = behaviours["checkpoints"].get(model, {}).get("transfer", {})
            cells.append(_transfer_cell(transfer.get(linguistic) or {}))
        title = f"{BEHAVIOURS[linguistic].title} to {BEHAVIOURS[visual].title.lower()}"
        yield [title, *cells, PAPER_TRANSFER.get(linguistic, NOTHING)]


def _transfer_cell(rate: Mapping[str, Any]) -> Cell:
    if rate.get("value") is None:
        return NOTHING
    interval = f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}"
    return [percent(rate["value"]), {"small": interval}]


def _greedy_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, title in experiment.sets.items():
        scores = [experiment.score(model, name) for model in MODELS]
        problems = max(score["problems"] for score in scores if score)
        yield [[title, {"small": f"{problems} problems"}], *map(_cell, scores)]


def _sampled_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, title in experiment.sets.items():
        pass_rates = []
        for model in MODELS:
            evaluation = experiment.evaluation(model, name) or {}
            sampled = evaluation.get("sampled") or {}
            pass_rates.append(sampled.get("pass", {}))
        for k in sorted(map(int, set().union(*pass_rates))):
            cells = [_cell(rates.get(str(k))) for rates in pass_rates]
            yield [f"{title}, pass@{k}", *cells]


def _source_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, title in experiment.sets.items():
        evaluations = [experiment.evaluation(model, name) or {} for model in MODELS]
        scores = [evaluation.get("sources", {}) for evaluation in evaluations]
        sources = sorted(set().union(*scores))
        if len(sources) > 1:  # a single source is the whole set
            for source in sources:
                cells = [_cell(by_source.get(source, {}).get("greedy")) for by_source in scores]
                yield [f"{title}: {source}", *cells]


def _cell(score: Mapping[str, Any] | None) -> Cell:
    if not score:
        return NOTHING
    interval = f"{100 * score['low']:.1f}\N{EN DASH}{100 * score['high']:.1f}"
    cell: Cell = [percent(score["accuracy"]), {"small": interval}]
    return [*cell, {"small": f"{score['tokens']:.1f} tokens"}] if "tokens" in score else cell


def _timing(experiment: Experiment) -> dict[str, Any] | None:
    stages = [stage for stage in experiment.stages.values() if stage.metrics]
    if not stages and not experiment.measured:
        return None
    rl = experiment.stages.get("rl")
    commands = (
        [name, duration(command.get("wall_seconds")), gigabytes(command.get("peak_memory_bytes"))]
        for name, command in experiment.measured.items()
    )
    return {
        "stages": _table(["Stage", "Done", "Tokens/s", "Last value"], map(_stage_row, stages)),
        "iteration": _phases(rl) if rl and rl.values("timing/iteration") else None,
        "commands": _table(["", "Wall time", "Peak memory"], commands),
    }


def _stage_row(stage: Stage) -> list[Cell]:
    progress = f"{stage.done} of {stage.total} {stage.unit}" if stage.total else f"{stage.done} {stage.unit}"
    rates: Pieces = []
    for key, verb in (
        ("perf/tokens_per_second", "trained"),
        ("perf/generate_tokens_per_second", "generated"),
        ("perf/train_tokens_per_second", "trained"),
    ):
        if values := stage.values(key):
            rates += [f"{median(values):,.0f}", {"small": f"{verb}, median"}]
    last: Pieces = []
    for key, title, form in (("loss/train", "loss", "{:.4f}"), ("reward/mean", "mean reward", "{:.3f}")):
        if values := stage.values(key):
            last += [form.format(values[-1]), {"small": title}]
    return [stage.title, progress, rates or NOTHING, last or NOTHING]


def _phases(stage: Stage) -> dict[str, Any]:
    """Return where the time of an iteration goes: means over the run, as a bar and as a table."""
    iteration = _average(stage.values("timing/iteration"))
    phases = {title: _average(stage.values(key)) for key, title in PHASES.items() if stage.values(key)}
    # Phases may have been logged in fewer iterations than the total: their means can then exceed its mean.
    phases["Rest (data, grading, saving)"] = max(0.0, iteration - sum(phases.values()))
    shares = {title: seconds / iteration if iteration else 0.0 for title, seconds in phases.items()}
    rows: list[list[Cell]] = []
    for index, (title, share) in enumerate(shares.items()):
        # The style sheet has a colour for each phase, p0 to p4.
        rows.append([[{"key": f"p{index}"}, title], f"{phases[title]:.2f} s", percent(share)])
    return {
        "title": f"An RL iteration: {iteration:.2f} s on average",
        "shares": [f"{share:.4f}" for share in shares.values()],
        "phases": _table(["Phase", "Mean", "Share"], rows),
    }


def _moments(experiment: Experiment) -> dict[str, Any] | None:
    """Return the cards of a few rollouts, by the moment of the run, below a note about them."""
    stage = experiment.stages.get("rl")
    samples = pick_moments(stage.dir) if stage else []
    if not stage or not samples:
        return None
    count = sum(len(moment.rollouts) for moment in samples)
    note = f"{count} of all rollouts; the others are in {stage.name}/rollouts, one file an iteration."
    if any(any(moment.tokens) for moment in samples):
        note += (
            " Green tokens were made more likely and red ones less, the darker the more; a dotted line marks those of a"
            f" probability under {exp(LOW_LOGPROB):.0%} (point at one for its numbers)."
        )
    return {"note": note, "moments": [_moment(stage, moment) for moment in samples]}


def _moment(stage: Stage, moment: Moment) -> dict[str, Any]:
    pairs = zip(moment.rollouts, moment.tokens, strict=True)
    return {
        "title": f"{moment.name}: iteration {moment.iteration}",
        "cards": [_rollout_card(stage, rollout, tokens) for rollout, tokens in pairs],
    }


def _rollout_card(stage: Stage, rollout: RolloutLine, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the content of a card whose image and tokens are in the page itself."""
    name = rollout.get("image")
    prompt_image = read_picture(stage.dir, name) if name else None
    # The puzzles' images are this small: drawn larger, without smoothing, and beside the text.
    is_small = prompt_image is not None and prompt_image.width <= 112
    card: dict[str, Any] = {
        "kind": ("image" if is_small else "photo") if prompt_image else "text",
        "image": data_uri(prompt_image.png) if prompt_image else None,
        "image_kind": "small" if is_small else "",
        "missing_image": name if name and not prompt_image else None,
        "pieces": _token_pieces(tokens) or [{"text": _shorten(rollout["response"]), "title": ""}],
        "behaviours": [],
    }
    return card | card_texts(rollout | {"prompt": _shorten(rollout["prompt"])})


def _token_pieces(tokens: Sequence[Token]) -> list[dict[str, str]]:
    """Return a response with its tokens shaded by advantage and the unlikely ones underlined.

    The title of each token has its numbers.  The list is empty where there are no tokens, or too many for a page.
    """
    if len(tokens) > MAX_TOKENS:
        return []
    return [describe_token(token, level) for token, level in zip(tokens, shade(tokens), strict=True)]


def _settings(experiment: Experiment) -> Iterator[dict[str, str]]:
    for stage in experiment.stages.values():
        path = stage.dir / "config.yaml"
        if path.is_file():
            yield {"title": stage.title, "text": path.read_text()}
    evaluations = itertools.chain.from_iterable(scores.values() for scores in experiment.scores.values())
    # The first one stands for all: the recipe evaluates every model with the same settings.
    evaluation = next(evaluations, None)
    if evaluation:
        lines = (f"{key}: {value}" for key, value in evaluation["settings"].items())
        yield {"title": "Evaluation", "text": "\n".join(lines)}


def percent(value: float | None) -> str:
    """Return ``87.2 %``, or a dash."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """Return ``45 s``, ``14 min`` or ``2 h 5 min``, or a dash."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def gigabytes(size: float | None) -> str:
    """Return ``5.1 GB``, or a dash."""
    return NOTHING if size is None else f"{size / 1e9:.1f} GB"


def _average(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _shorten(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
