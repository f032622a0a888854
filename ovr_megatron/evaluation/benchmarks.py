"""The paper's benchmarks (tables 2 to 4): where they are, how they are scored, and what the paper reports for 7B.

Those that rules can score are ours.  What needs its own templates and a judge's rubrics, and the perception sets, a
kept harness does better on the served export: VLMEvalKit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ovr_megatron.evaluation.scoring import Graded, Official, share

OURS, VLMEVALKIT = "tools/evaluate.py", "VLMEvalKit"
VARIANTS = 10  # of a question of DynaMath


@dataclass(frozen=True)
class Benchmark:
    """A problem set.

    Attributes:
        name: of the set, and of its files.
        title: what people call it.
        paths: where it is published, each a path in the sense of `ovr_megatron.config.SourceConfig`.
        only: takes the rows of this source alone.
        samples: responses at temperature 1 where the score is avg@k.
        rules: how rows of a source are graded (`ovr_megatron.rewards.rules.rule`), "" stands for all other sources.
        official: the benchmark's own scores, each a function of the greedy responses, by title, where accuracy is not
            the one.
        judged: whether its authors have a model judge; ours are rules, beside which `tools/judge.py` puts a judge.
        paper: scores in percent, by title.
        harness: what runs it: ours, or which.
        command: name of the set in the harness.
    """

    name: str
    title: str
    paths: tuple[str, ...] = ()
    only: str | None = None
    samples: int = 0
    rules: Mapping[str, str] = field(default_factory=dict)
    official: Mapping[str, Official] = field(default_factory=dict)
    judged: bool = False
    paper: Mapping[str, float] = field(default_factory=dict)
    harness: str = OURS
    command: str = ""


def worst_case(responses: Sequence[Graded]) -> dict[str, float] | None:
    """Share of the questions all of whose ten variants, which have one id, are right (DynaMath)."""
    groups = _groups(responses, lambda response: response.id)
    if any(len(group) != VARIANTS for group in groups):
        return None
    return share(sum(all(r.correct for r in group) for group in groups), len(groups))


def four_dimensions(responses: Sequence[Graded], strict: bool) -> dict[str, float] | None:
    r"""We-Math's score of its problems of several steps: :math:`CM + IG / 2` as a share of the problems.

    CM, complete mastery: the whole problem is right and so are all its steps (strict) or one of them (loose).
    IG, inadequate generalisation: all steps are right and the whole is not.
    """
    mastered, unapplied = 0, 0
    groups = _groups(responses, lambda response: response.id.partition("/")[0])
    for group in groups:
        verdicts = {r.id.rpartition("_")[2]: r.correct for r in group}  # by step: 1, 2, 3, and multi for the whole
        steps = [right for step, right in verdicts.items() if step != "multi"]
        if "multi" not in verdicts or not group[0].id.startswith(f"{len(steps)}steps"):
            return None
        mastered += verdicts["multi"] and (all(steps) if strict else any(steps))
        unapplied += not verdicts["multi"] and all(steps)
    return share(mastered + unapplied / 2, len(groups))


def mean_of_settings(responses: Sequence[Graded]) -> dict[str, float] | None:
    """Mean of the accuracies of the standard and the vision setting, which are of one size (MMMU-Pro)."""
    groups = _groups(responses, lambda response: response.source)
    if {group[0].source for group in groups} != {"standard", "vision"} or len(groups[0]) != len(groups[1]):
        return None
    return share(sum(r.correct for r in responses), len(responses))


def _groups(responses: Sequence[Graded], key: Callable[[Graded], str]) -> list[list[Graded]]:
    found: dict[str, list[Graded]] = {}
    for response in responses:
        found.setdefault(key(response), []).append(response)
    return list(found.values())


_HUB_MMMU = "MMMU/MMMU_Pro?split=test&config="
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "aime2024", "AIME 2024", ("HuggingFaceH4/aime_2024?split=train",), samples=16, paper={"AIME 2024": 63.5}
        ),
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
            only="Vision Only",
            judged=True,
            paper={"MathVerse, vision only": 54.6},
        ),
        Benchmark(
            "dynamath",
            "DynaMath",
            ("DynaMath/DynaMath_Sample?split=" + "%2B".join(f"sample_variant{n}" for n in range(1, 11)),),
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
            judged=True,
            paper={"LogicVista": 54.8},
        ),
        Benchmark(
            "mmmu_pro",
            "MMMU-Pro",
            (f"{_HUB_MMMU}standard+(10+options)", f"{_HUB_MMMU}vision"),
            official={"MMMU-Pro": mean_of_settings},
            paper={"MMMU-Pro": 50.2},
        ),
        *(
            Benchmark(name, title, judged=judged, paper=paper, harness=VLMEVALKIT, command=command)
            for name, title, command, judged, paper in (
                (
                    *("charxiv_reasoning", "CharXiv, reasoning", "CharXiv_reasoning_val", True),
                    {"CharXiv, reasoning": 44.5},
                ),
                (
                    *("charxiv_descriptive", "CharXiv, descriptive", "CharXiv_descriptive_val", True),
                    {"CharXiv, descriptive": 73.6},
                ),
                ("mmbench", "MMBench", "MMBench_DEV_EN_V11", False, {}),
                ("blink", "BLINK", "BLINK", False, {}),
                ("mmstar", "MMStar", "MMStar", False, {}),
                ("hallusionbench", "HallusionBench", "HallusionBench", False, {}),
                ("pope", "POPE", "POPE", False, {}),
                ("realworldqa", "RealWorldQA", "RealWorldQA", False, {}),
                ("phyx", "PhyX", "PhyX_mini_MC", False, {}),
                ("mme", "MME", "MME", False, {}),
                ("mmvet", "MM-Vet", "MMVet", True, {}),
            )
        ),
    )
}


def paper_score(name: str, title: str, result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The accuracy in an evaluation's ``result`` that stands beside the paper's ``title``: a judge's if it is through.

    Where the title is one of the benchmark's own scores it is that one, None if a part of the set was asked, else
    avg@k if there are samples and the benchmark asks for them, else the greedy accuracy.
    """
    judged = result.get("judged")
    found = judged if judged and not {"not asked", "failed"} & set(judged["missing"]) else result
    if title in BENCHMARKS[name].official:
        return found.get("official", {}).get(title)
    if BENCHMARKS[name].samples and found["sampled"]:
        return found["sampled"]["average"]
    return found["greedy"]


def table() -> str:
    """Every benchmark: what runs it, how it is scored, and where it is."""
    lines = [f"{'name':22}{'paper':>7}  {'runs by':19}score; source"]
    for b in BENCHMARKS.values():
        paper = "/".join(f"{value}" for value in b.paper.values()) or "-"
        rules = ", ".join(f"{source}: {rule}" if source else rule for source, rule in b.rules.items())
        score = f"avg@{b.samples}" if b.samples else ", ".join(b.official) or "accuracy"
        told = [
            score + (f" by {rules}" if rules else ""),
            "authors have a model judge" if b.judged else "",
            *b.paths,
        ]
        where = b.command if b.harness != OURS else "; ".join(part for part in told if part)
        lines.append(f"{b.name:22}{paper:>7}  {b.harness:19}{where}")
    return "\n".join(lines)
