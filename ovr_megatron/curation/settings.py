"""Settings of data preparation: one schema for each stage, and `PrepareConfig` for all of them."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from ovr_megatron.config import (
    ConfigError,
    DataConfig,
    RewardConfig,
    RolloutConfig,
    Sampling,
    SourceConfig,
    require,
    section,
)
from ovr_megatron.config.checks import LARGEST, ZeroMeans
from ovr_megatron.config.endpoint import Concurrency, EndpointConfig, Timeout, check_url
from ovr_megatron.config.fields import (
    Count,
    Dtype,
    LargeCount,
    NonNegativeFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
)
from ovr_megatron.config.sampling import MAX_SAMPLES, PositiveTemperature, ResponseTokens, Temperature

SampleCount = Annotated[int, Field(gt=0, le=MAX_SAMPLES)]


@section("collect.")
class CollectConfig:
    """Reading the sources."""

    limit: Annotated[Count, ZeroMeans("all")] = 0
    """First rows of each source."""
    on_error: Literal["stop", "skip"] = "stop"
    """Whether a bad row stops the preparation, or is dropped and counted."""


@section("dedup.")
class DedupConfig:
    """Duplicates, and near duplicates by MinHash."""

    key: Literal["row", "prompt"] = "row"
    """Duplicates are of the whole row or of the prompt."""
    near: bool = True
    """Drop near duplicates, too."""
    shingle: PositiveInt = 5
    """Words of a shingle."""
    permutations: Count = 64
    """Hash functions of MinHash."""
    bands: Count = 16
    """Bands that the hashes are cut into."""
    threshold: PositiveUnitFloat = 0.8
    """Estimated Jaccard similarity from which two rows are near duplicates."""
    same_numbers: bool = True
    """Near duplicates have the same numbers in their prompts: a problem with other numbers is another problem."""

    def __post_init__(self) -> None:
        require(
            self.bands >= 1 and self.permutations % self.bands == 0,
            f"dedup.bands={self.bands} must divide dedup.permutations={self.permutations}",
        )


@section("decontaminate.")
class DecontaminateConfig:
    """Evaluation problems that must not be trained on, recognised by the word n-grams that a row repeats."""

    sources: list[SourceConfig] = field(default_factory=list)
    """Evaluation problems."""
    n: Count = 8
    """Words of an n-gram; problems of fewer than 4 n words are cut into shorter ones."""
    threshold: UnitFloat = 0.5
    """Share of the n-grams of a problem from which a row is dropped."""
    masked_threshold: Annotated[UnitFloat, ZeroMeans("off")] = 0.0
    """The same with every number masked, which finds problems with other numbers."""
    min_words: Count = 5
    """Problems of fewer words must be half of the prompt."""
    fields: Literal["prompt", "row"] = "prompt"
    """What is searched for problems."""

    def __post_init__(self) -> None:
        require(1 <= self.min_words <= self.n, f"decontaminate.min_words={self.min_words} must lie in 1..n={self.n}")
        require(self.threshold > 0, "decontaminate.threshold=0 would drop every row; leave the stage out instead")


@section("patterns.")
class PatternsConfig:
    """Rules on a single row; see `ovr_megatron.curation.patterns` for each."""

    need_box: bool = True
    """The response has a boxed answer."""
    need_thought: bool = True
    """The response has a thought."""
    verifiable: bool = True
    """The answer can be verified."""
    max_repetition: UnitFloat = 0.05
    """Open-Reasoner-Zero's repeatness of a long response; 1 is off."""
    repetition_min_characters: Count = 400
    """Characters from which a response is long."""
    language: Literal["any", "en", "zh"] = "any"
    """Language of the response."""
    max_foreign: UnitFloat = 0.05
    """Share of letters of another script."""
    min_function_words: UnitFloat = 0.02
    """Share of function words of the language."""
    template_tokens: bool = True
    """Drop responses with tokens of a chat template in them."""
    min_characters: Count = 0
    """Shortest response."""
    max_characters: Annotated[Count, ZeroMeans("no bound")] = 0
    """Longest response."""
    drop: dict[str, str] = field(default_factory=dict)
    """Names of the user's rules, with regular expressions over the response."""

    def __post_init__(self) -> None:
        for name, pattern in self.drop.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"patterns.drop.{name}={pattern!r} is no regular expression ({error})") from None


@section("proxy_loss.")
class ProxyLossConfig:
    """Mean loss of the response under a small model; the high tail of each source is cut."""

    model: str | None = None
    """Folder of the small model."""
    dtype: Dtype = "bfloat16"
    """Its dtype."""
    cut: Literal["quantile", "zscore"] = "quantile"
    """Cut above a quantile of the source, or above z standard deviations over its mean."""
    quantile: PositiveUnitFloat = 0.98
    """That quantile."""
    z: NonNegativeFloat = 3.0
    """Number of those standard deviations."""
    min_rows: Count = 50
    """Sources of fewer rows are not cut."""
    max_tokens: Annotated[int, Field(ge=2, le=LARGEST)] = 8192
    """First tokens of a row, on which it is scored."""
    batch: PositiveInt = 512
    """Rows that are scored at a time."""


@section("difficulty.")
class DifficultyConfig:
    """Pass rate of a model's responses; prompts between two rates are kept."""

    model: str | None = None
    """Folder of the model."""
    dtype: Dtype = "bfloat16"
    """Its dtype."""
    samples: SampleCount = 8
    """Responses to each prompt."""
    temperature: PositiveTemperature = 1.0
    """Temperature of sampling."""
    max_tokens: ResponseTokens = 8192
    """Tokens of a response."""
    low: NonNegativeFloat = 0.01
    """Lowest pass rate."""
    high: NonNegativeFloat = 0.99
    """Highest pass rate."""

    def __post_init__(self) -> None:
        require(
            self.low <= self.high <= 1,
            f"difficulty.low={self.low} and difficulty.high={self.high} must be rates, low at most high",
        )

    @property
    def sampling(self) -> Sampling:
        """Return how the responses are sampled."""
        return Sampling(self.temperature, self.max_tokens)


@section("verify.")
class VerifyConfig:
    """Grading of responses against the row's answer."""

    need_answer: bool = False
    """Drop rows without an answer."""


@section("stratify.")
class StratifyConfig:
    """Strata of equal size of each source."""

    bins: PositiveInt = 3
    """Strata of a source."""
    measure: Literal["auto", "difficulty", "loss", "length"] = "auto"
    """What they are ordered by; auto takes the rows' difficulty if all rows of a source have one, else the proxy loss,
    else the length of the response."""
    max_rows: Annotated[Count, ZeroMeans("all")] = 0
    """Rows of each stratum."""


@section("weigh.")
class WeighConfig:
    """Weights of the strata.  The mean weight of all rows is 1."""

    power: UnitFloat = 0.5
    """A stratum of n rows gets a share of n**power: 1 changes nothing, 0 gives all strata the same share."""
    min_weight: NonNegativeFloat = 0.25
    """Lowest weight of a row."""
    max_weight: NonNegativeFloat = 4.0
    """Highest weight of a row."""

    def __post_init__(self) -> None:
        require(
            0 < self.min_weight <= 1 <= self.max_weight,
            f"weigh.min_weight={self.min_weight} and weigh.max_weight={self.max_weight} must lie on both sides of 1",
        )


@section("teacher.")
class TeacherConfig(EndpointConfig):
    """The teacher of the prompt rows: an OpenAI-compatible endpoint, or a local model in vLLM."""

    temperature: Temperature = 0.6
    max_tokens: ResponseTokens = 16384
    concurrency: Concurrency = 32
    timeout_s: Timeout = 1800.0
    dtype: Dtype = "bfloat16"
    """Dtype of a local model."""
    samples: SampleCount = 1
    """Responses to each prompt."""
    keep_truncated: bool = False
    """Keep responses that end at max_tokens."""

    def __post_init__(self) -> None:
        if self.base_url:
            check_url(self.base_url, "teacher.base_url", bool(self.key_env), self.allow_http, "teacher.allow_http=true")


TextStage = Literal["collect", "dedup", "decontaminate", "teacher", "patterns"]
MeasuringStage = Literal["proxy_loss", "verify", "difficulty", "stratify", "weigh", "tokenise"]
StageName = Literal[TextStage, MeasuringStage]  # in their order


@section("")
class PrepareConfig:
    """Data preparation."""

    dir: str
    """Folder of the preparation; each stage has its own folder below it."""
    stages: list[StageName] = field(default_factory=list)
    """Stages, in this order."""
    seed: LargeCount = 1
    """Seed of everything random."""
    workers: PositiveInt = 1
    """Processes that examine rows."""
    engines: PositiveInt = 1
    """Processes that run vLLM in stages that need it, one for each GPU."""
    allow_empty: bool = False
    """Go on after a stage that keeps no row of some source."""
    model: str | None = None
    """Model folder whose tokenizer writes the tokenised set."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources of rows, and how rows become tokens."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    """Reading the sources."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Duplicates."""
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    """Evaluation problems that must not be trained on."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The teacher of the prompt rows."""
    patterns: PatternsConfig = field(default_factory=PatternsConfig)
    """Rules on a single row."""
    proxy_loss: ProxyLossConfig = field(default_factory=ProxyLossConfig)
    """Loss under a small model."""
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    """Grading of responses."""
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    """Pass rate of a model."""
    stratify: StratifyConfig = field(default_factory=StratifyConfig)
    """Strata of each source."""
    weigh: WeighConfig = field(default_factory=WeighConfig)
    """Weights of the strata."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """vLLM of the stages that need it."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Graders of responses."""

    def __post_init__(self) -> None:
        require(self.stages[:1] == ["collect"], f"stages={self.stages} must begin with collect")
        require(len(set(self.stages)) == len(self.stages), f"stages={self.stages} names a stage twice")
        order: dict[str, int] = {name: index for index, name in enumerate(self.stages)}
        require(
            "weigh" not in order or order.get("stratify", len(order)) < order["weigh"],
            f"stages={self.stages}: weigh needs stratify before it",
        )
        require("tokenise" not in order or self.stages[-1] == "tokenise", "stages: tokenise must be the last")
        require(bool(self.data.sources), "data.sources is empty: give at least one, for example [{path: rows.jsonl}]")
        require("decontaminate" not in order or bool(self.decontaminate.sources), "decontaminate.sources is empty")
        models = {
            "proxy_loss": self.proxy_loss.model,
            "teacher": self.teacher.model,
            "tokenise": self.model,
            "difficulty": self.difficulty.model,
        }
        for name, model in models.items():
            key = "model" if name == "tokenise" else f"{name}.model"
            require(name not in order or bool(model), f"stages has {name}: give {key}=...")
