"""The paper's benchmarks (tables 2 to 4): where they are published, how they are scored, and its scores for 7B.

Rules score the benchmarks that run here.  Benchmarks with own templates and a judge's rubrics, and the perception sets,
are better run by a maintained harness, VLMEvalKit, on the served export.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovr_megatron.evaluation.scoring import Accuracy, GradedResponse, OfficialScore, accuracy_interval

OURS = "ovr evaluate"
VLMEVALKIT = "VLMEvalKit"
VARIANTS = 10  # of each question of DynaMath


@dataclass(frozen=True)
class Benchmark:
    """A problem set of the paper.

    Attributes:
        name: Name of the set and of its files.
        title: Name for people.
        paths: Where it is published, each a path in the sense of `ovr_megatron.config.SourceConfig`.
        only_source: Only rows of this source belong to it; None for all rows.
        samples: Number of responses at temperature 1 where the score is avg@k.
        rules: Rule by source of the row (`ovr_megatron.rewards.rules.rule`); "" stands for all other sources.
        official: Own scores by title, each a function of the greedy responses, where the score is not accuracy.
        model_judge: Whether its authors score with a model; we score with rules, and `ovr judge` adds a judge.
        paper: The paper's scores in percent, by title.
        harness: What runs it.
        command: Name of the set in another harness.
    """

    name: str
    title: str
    paths: tuple[str, ...] = ()
    only_source: str | None = None
    samples: int = 0
    rules: Mapping[str, str] = field(default_factory=dict)
    official: Mapping[str, OfficialScore] = field(default_factory=dict)
    model_judge: bool = False
    paper: Mapping[str, float] = field(default_factory=dict)
    harness: str = OURS
    command: str = ""


def worst_case(responses: Sequence[GradedResponse]) -> Accuracy | None:
    """Return the share of the questions all of whose ten variants, which share an id, are right (DynaMath).

    None if a variant is missing.
    """
    groups = _group_by(responses, lambda response: response.id)
    if any(len(group) != VARIANTS for group in groups):
        return None
    right_groups = sum(_all_correct(group) for group in groups)
    return accuracy_interval(right_groups, len(groups))


def four_dimensions(responses: Sequence[GradedResponse], strict: bool) -> Accuracy | None:
    r"""Return We-Math's score of its problems of several steps: :math:`CM + IG / 2` as a share of the problems.

    CM, complete mastery: the multi-step problem is right and so are all its steps (strict) or one of them (loose).
    IG, inadequate generalisation: all steps are right and the multi-step problem is not.  None if a response is
    missing.
    """
    complete_mastery = 0
    inadequate_generalisation = 0
    groups = _group_by(responses, lambda response: response.id.partition("/")[0])
    for group in groups:
        # Ids end in the number of the step, or in "multi" for the multi-step problem.
        verdicts = {response.id.rpartition("_")[2]: response.correct for response in group}
        steps = [correct for step, correct in verdicts.items() if step != "multi"]
        if "multi" not in verdicts or not group[0].id.startswith(f"{len(steps)}steps"):
            return None
        if verdicts["multi"]:
            complete_mastery += all(steps) if strict else any(steps)
        else:
            inadequate_generalisation += all(steps)
    return accuracy_interval(complete_mastery + inadequate_generalisation / 2, len(groups))


def mean_of_settings(responses: Sequence[GradedResponse]) -> Accuracy | None:
    """Return the mean accuracy of the standard and the vision setting, which are of one size (MMMU-Pro).

    None if a response is missing.
    """
    groups = _group_by(responses, lambda response: response.source)
    sources = {group[0].source for group in groups}
    if sources != {"standard", "vision"} or len(groups[0]) != len(groups[1]):
        return None
    return accuracy_interval(sum(response.correct for response in responses), len(responses))


def _group_by(responses: Sequence[GradedResponse], key: Callable[[GradedResponse], str]) -> list[list[GradedResponse]]:
    groups: dict[str, list[GradedResponse]] = {}
    for response in responses:
        groups.setdefault(key(response), []).append(response)
    return list(groups.values())


def _all_correct(responses: Sequence[GradedResponse]) -> bool:
    return all(response.correct for response in responses)


def _vlmevalkit(
    name: str,
    title: str,
    command: str,
    model_judge: bool = False,
    paper: Mapping[str, float] | None = None,
) -> Benchmark:
    return Benchmark(name, title, model_judge=model_judge, paper=paper or {}, harness=VLMEVALKIT, command=command)


_MMMU_PRO = "MMMU/MMMU_Pro?split=test&config="
# %2B is a plus sign; a plus sign in a query is a space.
_DYNAMATH_SPLITS = "%2B".join(f"sample_variant{variant}" for variant in range(1, VARIANTS + 1))
_SCORED_BY_RULES = (
    Benchmark("aime2024", "AIME 2024", ("HuggingFaceH4/aime_2024?split=train",), samples=16, paper={"AIME 2024": 63.5}),
    Benchmark("aime2025", "AIME 2025", ("math-ai/aime25?split=test",), samples=16, paper={"AIME 2025": 52.1}),
    Benchmark("math500", "MATH500", ("HuggingFaceH4/MATH-500?split=test",), paper={"MATH500": 95.3}),
    Benchmark(
        "gpqa_diamond",
        "GPQA Diamond",
        ("Idavidrein/gpqa?split=train&config=gpqa_diamond",),
        paper={"GPQA Diamond": 49.8},
    ),
    Benchmark("mmlu", "MMLU", ("cais/mmlu?split=test&config=all",), paper={"MMLU": 77.2}),
    Benchmark("mmlu_pro", "MMLU-Pro", ("TIGER-Lab/MMLU-Pro?split=test",), paper={"MMLU-Pro": 67.9}),
    Benchmark("mathvista", "MathVista", ("AI4Math/MathVista?split=testmini",), paper={"MathVista": 72.1}),
    Benchmark("mathvision", "MathVision", ("MathLLMs/MathVision?split=test",), paper={"MathVision": 51.8}),
    Benchmark("mathvision_testmini", "MathVision testmini", ("MathLLMs/MathVision?split=testmini",)),
    Benchmark(
        "mathverse",
        "MathVerse, vision only",
        ("AI4Math/MathVerse?split=testmini&config=testmini",),
        only_source="Vision Only",
        model_judge=True,
        paper={"MathVerse, vision only": 54.6},
    ),
    Benchmark(
        "dynamath",
        "DynaMath",
        (f"DynaMath/DynaMath_Sample?split={_DYNAMATH_SPLITS}",),
        rules={"float": "within:0.001"},
        official={"DynaMath, worst case": worst_case},
        paper={"DynaMath, worst case": 33.5},
    ),
    Benchmark(
        "wemath",
        "WeMath",
        ("We-Math/We-Math?split=testmini",),
        rules={"": "choice"},
        official={
            "WeMath, strict": lambda responses: four_dimensions(responses, strict=True),
            "WeMath, loose": lambda responses: four_dimensions(responses, strict=False),
        },
        paper={"WeMath, strict": 44.6, "WeMath, loose": 64.8},
    ),
    Benchmark(
        "logicvista",
        "LogicVista",
        ("lscpku/LogicVista?split=test",),
        rules={"": "letters"},
        model_judge=True,
        paper={"LogicVista": 54.8},
    ),
    Benchmark(
        "mmmu_pro",
        "MMMU-Pro",
        (f"{_MMMU_PRO}standard+(10+options)", f"{_MMMU_PRO}vision"),
        official={"MMMU-Pro": mean_of_settings},
        paper={"MMMU-Pro": 50.2},
    ),
)
_RUN_BY_VLMEVALKIT = (
    _vlmevalkit(
        "charxiv_reasoning",
        "CharXiv, reasoning",
        "CharXiv_reasoning_val",
        model_judge=True,
        paper={"CharXiv, reasoning": 44.5},
    ),
    _vlmevalkit(
        "charxiv_descriptive",
        "CharXiv, descriptive",
        "CharXiv_descriptive_val",
        model_judge=True,
        paper={"CharXiv, descriptive": 73.6},
    ),
    _vlmevalkit("mmbench", "MMBench", "MMBench_DEV_EN_V11"),
    _vlmevalkit("blink", "BLINK", "BLINK"),
    _vlmevalkit("mmstar", "MMStar", "MMStar"),
    _vlmevalkit("hallusionbench", "HallusionBench", "HallusionBench"),
    _vlmevalkit("pope", "POPE", "POPE"),
    _vlmevalkit("realworldqa", "RealWorldQA", "RealWorldQA"),
    _vlmevalkit("phyx", "PhyX", "PhyX_mini_MC"),
    _vlmevalkit("mme", "MME", "MME"),
    _vlmevalkit("mmvet", "MM-Vet", "MMVet", model_judge=True),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in (*_SCORED_BY_RULES, *_RUN_BY_VLMEVALKIT)}


def paper_score(name: str, title: str, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the accuracy in an evaluation's ``result`` that compares with the paper's ``title``.

    That is the benchmark's own score of this title, None if the responses to it are incomplete; else avg@k, if the
    benchmark has samples and so has the result; else the greedy accuracy.  A judge's scores replace those of the rules
    once the judge was asked about every response.
    """
    judged = result.get("judged")
    scores = result
    if judged and not {"not asked", "failed"} & set(judged["missing"]):
        scores = judged
    if title in BENCHMARKS[name].official:
        return scores.get("official", {}).get(title)
    if BENCHMARKS[name].samples and scores["sampled"]:
        return scores["sampled"]["average"]
    return scores["greedy"]


def format_benchmarks() -> str:
    """Return a table of all benchmarks: what runs them, how they are scored, and where they are."""
    lines = [f"{'name':22}{'paper':>7}  {'runs by':19}score; source"]
    for benchmark in BENCHMARKS.values():
        paper = "/".join(f"{value}" for value in benchmark.paper.values()) or "-"
        description = _scoring_and_source(benchmark) if benchmark.harness == OURS else benchmark.command
        lines.append(f"{benchmark.name:22}{paper:>7}  {benchmark.harness:19}{description}")
    return "\n".join(lines)


def _scoring_and_source(benchmark: Benchmark) -> str:
    if benchmark.samples:
        scoring = f"avg@{benchmark.samples}"
    else:
        scoring = ", ".join(benchmark.official) or "accuracy"
    if benchmark.rules:
        rules = [f"{source}: {rule}" if source else rule for source, rule in benchmark.rules.items()]
        scoring += f" by {', '.join(rules)}"
    parts = [scoring]
    if benchmark.model_judge:
        parts.append("authors have a model judge")
    parts += filter(None, benchmark.paths)
    return "; ".join(parts)
