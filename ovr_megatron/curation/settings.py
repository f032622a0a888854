"""Settings of data preparation: one schema for each stage, and `PrepareConfig` for all of them."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ovr_megatron.config import (
    ConfigError,
    DataConfig,
    RewardConfig,
    RolloutConfig,
    SourceConfig,
    choice,
    forbid_unknown_keys,
    require,
)

_SECRET = re.compile("key|token|secret|passw|sig|auth", re.IGNORECASE)
# Upper bounds: of threads, of seconds (a week), of counts that must fit into 64 bits.
_POSITIVE = {"samples": 1 << 16, "max_tokens": 1 << 24, "concurrency": 4096, "attempts": 1000, "timeout_s": 604800}
_FROM_ZERO = {
    "temperature": 100,
    "backoff_s": 604800,
    "max_backoff_s": 604800,
    "max_requests": 1 << 62,
    "max_total_tokens": 1 << 62,
}


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Reading the sources: at most ``limit`` rows of each (0: all); ``on_error`` skip drops and counts bad rows."""

    limit: int = 0
    on_error: str = "stop"

    def __post_init__(self) -> None:
        choice("collect.on_error", self.on_error, ("stop", "skip"))
        require(self.limit >= 0, f"collect.limit={self.limit} must be 0 (all) or a number of rows")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Duplicates by the whole ``row`` or by the ``prompt``; near duplicates by MinHash over ``shingle`` words.

    Two rows are near duplicates at an estimated Jaccard similarity of ``threshold``, and with ``same_numbers`` only if
    their prompts have the same numbers: a problem with other numbers is another problem.
    """

    key: str = "row"
    near: bool = True
    shingle: int = 5
    permutations: int = 64
    bands: int = 16
    threshold: float = 0.8
    same_numbers: bool = True

    def __post_init__(self) -> None:
        choice("dedup.key", self.key, ("row", "prompt"))
        require(self.shingle >= 1, f"dedup.shingle={self.shingle} must be at least one word")
        require(0 < self.threshold <= 1, f"dedup.threshold={self.threshold} must lie between 0 and 1")
        require(
            self.bands >= 1 and self.permutations % self.bands == 0,
            f"dedup.bands={self.bands} must divide dedup.permutations={self.permutations}",
        )


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Evaluation problems that must not be trained on, recognised by the word n-grams that a row repeats.

    A row is dropped if it has the share ``threshold`` of the n-grams of a problem.  ``masked_threshold`` (0: off) is
    the same with every number masked, which finds problems with other numbers.  Problems of fewer than 4 ``n`` words
    are cut into shorter n-grams; those of fewer than ``min_words`` words must be half of the prompt.  ``fields``:
    ``prompt`` or ``row``.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    n: int = 8
    threshold: float = 0.5
    masked_threshold: float = 0.0
    min_words: int = 5
    fields: str = "prompt"

    def __post_init__(self) -> None:
        choice("decontaminate.fields", self.fields, ("prompt", "row"))
        require(1 <= self.min_words <= self.n, f"decontaminate.min_words={self.min_words} must lie in 1..n={self.n}")
        for key in ("threshold", "masked_threshold"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"decontaminate.{key}={value} must lie between 0 (off) and 1")
        require(self.threshold > 0, "decontaminate.threshold=0 would drop every row; leave the stage out instead")


@dataclass(frozen=True, kw_only=True)
class PatternsConfig:
    """Rules on a single row; see `ovr_megatron.curation.patterns` for each.

    ``max_repetition`` (1: off) bounds Open-Reasoner-Zero's repeatness of responses of at least
    ``repetition_min_characters``; ``drop`` maps names of the user's rules to regular expressions over the response.
    """

    need_box: bool = True
    need_thought: bool = True
    verifiable: bool = True
    max_repetition: float = 0.05
    repetition_min_characters: int = 400
    language: str = "any"
    max_foreign: float = 0.05
    min_function_words: float = 0.02
    template_tokens: bool = True
    min_characters: int = 0
    max_characters: int = 0
    drop: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choice("patterns.language", self.language, ("any", "en", "zh"))
        for key in ("max_repetition", "max_foreign", "min_function_words"):
            value = getattr(self, key)
            require(0 <= value <= 1, f"patterns.{key}={value} must lie between 0 and 1")
        for name, pattern in self.drop.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"patterns.drop.{name}={pattern!r} is no regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True)
class ProxyLossConfig:
    """Mean loss of the response under a small model; the high tail of each source is cut.

    ``cut``: above the ``quantile`` of the source, or ``z`` standard deviations above its mean.  Sources of fewer than
    ``min_rows`` rows are not cut.  Rows are scored on their first ``max_tokens`` tokens.
    """

    model: str | None = None
    dtype: str = "bfloat16"
    cut: str = "quantile"
    quantile: float = 0.98
    z: float = 3.0
    min_rows: int = 50
    max_tokens: int = 8192
    batch: int = 512

    def __post_init__(self) -> None:
        choice("proxy_loss.cut", self.cut, ("quantile", "zscore"))
        choice("proxy_loss.dtype", self.dtype, ("float32", "bfloat16"))
        require(0 < self.quantile <= 1, f"proxy_loss.quantile={self.quantile} must lie between 0 and 1")
        require(self.batch >= 1 and self.max_tokens >= 2, "proxy_loss.batch and proxy_loss.max_tokens must be positive")


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """Pass rate of ``samples`` responses of ``model`` at ``temperature``; prompts from ``low`` to ``high`` are kept."""

    model: str | None = None
    dtype: str = "bfloat16"
    samples: int = 8
    temperature: float = 1.0
    max_tokens: int = 8192
    low: float = 0.01
    high: float = 0.99

    def __post_init__(self) -> None:
        choice("difficulty.dtype", self.dtype, ("float32", "bfloat16"))
        require(
            self.samples >= 1 and self.max_tokens >= 1, "difficulty.samples and difficulty.max_tokens must be positive"
        )
        require(self.temperature > 0, f"difficulty.temperature={self.temperature} must be positive")
        require(
            0 <= self.low <= self.high <= 1,
            f"difficulty.low={self.low} and difficulty.high={self.high} must be rates, low at most high",
        )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Grading of responses against the row's answer; ``need_answer`` drops rows without an answer."""

    need_answer: bool = False


@dataclass(frozen=True, kw_only=True)
class StratifyConfig:
    """Strata: ``bins`` of equal size of each source, by difficulty; at most ``max_rows`` rows of each (0: all).

    ``measure`` auto takes the rows' ``difficulty`` if all rows of a source have one, else the proxy loss, else the
    length of the response.
    """

    bins: int = 3
    measure: str = "auto"
    max_rows: int = 0

    def __post_init__(self) -> None:
        choice("stratify.measure", self.measure, ("auto", "difficulty", "loss", "length"))
        require(self.bins >= 1, f"stratify.bins={self.bins} must be at least 1")
        require(self.max_rows >= 0, f"stratify.max_rows={self.max_rows} must be 0 (all) or a number of rows")


@dataclass(frozen=True, kw_only=True)
class WeighConfig:
    """A stratum of n rows gets a share of n**``power``; a row's weight stays between ``min_weight`` and ``max_weight``.

    ``power`` 1 changes nothing, 0 gives all strata the same share.  The mean weight of all rows is 1.
    """

    power: float = 0.5
    min_weight: float = 0.25
    max_weight: float = 4.0

    def __post_init__(self) -> None:
        require(0 <= self.power <= 1, f"weigh.power={self.power} must lie between 0 and 1")
        require(
            0 < self.min_weight <= 1 <= self.max_weight,
            f"weigh.min_weight={self.min_weight} and weigh.max_weight={self.max_weight} must lie on both sides of 1",
        )


def check_endpoint(config: Any, setting: str) -> None:
    """Refuse numbers out of range in a `TeacherConfig`, or in another configuration with fields of the same names.

    Raises:
        ConfigError: names the setting, spelled by the pattern ``setting``.
    """
    for key, largest in _POSITIVE.items():
        value = getattr(config, key, 1)
        require(0 < value <= largest, f"{setting.format(key)}={value} must be positive and at most {largest:,}")
    for key, largest in _FROM_ZERO.items():
        value = getattr(config, key, 0)
        require(0 <= value <= largest, f"{setting.format(key)}={value} must be 0 or more and at most {largest:,}")


def check_url(url: str, name: str, has_key: bool, allow_http: bool, remedy: str) -> None:
    """Refuse an address that would reveal a secret, in the files into which it is written or on the network.

    Args:
        url: address of an endpoint.
        name: name of the setting, for messages.
        has_key: whether a key is sent there.
        allow_http: whether the key may go unencrypted to another machine.
        remedy: setting that allows that, for messages.

    Raises:
        ConfigError: names the setting; the message never shows the secret.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        parts.port  # noqa: B018 - raises for a port that is no number
    except ValueError as error:
        raise ConfigError(f"{name} is no address ({error}); give https://HOST/v1") from None
    require(parts.scheme in ("http", "https") and bool(host), f"{name} is no address; give https://HOST/v1")
    by_key = "name an environment variable that holds it with key_env"
    require("@" not in parts.netloc, f"{name} has a password in it (at {host}), which would stand in files; {by_key}")
    secret = [key for key, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(key)]
    require(not secret, f"{name} has {'/'.join(secret)} in its query, which would stand in files; {by_key}")
    require(
        not has_key or parts.scheme == "https" or allow_http or _is_local(host),
        f"{name}: a key would go unencrypted to {host}; use https, or allow it with {remedy}",
    )


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher of the prompt rows: an OpenAI-compatible endpoint (``base_url``), or a local ``model`` in vLLM.

    The key is read from the environment variable ``key_env`` and written into the request only, over https unless
    ``allow_http`` is set.  ``timeout_s`` bounds a request from its first to its last byte, and ``max_backoff_s`` every
    wait between two requests, including one that the endpoint demands.  ``max_requests`` and ``max_total_tokens`` are
    the budget of all runs in this folder (0: unlimited).
    """

    base_url: str | None = None
    model: str | None = None
    key_env: str | None = None
    allow_http: bool = False
    dtype: str = "bfloat16"
    samples: int = 1
    temperature: float = 0.6
    max_tokens: int = 16384
    keep_truncated: bool = False
    concurrency: int = 32
    attempts: int = 6
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    timeout_s: float = 1800.0
    max_requests: int = 0
    max_total_tokens: int = 0

    def __post_init__(self) -> None:
        choice("teacher.dtype", self.dtype, ("float32", "bfloat16"))
        check_endpoint(self, "teacher.{}")
        if self.base_url:
            check_url(self.base_url, "teacher.base_url", bool(self.key_env), self.allow_http, "teacher.allow_http=true")


PREPARE_STAGES = tuple(
    "collect dedup decontaminate teacher patterns proxy_loss verify difficulty stratify weigh tokenise".split()
)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Data preparation: ``stages`` in this order, each in its own folder below ``dir``.

    ``model`` is the folder whose tokenizer writes the tokenised set.  ``workers`` processes examine rows, and
    ``engines`` processes, one for each GPU, run vLLM in stages that need it.  A stage that keeps no row of some source
    stops the preparation, unless ``allow_empty``.
    """

    dir: str
    stages: list[str] = field(default_factory=list)
    seed: int = 1
    workers: int = 1
    engines: int = 1
    allow_empty: bool = False
    model: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    patterns: PatternsConfig = field(default_factory=PatternsConfig)
    proxy_loss: ProxyLossConfig = field(default_factory=ProxyLossConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    difficulty: DifficultyConfig = field(default_factory=DifficultyConfig)
    stratify: StratifyConfig = field(default_factory=StratifyConfig)
    weigh: WeighConfig = field(default_factory=WeighConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        for name in self.stages:
            choice("stages[]", name, PREPARE_STAGES)
        require(self.stages[:1] == ["collect"], f"stages={self.stages} must begin with collect")
        require(len(set(self.stages)) == len(self.stages), f"stages={self.stages} names a stage twice")
        order = {name: index for index, name in enumerate(self.stages)}
        require(
            "weigh" not in order or order.get("stratify", len(order)) < order["weigh"],
            f"stages={self.stages}: weigh needs stratify before it",
        )
        require("tokenise" not in order or self.stages[-1] == "tokenise", "stages: tokenise must be the last")
        require(self.workers >= 1 and self.engines >= 1, "workers and engines must be at least 1")
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


forbid_unknown_keys(globals())
