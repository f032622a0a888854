"""Settings of an evaluation: of the live weights during training, and of a folder by ``ovr evaluate``."""

from __future__ import annotations

import re
from dataclasses import field, replace
from typing import Annotated

from pydantic import Field

from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.data import SourceConfig
from ovr_megatron.config.fields import Count, LargeCount, PositiveInt, section
from ovr_megatron.config.sampling import MAX_SAMPLES, Sampling, Temperature


@section("evaluation.")
class EvaluationConfig:
    """Problem sets that the live weights answer during training."""

    every: Annotated[Count, ZeroMeans("never")] = 0
    """Steps or iterations between evaluations; another is at the end."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Problem sets, each with a name."""
    limit: Annotated[Count, ZeroMeans("all")] = 0
    """First problems of each set."""
    max_tokens: Annotated[
        int,
        Field(ge=0, le=1 << 24),
        ZeroMeans("the model's positions less data.max_prompt_tokens, at most 32,768"),
    ] = 0
    """Tokens of a greedy response, as in tools/evaluate.py."""
    samples: Annotated[int | None, Field(ge=0, le=MAX_SAMPLES)] = 0
    """More responses at temperature 1, which give pass@k."""
    rules: dict[str, str] = field(default_factory=dict)
    """By name of a set, the rule that makes a response right (`ovr_megatron.rewards.rules.rule`), as box:0.5, where its
    reward is 1; by default the last box counts."""
    workers: PositiveInt = 2
    """Processes that grade."""

    def __post_init__(self) -> None:
        require(
            not self.every or bool(self.sources),
            f"evaluation.every={self.every} has nothing to ask: give evaluation.sources=[{{path: FILE, name: NAME}}]",
        )
        names = [source.name or "" for source in self.sources]
        for source, name in zip(self.sources, names, strict=True):
            # Files and metrics of a set carry its name.
            require(
                bool(re.fullmatch(r"[\w.-]+", name)),
                f"evaluation.sources: {source.path} is called {name!r}; give it a name of letters, digits, - _ or .",
            )
            require(names.count(name) == 1, f"evaluation.sources: two sets are called {name}; name one of them anew")
        for name in self.rules:
            require(name in names, f"evaluation.rules.{name}: no set of evaluation.sources has this name")


@section("evaluation.")
class EvaluationSettings(EvaluationConfig):
    """All settings of an evaluation: ``ovr evaluate`` has options for them, and a run its part in ``evaluation.*``."""

    samples: Annotated[int | None, Field(ge=0, le=MAX_SAMPLES)] = None
    """Sampled responses to each problem for pass@k, beside the greedy one; none: as many as the benchmark asks for."""
    temperature: Temperature = 1.0
    """Temperature of the samples."""
    metric: str = "auto"
    """Whether the last box is right (boxed), or the response is the reference text (exact); auto chooses by row.  Or a
    rule of rewards, for sets without one in ``rules``."""
    seed: LargeCount = 1
    """Seed of the samples."""

    @property
    def sampling(self) -> Sampling:
        """Return how the samples are drawn."""
        return Sampling(self.temperature, self.max_tokens)

    @property
    def greedy(self) -> Sampling:
        """Return how the greedy response is made."""
        return replace(self.sampling, temperature=0.0)

    def as_result(self) -> dict[str, object]:
        """Return the settings on which responses and scores depend, as the results of a set hold them."""
        names = ("samples", "temperature", "max_tokens", "metric", "seed")
        result = {name: getattr(self, name) for name in names}
        # Left out where there are none, as in results before there were rules.
        return {**result, "rules": self.rules} if self.rules else result
