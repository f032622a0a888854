"""Every setting of the project: schema, defaults and validation.

The YAML files under ``recipes/`` hold values only; each is merged onto one of the two root
dataclasses here (`ColdStartConfig`, `RLConfig`), so an unknown key or a value of the
wrong type stops the run before anything is loaded.  All dataclasses are frozen.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError


class ConfigError(ValueError):
    """A setting that cannot work; the message names the key, its value and what to change."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{key}={value!r} is not known; choose one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of rows.

    ``path`` is a JSONL, JSON or parquet file, a folder, a hub data set name, or ``puzzle:KIND`` for a
    generated stream.  ``weight`` is its share of the mixture.  ``image_root`` bounds the images that its
    rows may name (default: the folder of the file).
    """

    path: str
    weight: float = 1.0
    format: str = "auto"
    image_root: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        _choice("data.sources[].format", self.format, ("auto", "messages", "orz", "mathvision", "puzzlevqa"))
        _require(self.weight > 0, f"data.sources[].weight={self.weight} of {self.path} must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become tokens; one image budget for trainer, engine and export."""

    sources: list[SourceConfig] = field(default_factory=list)
    template: str = "think"
    min_pixels: int = 3136
    max_pixels: int = 1003520
    max_images: int = 8
    max_frames: int = 16
    max_image_bytes: int = 50_000_000
    max_image_pixels: int = 100_000_000
    pack_tokens: int = 65536
    max_prompt_tokens: int = 8192
    exclude: str | None = None

    def __post_init__(self) -> None:
        _choice("data.template", self.template, ("think", "model"))
        _require(
            0 < self.min_pixels <= self.max_pixels,
            f"data.min_pixels={self.min_pixels} must be positive and at most data.max_pixels={self.max_pixels}",
        )
        for key in ("max_images", "max_frames", "pack_tokens", "max_prompt_tokens"):
            _require(getattr(self, key) > 0, f"data.{key}={getattr(self, key)} must be positive")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Initial weights, their number format, and which parts train.

    ``path`` is a Hugging Face Qwen2.5-VL directory or one of our checkpoints.  ``recompute`` names the activations
    that the backward pass computes again: ``selective`` those of the perceptrons (attention keeps none that grow
    with the square of the length), ``full`` those of whole layers.  ``layers``: Transformer Engine's where it is
    installed, or ours.  ``fp8``: the scaling recipe of the language model's matrix products, with
    ``fp8_bf16_layers`` at its beginning and at its end left in bfloat16.
    """

    path: str
    dtype: str = "float32"
    freeze_vision: bool = False
    freeze_merger: bool = False
    freeze_language: bool = False
    recompute: str = "none"
    layers: str = "auto"
    fp8: str = "none"
    fp8_bf16_layers: int = 0

    def __post_init__(self) -> None:
        _choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        _choice("model.recompute", self.recompute, ("none", "selective", "full"))
        _choice("model.layers", self.layers, ("auto", "local", "transformer_engine"))
        _choice("model.fp8", self.fp8, ("none", "delayed", "current", "block"))
        _require(
            self.fp8 == "none" or (self.dtype == "bfloat16" and self.layers != "local"),
            f"model.fp8={self.fp8} needs model.dtype=bfloat16 and Transformer Engine's layers",
        )
        _require(
            self.fp8 != "delayed" or not self.fp8_bf16_layers,
            f"model.fp8_bf16_layers={self.fp8_bf16_layers}: delayed scaling is for all layers; use current or block",
        )
        _require(
            self.fp8_bf16_layers >= 0, f"model.fp8_bf16_layers={self.fp8_bf16_layers} must be 0 or a number of layers"
        )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Layout of one model over the ranks; what is left of the world size is data parallel.

    ``vpp`` cuts each pipeline stage into that many interleaved parts.  ``first_stage_layers`` and
    ``last_stage_layers`` (0: the same as the others) make room for the vision tower and the head.
    ``distributed_optimizer`` shards Adam's moments over the data-parallel ranks; ``overlap`` hides gradient (and with
    it parameter) traffic behind the computation.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    first_stage_layers: int = 0
    last_stage_layers: int = 0
    distributed_optimizer: bool = False
    overlap: bool = False

    def __post_init__(self) -> None:
        for key in ("tp", "pp", "vpp", "cp"):
            _require(getattr(self, key) >= 1, f"parallel.{key}={getattr(self, key)} must be at least 1")
        _require(
            not self.sequence_parallel or self.tp > 1,
            "parallel.sequence_parallel=true needs parallel.tp of at least 2",
        )
        for key in ("first_stage_layers", "last_stage_layers"):
            count = getattr(self, key)
            _require(count >= 0, f"parallel.{key}={count} must be 0 (even) or a number of layers")
            _require(not count or self.pp > 1, f"parallel.{key}={count} needs parallel.pp of at least 2")
        _require(self.vpp == 1 or self.pp > 1, f"parallel.vpp={self.vpp} needs parallel.pp of at least 2")

    @property
    def ranks(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.pp * self.cp

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size in a world of ``world_size`` ranks, or `ConfigError` if it does not divide."""
        ranks = self.ranks
        _require(
            world_size % ranks == 0,
            f"{world_size} processes cannot be cut into tp={self.tp} x pp={self.pp} x cp={self.cp} = {ranks} ranks "
            f"a replica; start a multiple of {ranks} processes or change parallel.*",
        )
        return world_size // ranks


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.  ``warmup_steps`` counts optimizer steps.

    ``wsd`` warms up, stays, and decays linearly over the last ``decay_share`` of all steps.  A step whose gradient is
    not finite, or whose norm is above ``skip_above`` (0: no bound), is skipped and counted; ``stop_after_skipped`` of
    them in a row end the run.
    """

    lr: float = 1e-6
    min_lr_ratio: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 50
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    decay_share: float = 0.1
    skip_above: float = 0.0
    stop_after_skipped: int = 10

    def __post_init__(self) -> None:
        _choice("optimizer.schedule", self.schedule, ("constant", "cosine", "linear", "wsd"))
        _require(self.lr > 0, f"optimizer.lr={self.lr} must be positive")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must be 0 or more")
        _require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optimizer.beta1 and optimizer.beta2 must lie in 0..1")
        _require(0 <= self.min_lr_ratio <= 1, f"optimizer.min_lr_ratio={self.min_lr_ratio} must lie in 0..1")
        _require(0 < self.decay_share <= 1, f"optimizer.decay_share={self.decay_share} must be above 0 and at most 1")
        _require(self.skip_above >= 0, f"optimizer.skip_above={self.skip_above} must be 0 (no bound) or a norm")
        _require(
            self.stop_after_skipped >= 1,
            f"optimizer.stop_after_skipped={self.stop_after_skipped} must be at least 1 step",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, what is written to it, and when a run counts as ill (``docs/running.md``).

    Of the checkpoints the ``keep_last`` newest stay (0: all) and every one whose step is a multiple of ``keep_every``.
    With ``async_save`` they are written while training goes on, from copies that take at most ``save_buffer_gib`` of
    host memory on a rank.  ``peak_tflops`` (0: measured at the start) is what ``perf/mfu`` refers to.
    """

    dir: str
    seed: int = 1
    save_every: int = 100
    keep_last: int = 0
    keep_every: int = 0
    async_save: bool = True
    save_buffer_gib: float = 4.0
    stop_on_failed_save: bool = False
    log_every: int = 1
    threads: int = 0
    hang_timeout_s: float = 3600.0
    peak_tflops: float = 0.0
    spike_deviations: float = 6.0
    spike_window: int = 64

    def __post_init__(self) -> None:
        for key in ("save_every", "log_every", "save_buffer_gib", "spike_window"):
            _require(getattr(self, key) > 0, f"run.{key}={getattr(self, key)} must be positive")
        for key, zero in (
            ("keep_last", "keep all"),
            ("keep_every", "none"),
            ("hang_timeout_s", "no watchdog"),
            ("peak_tflops", "measure"),
            ("spike_deviations", "no record"),
        ):
            _require(getattr(self, key) >= 0, f"run.{key}={getattr(self, key)} must be 0 ({zero}) or more")


def _check_pack(data: DataConfig, parallel: ParallelConfig) -> None:
    chunks = 2 * parallel.cp if parallel.cp > 1 else 1
    _require(
        data.pack_tokens >= chunks,
        f"data.pack_tokens={data.pack_tokens} is shorter than two chunks for each of parallel.cp={parallel.cp} ranks; "
        f"use at least {chunks} tokens or cp={max(1, data.pack_tokens // 2)}",
    )


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Stage 1: supervised training on packed samples (paper, section 3.1)."""

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = 900
    packs_per_step: int = 640

    def __post_init__(self) -> None:
        _check_pack(self.data, self.parallel)
        _require(self.steps > 0, f"steps={self.steps} must be positive")
        _require(self.packs_per_step > 0, f"packs_per_step={self.packs_per_step} must be positive")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """vLLM: its layout, its memory and how it samples."""

    tp: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_num_seqs: int = 256
    max_model_len: int = 0
    kv_cache_gib: float = 0.0
    gpu_memory_utilization: float = 0.5
    stop: list[str] = field(default_factory=list)
    enforce_eager: bool = False
    mismatch_warning: float = 0.05

    def __post_init__(self) -> None:
        _require(self.temperature > 0, f"rollout.temperature={self.temperature} must be positive")
        _require(
            self.top_p == 1.0,
            f"rollout.top_p={self.top_p}: the trainer scores the whole distribution, so sampling must too; use 1.0",
        )
        _require(self.tp >= 1, f"rollout.tp={self.tp} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the length curriculum: up to iteration ``until``, ``max_tokens`` of prompt and response together."""

    until: int
    max_tokens: int

    def __post_init__(self) -> None:
        _require(self.until > 0 and self.max_tokens > 0, "curriculum[].until and .max_tokens must be positive")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """PPO as in the paper's section 3.2; see `ovr_megatron.ppo.maths` for the equations."""

    gamma: float = 1.0
    lam: float = 1.0
    clip: float = 0.2
    value_clip: float = 0.0
    reduction: str = "token"
    critic_steps: int = 4
    critic_warmup_iterations: int = 0

    def __post_init__(self) -> None:
        _choice("algorithm.reduction", self.reduction, ("token", "pack"))
        _require(0 < self.clip < 1, f"algorithm.clip={self.clip} must lie between 0 and 1")
        _require(0 < self.gamma <= 1 and 0 <= self.lam <= 1, "algorithm.gamma and algorithm.lam must lie in 0..1")
        _require(self.critic_steps >= 1, f"algorithm.critic_steps={self.critic_steps} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The separate value network: same class, another head, its own optimizer."""

    path: str | None = None
    head_init: str = "orz"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))

    def __post_init__(self) -> None:
        _choice("critic.head_init", self.head_init, ("orz", "kaiming", "paper"))


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Graders: how many workers and how long one verdict may take."""

    workers: int = 2
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"reward.workers={self.workers} must be at least 1")
        _require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Stage 2: PPO with verifiable rewards."""

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    curriculum: list[StageConfig] = field(default_factory=list)
    iterations: int = 900
    prompts: int = 512
    responses: int = 16

    def __post_init__(self) -> None:
        _check_pack(self.data, self.parallel)
        _require(
            self.algorithm.reduction == "token" or self.parallel.cp == self.parallel.vpp == 1,
            f"algorithm.reduction={self.algorithm.reduction} takes the mean of whole packs, which parallel.cp="
            f"{self.parallel.cp}, parallel.vpp={self.parallel.vpp} cut or fill up; use reduction=token",
        )
        _require(self.iterations > 0, f"iterations={self.iterations} must be positive")
        _require(self.prompts > 0 and self.responses > 0, "prompts and responses must be positive")
        _require(bool(self.curriculum), "curriculum is empty: give at least one {until, max_tokens}")
        ends = [stage.until for stage in self.curriculum]
        _require(ends == sorted(set(ends)), f"curriculum: 'until' must rise, got {ends}")
        _require(
            ends[-1] >= self.iterations,
            f"curriculum ends at iteration {ends[-1]} but iterations={self.iterations}; raise the last 'until'",
        )


def defaults(schema: type) -> dict[str, Any]:
    """Every key of ``schema`` with its default, nested; a value that must be given is ``???`` (Hydra's mark)."""
    hints: dict[str, Any] = typing.get_type_hints(schema)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(schema):
        if item.default is not dataclasses.MISSING:
            values[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            values[item.name] = _plain(item.default_factory())
        else:
            hint = hints[item.name]
            values[item.name] = defaults(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else "???"
    return values


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def build(schema: type, values: DictConfig | dict[str, Any]) -> Any:
    """Check ``values`` against the dataclass ``schema``.

    Returns:
        A frozen instance of ``schema``.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value, or a value that cannot work.
    """
    config = values if isinstance(values, DictConfig) else OmegaConf.create(values)
    missing = sorted(OmegaConf.missing_keys(config))
    _require(not missing, f"no value for {', '.join(missing)}; give it as KEY=VALUE on the command line")
    try:
        return TypeAdapter(schema).validate_python(OmegaConf.to_container(config, resolve=True))
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # one of ours, which names its key
            raise ConfigError(str(first["ctx"]["error"])) from None
        key = ".".join(str(part) for part in first["loc"]) or "config"
        raise ConfigError(f"{key}: {first['msg']} (got {first['input']!r})") from error


def save(config: Any, path: Path) -> None:
    """Write the resolved ``config`` as YAML to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))


def _forbid_unknown_keys() -> None:
    for item in list(globals().values()):
        if isinstance(item, type) and dataclasses.is_dataclass(item):
            setattr(item, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010


_forbid_unknown_keys()
