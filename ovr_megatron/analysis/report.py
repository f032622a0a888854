"""One self-contained HTML page per experiment: what was trained, how it went, what the model says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import exp
from pathlib import Path
from statistics import median
from typing import Any

from ovr_megatron.analysis import figures
from ovr_megatron.analysis.browser import browser
from ovr_megatron.analysis.experiment import MODELS, Experiment, Stage
from ovr_megatron.analysis.origins import origins
from ovr_megatron.analysis.page import Html, data_uri, document, folded, join, picture, section, table, tag
from ovr_megatron.analysis.samples import LOW, MAX_TOKENS, Moment, Token, moments, read_picture, shade
from ovr_megatron.analysis.summary import summarise
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, PAIRS
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, paper_score
from ovr_megatron.runtime.files import write_whole

MAX_CHARACTERS = 6000  # of one response in the page
PAPER_TRANSFER = {"backtracking": "2.5, 8.2, 17.3 %"}  # of base, cold start and RL on MathVision testmini
PHASES = {
    "timing/generate": "Generate",
    "timing/value": "Value and log-probabilities",
    "timing/update": "Update",
    "timing/sync": "Weights to vLLM",
}
NOTHING = "\N{EN DASH}"


def write_report(experiment: Experiment, refresh: int = 0) -> Path:
    """Write ``report.html`` into the experiment's folder, at once for who reads it, and return its path."""
    return write_whole(experiment.dir / "report.html", render(experiment, refresh))


def render(experiment: Experiment, refresh: int = 0) -> str:
    """The page as text; every part that the folder does not have yet is said to be missing.

    Args:
        experiment: what was read of the folder.
        refresh: seconds after which a browser loads the page again; 0: never.
    """
    summary = summarise(experiment)
    title = experiment.dir.resolve().name
    charts = _charts(experiment)
    return document(
        f"{title} - Open Vision Reasoner",
        tag("p", "Open Vision Reasoner on Megatron-Core", class_="note"),
        tag("h1", title),
        tag("p", _lead(summary), class_="lead"),
        _missing(experiment.missing),
        tag("div", *_tiles(summary), class_="tiles"),
        *_accuracy(experiment, charts.pop("accuracy", None)),
        *_behaviours(experiment, charts.pop("behaviours", None)),
        section("Training", *charts.values()) if charts else None,
        *_timing(experiment),
        *_rollouts(experiment),
        browser(experiment),
        *origins(experiment),
        *_settings(experiment),
        _footer(experiment),
        refresh=refresh,
    )


def _lead(summary: dict[str, Any]) -> str:
    accuracy, reward = summary["accuracy"], summary["reward"]
    parts = []
    if accuracy["cold_start"] is not None and accuracy["rl"] is not None:
        gain = 100 * (accuracy["rl"] - accuracy["cold_start"])
        told = f"{abs(gain):.1f} points {'above' if gain >= 0 else 'below'}"
        parts.append(f"On {accuracy['problems']} held-out visual puzzles RL ends {told} the cold start.")
    if reward["first10"] is not None:
        first, last = reward["first10"], reward["last10"]
        parts.append(f"The mean reward went from {first:.3f} (first ten iterations) to {last:.3f} (last ten).")
    return " ".join(parts) or "Nothing to compare yet."


def _missing(parts: list[str]) -> Html | None:
    if not parts:
        return None
    items = (tag("li", part) for part in parts)
    return tag("div", tag("strong", "Not complete yet"), tag("ul", *items), class_="missing")


def _tiles(summary: dict[str, Any]) -> Iterator[Html]:
    for model, title in MODELS.items():
        value = summary["accuracy"][model]
        yield _tile(f"{title}, visual puzzles", percent(value), f"tile {model}")
    reward = summary["reward"]["last10"]
    yield _tile("Reward, last ten iterations", NOTHING if reward is None else f"{reward:.3f}")
    mismatch = summary["mismatch"]["max"]
    yield _tile("Largest mismatch, log-prob", NOTHING if mismatch is None else f"{mismatch:.1e}")
    yield _tile("Wall time", duration(summary["wall_seconds"]))
    yield _tile("Peak memory", gigabytes(summary["peak_memory_bytes"]))


def _tile(name: str, value: str, kind: str = "tile") -> Html:
    return tag("div", tag("b", value), tag("span", name), class_=kind)


def _charts(experiment: Experiment) -> dict[str, Html]:
    looks = ((theme, width) for width in (figures.WIDE, figures.NARROW) for theme in figures.THEMES)
    drawn = zip(*(figures.draw(experiment, theme, width) for theme, width in looks), strict=True)
    return {
        same[0].name: tag("figure", picture([c.png for c in same], same[0].caption), tag("figcaption", same[0].caption))
        for same in drawn
    }


def _accuracy(experiment: Experiment, chart: Html | None) -> Iterator[Html]:
    if not experiment.sets:
        return
    sampled = list(_sampled_rows(experiment))
    by_source = list(_source_rows(experiment))
    yield section(
        "Accuracy",
        chart,
        table(["Greedy", *MODELS.values()], _greedy_rows(experiment)),
        folded("Pass@k", table(["", *MODELS.values()], sampled)) if sampled else None,
        folded("By source, greedy", table(["", *MODELS.values()], by_source)) if by_source else None,
    )
    if any(name in experiment.sets for name in BENCHMARKS):
        note = "As the benchmark scores it, by a judge where one was asked. What was not run here is shown as a dash."
        yield section(
            "Beside the paper",
            tag("p", note, class_="note"),
            table(["", *MODELS.values(), "Paper"], _paper(experiment)),
        )


def _paper(experiment: Experiment) -> Iterator[list[object]]:
    for name, benchmark in BENCHMARKS.items():
        for title, value in benchmark.paper.items():
            results = [experiment.scores.get(model, {}).get(name) for model in MODELS]
            yield [title, *(_cell(paper_score(name, title, r) if r else None) for r in results), f"{value:.1f} %"]


def _behaviours(experiment: Experiment, chart: Html | None) -> Iterator[Html]:
    """Figure 5, the transfer rates beside the paper's, and who judged."""
    found = experiment.behaviours
    if not found:
        return
    traces = max(part["traces"] for part in found["checkpoints"].values())
    judge = "by wording, an approximation" if found["approximation"] else f"by {found['judge']}"
    missing = ", ".join(f"{count} {why}" for why, count in found["missing"].items())
    told = f"{traces} traces of each model, judged {judge}" + (f"; without a count: {missing}" if missing else "") + "."
    if not experiment.shows_behaviours:
        told = f"Nothing was counted: none of the {told.removesuffix('.')} shows a behaviour."
        yield section("Cognitive behaviours", tag("p", told, class_="note"))
        return
    rows = []
    for linguistic, visual in PAIRS:
        cells = []
        for model in MODELS:
            rate = found["checkpoints"].get(model, {}).get("transfer", {}).get(linguistic) or {}
            shown = rate.get("value") is not None
            spread = f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f}" if shown else ""
            cells.append(join([percent(rate["value"]), tag("small", spread)]) if shown else NOTHING)
        title = f"{BEHAVIOURS[linguistic].title} to {BEHAVIOURS[visual].title.lower()}"
        rows.append([title, *cells, PAPER_TRANSFER.get(linguistic, NOTHING)])
    yield section(
        "Cognitive behaviours",
        tag("p", told, class_="note"),
        chart,
        table(["Transfer rate", *MODELS.values(), "Paper: base, cold start, RL"], rows),
    )


def _greedy_rows(experiment: Experiment) -> Iterator[list[object]]:
    for name, title in experiment.sets.items():
        scores = [experiment.score(model, name) for model in MODELS]
        problems = max(score["problems"] for score in scores if score)
        yield [join([title, tag("small", f"{problems} problems")]), *map(_cell, scores)]


def _sampled_rows(experiment: Experiment) -> Iterator[list[object]]:
    for name, title in experiment.sets.items():
        found = [(experiment.scores.get(model, {}).get(name) or {}).get("sampled") or {} for model in MODELS]
        for k in sorted({int(k) for sampled in found for k in sampled.get("pass", {})}):
            yield [f"{title}, pass@{k}", *(_cell(sampled.get("pass", {}).get(str(k))) for sampled in found)]


def _source_rows(experiment: Experiment) -> Iterator[list[object]]:
    for name, title in experiment.sets.items():
        found = [(experiment.scores.get(model, {}).get(name) or {}).get("sources", {}) for model in MODELS]
        names = sorted({source for sources in found for source in sources})
        for source in names if len(names) > 1 else ():
            yield [f"{title}: {source}", *(_cell(sources.get(source, {}).get("greedy")) for sources in found)]


def _cell(score: Mapping[str, Any] | None) -> Html | str:
    if not score:
        return NOTHING
    interval = f"{100 * score['low']:.1f}\N{EN DASH}{100 * score['high']:.1f}"
    length = tag("small", f"{score['tokens']:.1f} tokens") if "tokens" in score else None
    return join([percent(score["accuracy"]), tag("small", interval), length])


def _timing(experiment: Experiment) -> Iterator[Html]:
    stages = [stage for stage in experiment.stages.values() if stage.metrics]
    if not stages and not experiment.measured:
        return
    head = ["Stage", "Done", "Tokens/s", "Last value"]
    measured = ([name, duration(m.get("wall_seconds")), gigabytes(m.get("peak_memory_bytes"))] for name, m in
                experiment.measured.items())  # fmt: skip
    rl = experiment.stages.get("rl")
    yield section(
        "Time and throughput",
        table(head, map(_stage_row, stages)) if stages else None,
        *(_phases(rl) if rl and rl.values("timing/iteration") else ()),
        *((tag("h3", "Commands"), table(["", "Wall time", "Peak memory"], measured)) if experiment.measured else ()),
    )


def _stage_row(stage: Stage) -> list[object]:
    done = f"{stage.done}" + (f" of {stage.total}" if stage.total else "") + f" {stage.unit}"
    rates = []
    for key, what in (
        ("perf/tokens_per_second", "trained"),
        ("perf/generate_tokens_per_second", "generated"),
        ("perf/train_tokens_per_second", "trained"),
    ):
        if values := stage.values(key):
            rates += [f"{median(values):,.0f}", tag("small", f"{what}, median")]
    last = [
        join([form.format(stage.values(key)[-1]), tag("small", what)])
        for key, what, form in (("loss/train", "loss", "{:.4f}"), ("reward/mean", "mean reward", "{:.3f}"))
        if stage.values(key)
    ]
    return [stage.title, done, join(rates) if rates else NOTHING, join(last) if last else NOTHING]


def _phases(stage: Stage) -> Iterator[Html]:
    """Where the time of an iteration goes: means over the run, as a bar and as a table."""
    whole = _average(stage.values("timing/iteration"))
    parts = {title: _average(stage.values(key)) for key, title in PHASES.items() if stage.values(key)}
    parts["Rest (data, grading, saving)"] = max(0.0, whole - sum(parts.values()))
    shares = {title: seconds / whole if whole else 0.0 for title, seconds in parts.items()}
    yield tag("h3", f"An RL iteration: {whole:.2f} s on average")
    bars = (tag("i", class_=f"p{i}", style=f"flex:{share:.4f}") for i, share in enumerate(shares.values()))
    yield tag("div", *bars, class_="phases", role="img", aria_label="Shares of the phases of an iteration")
    rows = (
        [join([tag("span", class_=f"key p{i}"), title]), f"{parts[title]:.2f} s", percent(share)]
        for i, (title, share) in enumerate(shares.items())
    )
    yield table(["Phase", "Mean", "Share"], rows)


def _rollouts(experiment: Experiment) -> Iterator[Html]:
    stage = experiment.stages.get("rl")
    found = moments(stage.dir) if stage else []
    if not stage or not found:
        return
    shown = sum(len(moment.rollouts) for moment in found)
    note = f"{shown} of all rollouts; the others are in {stage.name}/rollouts, one file an iteration."
    if any(tokens for moment in found for tokens in moment.tokens):
        note += (
            " Green tokens were made more likely and red ones less, the darker the more; a dotted line marks those of a"
        )
        note += f" probability under {exp(LOW):.0%} (point at one for its numbers)."
    yield section("What the model says", tag("p", note, class_="note"), *(_moment(stage, moment) for moment in found))


def _moment(stage: Stage, moment: Moment) -> Html:
    heading = tag("h3", f"{moment.name}: iteration {moment.iteration}")
    pairs = zip(moment.rollouts, moment.tokens, strict=True)
    return join([heading, *(_rollout(stage, rollout, tokens) for rollout, tokens in pairs)])


def _rollout(stage: Stage, rollout: dict[str, Any], tokens: Sequence[Token]) -> Html:
    name = rollout.get("image")
    found = read_picture(stage.dir, name) if name else None
    kind, image = "text", None
    if found:
        small = found.width <= 112
        kind = "image" if small else "photo"
        image = tag("img", src=data_uri(found.png), alt="Image of the prompt", class_="small" if small else None)
    elif name:
        image = tag("p", f"The image {name} is missing.", class_="note")
    right = rollout["reward"] > 0
    facts = [f"{rollout['tokens']} tokens", rollout["source"], f"answer {rollout['answer']}"]
    facts += [] if rollout["stopped"] else ["cut off"]
    badge = tag("span", f"reward {rollout['reward']:g}", class_=f"badge {'right' if right else 'wrong'}")
    return tag(
        "div",
        image,
        tag(
            "div",
            tag("pre", _shorten(rollout["prompt"])),
            tag("pre", _tokens(tokens) or _shorten(rollout["response"]), class_="response", tabindex="0"),
            tag("p", badge, " · ".join(facts), class_="note"),
        ),
        class_=f"rollout {kind}",
    )


def _tokens(tokens: Sequence[Token]) -> Html | None:
    """A response with its tokens shaded by advantage, the unlikely ones underlined; what is said of each as a title.

    None where there are too many tokens, or none.
    """
    if not tokens or len(tokens) > MAX_TOKENS:
        return None
    pieces = []
    for token, level in zip(tokens, shade(tokens), strict=True):
        told = f"probability {exp(token.logprob):.3f}"
        looks = ["unlikely"] if token.logprob < LOW else []
        if token.advantage is not None:
            told = f"advantage {token.advantage:+.3f}, {told}"
            looks += [f"{'up' if level > 0 else 'down'}{abs(level)}"] if level else []
        pieces.append(tag("span", token.text, class_=" ".join(looks) or None, title=told))
    return join(pieces)


def _settings(experiment: Experiment) -> Iterator[Html]:
    texts = {stage.title: stage.dir / "config.yaml" for stage in experiment.stages.values()}
    found = [folded(title, tag("pre", path.read_text())) for title, path in texts.items() if path.is_file()]
    evaluated = next((score for sets in experiment.scores.values() for score in sets.values()), None)
    if evaluated:
        lines = "\n".join(f"{key}: {value}" for key, value in evaluated["settings"].items())
        found.append(folded("Evaluation", tag("pre", lines)))
    if found:
        yield section("Settings", *found)


def _footer(experiment: Experiment) -> Html:
    folder = str(experiment.dir.resolve())
    exported = experiment.exported
    lines = [tag("p", "Curves: ", tag("code", f"tensorboard --logdir {folder}"))]
    if exported:
        lines.append(tag("p", "Final model: ", tag("code", str(exported))))
    return tag("footer", *lines)


def percent(value: float | None) -> str:
    """``87.2 %``, or a dash."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def duration(seconds: float | None) -> str:
    """``45 s``, ``14 min`` or ``2 h 5 min``, or a dash."""
    if seconds is None:
        return NOTHING
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def gigabytes(size: float | None) -> str:
    """``5.1 GB``, or a dash."""
    return NOTHING if size is None else f"{size / 1e9:.1f} GB"


def _average(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _shorten(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
