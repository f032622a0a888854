"""The paper's benchmarks (tables 2 to 4) with the scores that it reports for the 7B model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A problem set: the name that an evaluation has to give it, its title, and the paper's score in percent."""

    name: str
    title: str
    paper: float


BENCHMARKS = (
    Benchmark("aime2024", "AIME 2024", 63.5),
    Benchmark("aime2025", "AIME 2025", 52.1),
    Benchmark("math500", "MATH500", 95.3),
    Benchmark("gpqa_diamond", "GPQA Diamond", 49.8),
    Benchmark("mmlu", "MMLU", 77.2),
    Benchmark("mmlu_pro", "MMLU-Pro", 67.9),
    Benchmark("mathvista", "MathVista", 72.1),
    Benchmark("mathvision", "MathVision", 51.8),
    Benchmark("mathverse", "MathVerse, vision only", 54.6),
    Benchmark("dynamath", "DynaMath, worst case", 33.5),
    Benchmark("wemath_strict", "WeMath, strict", 44.6),
    Benchmark("wemath_loose", "WeMath, loose", 64.8),
    Benchmark("logicvista", "LogicVista", 54.8),
    Benchmark("mmmu_pro", "MMMU-Pro", 50.2),
    Benchmark("charxiv_reasoning", "CharXiv, reasoning", 44.5),
    Benchmark("charxiv_descriptive", "CharXiv, descriptive", 73.6),
)
