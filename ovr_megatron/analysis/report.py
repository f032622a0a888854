"""Write one self-contained HTML page per experiment: what was trained, how it went, what the model says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

from ovr_megatron.analysis import figures
from ovr_megatron.analysis.browser import render_browser
from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.analysis.origins import render_origins
from ovr_megatron.analysis.page import Html, data_uri, details, document, join, picture, section, table, tag
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
    title = experiment.dir.resolve().name
    # Two of the figures have sections of their own; the others, in their order, make up the training's.
    charts = _render_charts(experiment)
    return document(
        f"{title} - Open Vision Reasoner",
        tag("p", "Open Vision Reasoner on Megatron-Core", class_="note"),
        tag("h1", title),
        tag("p", _lead_text(summary), class_="lead"),
        _render_missing(experiment.missing),
        tag("div", *_render_tiles(summary), class_="tiles"),
        *_render_accuracy(experiment, charts.pop("accuracy", None)),
        *_render_behaviours(experiment, charts.pop("behaviours", None)),
        section("Training", *charts.values()) if charts else None,
        *_render_timing(experiment),
        *_render_rollouts(experiment),
        render_browser(experiment),
        *render_origins(experiment),
        *_render_settings(experiment),
        _render_footer(experiment),
        refresh=refresh,
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


def _render_missing(sentences: list[str]) -> Html | None:
    if not sentences:
        return None
    items = (tag("li", sentence) for sentence in sentences)
    return tag("div", tag("strong", "Not complete yet"), tag("ul", *items), class_="missing")


def _render_tiles(summary: dict[str, Any]) -> Iterator[Html]:
    for model, title in MODELS.items():
        value = summary["accuracy"][model]
        yield _render_tile(f"{title}, visual puzzles", percent(value), f"tile {model}")
    reward = summary["reward"]["last10"]
    yield _render_tile("Reward, last ten iterations", NOTHING if reward is None else f"{reward:.3f}")
    mismatch = summary["mismatch"]["max"]
    yield _render_tile("Largest mismatch, log-prob", NOTHING if mismatch is None else f"{mismatch:.1e}")
    yield _render_tile("Wall time", duration(summary["wall_seconds"]))
    yield _render_tile("Peak memory", gigabytes(summary["peak_memory_bytes"]))


def _render_tile(name: str, value: str, kind: str = "tile") -> Html:
    return tag("div", tag("b", value), tag("span", name), class_=kind)


def _render_charts(experiment: Experiment) -> dict[str, Html]:
    """Return each figure by name, as a picture in the four looks that `picture` takes, in their order."""
    wide_light, *other_looks = [
        figures.draw_figures(experiment, theme, width)
        for width, theme in itertools.product((figures.WIDE, figures.NARROW), figures.THEMES)
    ]
    rendered = {}
    for same_chart in zip(wide_light, *other_looks, strict=True):
        chart = same_chart[0]
        image = picture([look.png for look in same_chart], chart.caption)
        rendered[chart.name] = tag("figure", image, tag("figcaption", chart.caption))
    return rendered


def _render_accuracy(experiment: Experiment, chart: Html | None) -> Iterator[Html]:
    if not experiment.sets:
        return
    sampled = list(_sampled_rows(experiment))
    by_source = list(_source_rows(experiment))
    yield section(
        "Accuracy",
        chart,
        table(["Greedy", *MODELS.values()], _greedy_rows(experiment)),
        details("Pass@k", table(["", *MODELS.values()], sampled)) if sampled else None,
        details("By source, greedy", table(["", *MODELS.values()], by_source)) if by_source else None,
    )
    if any(name in experiment.sets for name in BENCHMARKS):
        note = "As the benchmark scores it, by a judge where one was asked. What was not run here is shown as a dash."
        yield section(
            "Beside the paper",
            tag("p", note, class_="note"),
            table(["", *MODELS.values(), "Paper"], _paper_rows(experiment)),
        )


def _paper_rows(experiment: Experiment) -> Iterator[list[object]]:
    for name, benchmark in BENCHMARKS.items():
        for title, value in benchmark.paper.items():
            evaluations = [experiment.evaluation(model, name) for model in MODELS]
            scores = [paper_score(name, title, evaluation) if evaluation else None for evaluation in evaluations]
            yield [title, *map(_cell, scores), f"{value:.1f} %"]


def _render_behaviours(experiment: Experiment, chart: Html | None) -> Iterator[Html]:
    """Yield the paper's figure 5, the transfer rates beside the paper's, and who judged."""
    behaviours = experiment.behaviours
    if not behaviours:
        return
    if experiment.shows_behaviours:
        yield section(
            "Cognitive behaviours",
            tag("p", _judged_traces(behaviours), class_="note"),
            chart,
            table(["Transfer rate", *MODELS.values(), "Paper: base, cold start, RL"], _transfer_rows(behaviours)),
        )
    else:
        traces = _judged_traces(behaviours).removesuffix(".")
        note = f"Nothing was counted: none of the {traces} shows a behaviour."
        yield section("Cognitive behaviours", tag("p", note, class_="note"))


def _judged_traces(behaviours: Mapping[str, Any]) -> str:
    """Return how many traces were judged, by whom, and how many of them have no count."""
    traces = max(checkpoint["traces"] for checkpoint in behaviours["checkpoints"].values())
    judge = "by wording, an approximation" if behaviours["approximation"] else f"by {behaviours['judge']}"
    missing = ", ".join(f"{count} {reason}" for reason, count in behaviours["missing"].items())
    return f"{traces} traces of each model, judged {judge}" + (f"; without a count: {missing}" if missing else "") + "."


def _transfer_rows(behaviours: Mapping[str, Any]) -> Iterator[list[object]]:
    for linguistic, visual in PAIRS:
        cells = []
        for model in MODELS:
            transfer = behaviours["checkpoints"].get(model, {}).get("transfer", {})
            cells.append(_transfer_cell(transfer.get(linguistic) or {}))
        title = f"{BEHAVIOURS[linguistic].title} to {BEHAVIOURS[visual].title.lower()}"
        yield [title, *cells, PAPER_TRANSFER.get(linguistic, NOTHING)]


def _transfer_cell(rate: Mapping[str, Any]) -> Html | str:
    if rate.get("value") is None:
        return NOTHING
    interval = f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}"
    return join([percent(rate["value"]), tag("small", interval)])


def _greedy_rows(experiment: Experiment) -> Iterator[list[object]]:
    for name, title in experiment.sets.items():
        scores = [experiment.score(model, name) for model in MODELS]
        problems = max(score["problems"] for score in scores if score)
        yield [join([title, tag("small", f"{problems} problems")]), *map(_cell, scores)]


def _sampled_rows(experiment: Experiment) -> Iterator[list[object]]:
    for name, title in experiment.sets.items():
        pass_rates = []
        for model in MODELS:
            evaluation = experiment.evaluation(model, name) or {}
            sampled = evaluation.get("sampled") or {}
            pass_rates.append(sampled.get("pass", {}))
        for k in sorted(map(int, set().union(*pass_rates))):
            cells = [_cell(rates.get(str(k))) for rates in pass_rates]
            yield [f"{title}, pass@{k}", *cells]


def _source_rows(experiment: Experiment) -> Iterator[list[object]]:
    for name, title in experiment.sets.items():
        evaluations = [experiment.evaluation(model, name) or {} for model in MODELS]
        scores = [evaluation.get("sources", {}) for evaluation in evaluations]
        sources = sorted(set().union(*scores))
        if len(sources) > 1:  # a single source is the whole set
            for source in sources:
                cells = [_cell(by_source.get(source, {}).get("greedy")) for by_source in scores]
                yield [f"{title}: {source}", *cells]


def _cell(score: Mapping[str, Any] | None) -> Html | str:
    if not score:
        return NOTHING
    interval = f"{100 * score['low']:.1f}\N{EN DASH}{100 * score['high']:.1f}"
    length = tag("small", f"{score['tokens']:.1f} tokens") if "tokens" in score else None
    return join([percent(score["accuracy"]), tag("small", interval), length])


def _render_timing(experiment: Experiment) -> Iterator[Html]:
    stages = [stage for stage in experiment.stages.values() if stage.metrics]
    if not stages and not experiment.measured:
        return
    rl = experiment.stages.get("rl")
    yield section(
        "Time and throughput",
        table(["Stage", "Done", "Tokens/s", "Last value"], map(_stage_row, stages)) if stages else None,
        *(_render_phases(rl) if rl and rl.values("timing/iteration") else ()),
        *(_render_commands(experiment.measured) if experiment.measured else ()),
    )


def _render_commands(measured: Mapping[str, Mapping[str, float]]) -> Iterator[Html]:
    yield tag("h3", "Commands")
    rows = (
        [name, duration(command.get("wall_seconds")), gigabytes(command.get("peak_memory_bytes"))]
        for name, command in measured.items()
    )
    yield table(["", "Wall time", "Peak memory"], rows)


def _stage_row(stage: Stage) -> list[object]:
    progress = f"{stage.done} of {stage.total} {stage.unit}" if stage.total else f"{stage.done} {stage.unit}"
    rates: list[object] = []
    for key, verb in (
        ("perf/tokens_per_second", "trained"),
        ("perf/generate_tokens_per_second", "generated"),
        ("perf/train_tokens_per_second", "trained"),
    ):
        if values := stage.values(key):
            rates += [f"{median(values):,.0f}", tag("small", f"{verb}, median")]
    last = []
    for key, title, form in (("loss/train", "loss", "{:.4f}"), ("reward/mean", "mean reward", "{:.3f}")):
        if values := stage.values(key):
            last.append(join([form.format(values[-1]), tag("small", title)]))
    return [stage.title, progress, join(rates) if rates else NOTHING, join(last) if last else NOTHING]


def _render_phases(stage: Stage) -> Iterator[Html]:
    """Yield where the time of an iteration goes: means over the run, as a bar and as a table."""
    iteration = _average(stage.values("timing/iteration"))
    phases = {title: _average(stage.values(key)) for key, title in PHASES.items() if stage.values(key)}
    # Phases may have been logged in fewer iterations than the total: their means can then exceed its mean.
    phases["Rest (data, grading, saving)"] = max(0.0, iteration - sum(phases.values()))
    shares = {title: seconds / iteration if iteration else 0.0 for title, seconds in phases.items()}
    yield tag("h3", f"An RL iteration: {iteration:.2f} s on average")
    bars = []
    rows = []
    for index, (title, share) in enumerate(shares.items()):
        # The style sheet has a colour for each phase, p0 to p4.
        bars.append(tag("i", class_=f"p{index}", style=f"flex:{share:.4f}"))
        key = tag("span", class_=f"key p{index}")
        rows.append([join([key, title]), f"{phases[title]:.2f} s", percent(share)])
    yield tag("div", *bars, class_="phases", role="img", aria_label="Shares of the phases of an iteration")
    yield table(["Phase", "Mean", "Share"], rows)


def _render_rollouts(experiment: Experiment) -> Iterator[Html]:
    stage = experiment.stages.get("rl")
    samples = pick_moments(stage.dir) if stage else []
    if not stage or not samples:
        return
    count = sum(len(moment.rollouts) for moment in samples)
    note = f"{count} of all rollouts; the others are in {stage.name}/rollouts, one file an iteration."
    if any(any(moment.tokens) for moment in samples):
        note += (
            " Green tokens were made more likely and red ones less, the darker the more; a dotted line marks those of a"
            f" probability under {exp(LOW_LOGPROB):.0%} (point at one for its numbers)."
        )
    rendered = (_render_moment(stage, moment) for moment in samples)
    yield section("What the model says", tag("p", note, class_="note"), *rendered)


def _render_moment(stage: Stage, moment: Moment) -> Html:
    heading = tag("h3", f"{moment.name}: iteration {moment.iteration}")
    pairs = zip(moment.rollouts, moment.tokens, strict=True)
    return join([heading, *(_render_rollout(stage, rollout, tokens) for rollout, tokens in pairs)])


def _render_rollout(stage: Stage, rollout: RolloutLine, tokens: Sequence[Token]) -> Html:
    name = rollout.get("image")
    prompt_image = read_picture(stage.dir, name) if name else None
    kind = "text"
    image = None
    if prompt_image:
        # The puzzles' images are this small: drawn larger, without smoothing, and beside the text.
        small = prompt_image.width <= 112
        kind = "image" if small else "photo"
        image = tag("img", src=data_uri(prompt_image.png), alt="Image of the prompt", class_="small" if small else None)
    elif name:
        image = tag("p", f"The image {name} is missing.", class_="note")
    right = rollout["reward"] > 0
    facts = [f"{rollout['tokens']} tokens", rollout["source"], f"answer {rollout['answer']}"]
    if not rollout["stopped"]:
        facts.append("cut off")
    badge = tag("span", f"reward {rollout['reward']:g}", class_=f"badge {'right' if right else 'wrong'}")
    return tag(
        "div",
        image,
        tag(
            "div",
            tag("pre", _shorten(rollout["prompt"])),
            tag("pre", _render_tokens(tokens) or _shorten(rollout["response"]), class_="response", tabindex="0"),
            tag("p", badge, " · ".join(facts), class_="note"),
        ),
        class_=f"rollout {kind}",
    )


def _render_tokens(tokens: Sequence[Token]) -> Html | None:
    """Return a response with its tokens shaded by advantage and the unlikely ones underlined.

    The title of each token has its numbers.  None where there are no tokens, or too many for a page.
    """
    if not tokens or len(tokens) > MAX_TOKENS:
        return None
    pieces = []
    for token, level in zip(tokens, shade(tokens), strict=True):
        title = f"probability {exp(token.logprob):.3f}"
        looks = ["unlikely"] if token.logprob < LOW_LOGPROB else []
        if token.advantage is not None:
            title = f"advantage {token.advantage:+.3f}, {title}"
            if level:
                looks.append(f"{'up' if level > 0 else 'down'}{abs(level)}")
        pieces.append(tag("span", token.text, class_=" ".join(looks) or None, title=title))
    return join(pieces)


def _render_settings(experiment: Experiment) -> Iterator[Html]:
    paths = {stage.title: stage.dir / "config.yaml" for stage in experiment.stages.values()}
    blocks = [details(title, tag("pre", path.read_text())) for title, path in paths.items() if path.is_file()]
    evaluations = itertools.chain.from_iterable(scores.values() for scores in experiment.scores.values())
    # The first one stands for all: the recipe evaluates every model with the same settings.
    evaluation = next(evaluations, None)
    if evaluation:
        lines = "\n".join(f"{key}: {value}" for key, value in evaluation["settings"].items())
        blocks.append(details("Evaluation", tag("pre", lines)))
    if blocks:
        yield section("Settings", *blocks)


def _render_footer(experiment: Experiment) -> Html:
    folder = str(experiment.dir.resolve())
    exported = experiment.exported
    lines = [tag("p", "Curves: ", tag("code", f"tensorboard --logdir {folder}"))]
    if exported:
        lines.append(tag("p", "Final model: ", tag("code", str(exported))))
    return tag("footer", *lines)


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
