"""Make the page's tables of results: accuracies by problem set, k and source, the paper's beside ours, behaviours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict, cast

from ovr_megatron.analysis.experiment import MODELS, Experiment
from ovr_megatron.analysis.formats import NOTHING, percent
from ovr_megatron.analysis.page import Cell, PageChart, PageTable
from ovr_megatron.evaluation.behaviours import BEHAVIOURS, PAIRS, TraceAccuracy, TransferRate
from ovr_megatron.evaluation.benchmarks import BENCHMARKS, paper_score
from ovr_megatron.evaluation.scoring import Accuracy, SourceScores

if TYPE_CHECKING:
    # The module loads the engines of local judges, which a report does without.
    from ovr_megatron.evaluation.judging import BehaviourResult

PAPER_TRANSFER = {"backtracking": "2.5, 8.2, 17.3 %"}  # of base, cold start and RL on MathVision testmini


class AccuracySection(TypedDict):
    """Accuracies of all models, as a figure and as tables; ``paper`` has no rows without a benchmark of the paper."""

    chart: PageChart | None
    greedy: PageTable
    sampled: PageTable
    by_source: PageTable
    paper: PageTable


class BehaviourSection(TypedDict):
    """Behaviours of all models; only a ``note`` if none was counted."""

    note: str
    chart: PageChart | None
    transfer: PageTable | None
    accuracy: PageTable | None


class ShownScore(Accuracy, total=False):
    """A score of any kind; that of greedy responses has their mean tokens."""

    tokens: float | None


def make_table(head: Sequence[str], rows: Iterable[Sequence[Cell]], title: str = "") -> PageTable:
    """Return a table of the template; ``title`` is its name where it is folded."""
    return {
        "title": title,
        "head": head,
        "rows": list(rows),
    }


def show_accuracy(experiment: Experiment, chart: PageChart | None) -> AccuracySection | None:
    """Return the section, None if nothing was evaluated."""
    if not experiment.sets:
        return None
    models = list(MODELS.values())
    has_benchmark = not experiment.sets.keys().isdisjoint(BENCHMARKS)
    # Without a benchmark all the paper's rows would be dashes beside its scores.
    paper_rows = _paper_rows(experiment) if has_benchmark else ()
    return {
        "chart": chart,
        "greedy": make_table(["Greedy", *models], _greedy_rows(experiment)),
        "sampled": make_table(["", *models], _sampled_rows(experiment), "Pass@k"),
        "by_source": make_table(["", *models], _source_rows(experiment), "By source, greedy"),
        "paper": make_table(["", *models, "Paper"], paper_rows),
    }


def _greedy_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, title in experiment.sets.items():
        scores = [experiment.score(model, name) for model in MODELS]
        # A model may have been evaluated on a part of the set only.
        problem_counts = [score["problems"] for score in scores if score]
        problems = max(problem_counts)
        heading: Cell = [title, {"small": f"{problems} problems"}]
        yield [heading, *map(_score_cell, scores)]


def _sampled_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, title in experiment.sets.items():
        pass_rates = [_pass_rates(experiment, model, name) for model in MODELS]
        keys = set[str]().union(*pass_rates)
        # The keys are numbers as text, whose own order would be 1, 16, 2.
        for key in sorted(keys, key=int):
            heading = f"{title}, pass@{key}"
            cells = [_score_cell(rates.get(key)) for rates in pass_rates]
            yield [heading, *cells]


def _pass_rates(experiment: Experiment, model: str, problem_set: str) -> dict[str, Accuracy]:
    """Return pass@k by k, empty if the model has no samples."""
    evaluation = experiment.evaluation(model, problem_set)
    sampled = evaluation.get("sampled") if evaluation else None
    return sampled.get("pass", {}) if sampled else {}


def _source_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, title in experiment.sets.items():
        scores = [_scores_by_source(experiment, model, name) for model in MODELS]
        sources = sorted(set[str]().union(*scores))
        if len(sources) < 2:  # a single source is the whole set
            continue
        for source in sources:
            cells = []
            for by_source in scores:
                source_scores = by_source.get(source)
                greedy = source_scores.get("greedy") if source_scores else None
                cells.append(_score_cell(greedy))
            yield [f"{title}: {source}", *cells]


def _scores_by_source(experiment: Experiment, model: str, problem_set: str) -> dict[str, SourceScores]:
    evaluation = experiment.evaluation(model, problem_set)
    return evaluation.get("sources", {}) if evaluation else {}


def _paper_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for name, benchmark in BENCHMARKS.items():
        evaluations = [experiment.evaluation(model, name) for model in MODELS]
        for title, value in benchmark.paper.items():
            cells = []
            for evaluation in evaluations:
                score = paper_score(name, title, evaluation) if evaluation else None
                cells.append(_score_cell(score))
            yield [title, *cells, f"{value:.1f} %"]


def _score_cell(fields: Mapping[str, object] | None) -> Cell:
    if not fields:
        return NOTHING
    score = cast(ShownScore, fields)
    low = 100 * score["low"]
    high = 100 * score["high"]
    cell: Cell = [percent(score["accuracy"]), {"small": f"{low:.1f}\N{EN DASH}{high:.1f}"}]
    tokens = score.get("tokens")
    if tokens is None:  # no prompt was answered, all were over the limit
        return cell
    return [*cell, {"small": f"{tokens:.1f} tokens"}]


def show_behaviours(experiment: Experiment, chart: PageChart | None) -> BehaviourSection | None:
    """Return the paper's figure 5, the transfer rates beside the paper's, and who judged."""
    behaviours = experiment.behaviours
    if not behaviours:
        return None
    traces = _judged_traces(behaviours)
    if not experiment.shows_behaviours:
        note = f"Nothing was counted: none of the {traces.removesuffix('.')} shows a behaviour."
        return {"note": note, "chart": None, "transfer": None, "accuracy": None}
    head = ["Transfer rate", *MODELS.values(), "Paper: base, cold start, RL"]
    accuracy_rows = list(_behaviour_accuracy_rows(experiment))
    return {
        "note": traces,
        "chart": chart,
        "transfer": make_table(head, _transfer_rows(experiment)),
        "accuracy": make_table(["Accuracy of traces", *MODELS.values()], accuracy_rows) if accuracy_rows else None,
    }


def _judged_traces(behaviours: BehaviourResult) -> str:
    """Return how many traces were judged, by whom, and how many of them have no count."""
    trace_counts = [checkpoint["traces"] for checkpoint in behaviours["checkpoints"].values()]
    traces = max(trace_counts)
    judge = "by wording, an approximation" if behaviours["approximation"] else f"by {behaviours['judge']}"
    sentence = f"{traces} traces of each model, judged {judge}"
    missing = [f"{count} {reason}" for reason, count in behaviours["missing"].items()]
    if missing:
        sentence += f"; without a count: {', '.join(missing)}"
    return f"{sentence}."


def _transfer_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    for linguistic, visual in PAIRS:
        rates = [experiment.transfer_rate(model, linguistic) for model in MODELS]
        linguistic_title = BEHAVIOURS[linguistic].title
        visual_title = BEHAVIOURS[visual].title.lower()
        paper = PAPER_TRANSFER.get(linguistic, NOTHING)
        yield [f"{linguistic_title} to {visual_title}", *map(_transfer_cell, rates), paper]


def _behaviour_accuracy_rows(experiment: Experiment) -> Iterator[list[Cell]]:
    """Yield two rows for each behaviour that a graded trace shows: the traces with it and those without."""
    for name, behaviour in BEHAVIOURS.items():
        splits = [experiment.behaviour_accuracy(model, name) for model in MODELS]
        if any(split and split["present"] for split in splits):
            with_behaviour = [_accuracy_cell(split["present"] if split else None) for split in splits]
            without_behaviour = [_accuracy_cell(split["absent"] if split else None) for split in splits]
            yield [f"{behaviour.title}: with", *with_behaviour]
            yield [f"{behaviour.title}: without", *without_behaviour]


def _accuracy_cell(accuracy: TraceAccuracy | None) -> Cell:
    if not accuracy:
        return NOTHING
    interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}, n = {accuracy['traces']}"
    return [percent(accuracy["accuracy"]), {"small": interval}]


def _transfer_cell(rate: TransferRate | None) -> Cell:
    if not rate:
        return NOTHING
    value = rate["value"]
    low = rate["low"]
    high = rate["high"]
    if value is None or low is None or high is None:
        return NOTHING  # without the linguistic behaviour there is no ratio
    interval = f"{100 * low:.1f} to {100 * high:.1f}"
    return [percent(value), {"small": interval}]
