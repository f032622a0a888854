"""Every setting of the project: schema, defaults and validation.

The YAML files under ``recipes/`` hold values only; each is merged onto one of the root
dataclasses here (`ColdStartConfig`, `RLConfig`, `PrepareConfig`), so an unknown key or a value of the
wrong type stops the run before anything is loaded.  All dataclasses are frozen.
"""

from __future__ import annotations

import dataclasses
import re
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


FORMATS = ("auto", "messages", "orz", "verl", "llava", "mathvision", "puzzlevqa")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of rows.

    ``path`` is a JSONL, JSON or parquet file, a folder, a hub data set name, or ``puzzle:KIND`` for a
    generated stream.  ``weight`` is its share of the mixture; of a tokenised set, how often an epoch has each row.
    ``image_root`` bounds the images that its rows may name (default: the folder of the file).
    """

    path: str
    weight: float = 1.0
    format: str = "auto"
    image_root: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        _choice("data.sources[].format", self.format, FORMATS)
        _require(self.weight > 0, f"data.sources[].weight={self.weight} of {self.path} must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become tokens; one image budget for trainer, engine and export.

    Rows come from ``sources``, or for the cold start from ``tokenised``, a folder that ``tools/tokenise.py`` wrote.
    ``on_error``: a row that cannot be used stops the run, or is skipped, counted and listed.
    ``mean_tokens`` and ``expected_samples`` are what `tools/plan.py` expects where it has no data to look at.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    tokenised: str | None = None
    on_error: str = "stop"
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
    mean_tokens: int = 0
    expected_samples: int = 0

    def __post_init__(self) -> None:
        _choice("data.template", self.template, ("think", "model"))
        _choice("data.on_error", self.on_error, ("stop", "skip"))
        _require(
            not self.tokenised or not (self.sources or self.exclude),
            f"data.tokenised={self.tokenised} replaces data.sources and data.exclude; remove one or the other",
        )
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
class RolloutConfig:
    """vLLM: its layout, its memory and how it samples.

    ``schedule``: ``static`` gives every engine the same number of prompts at once, so that a run that is repeated draws
    the same batches; ``shared`` has each take the next prompt when it has room, which ends sooner where lengths differ.
    ``bucket_mib``: new weights travel to the engines in buckets of this size, two at a time; ``check_updates`` compares
    checksums of every slice.
    """

    tp: int = 1
    schedule: str = "static"
    temperature: float = 1.0
    top_p: float = 1.0
    max_num_seqs: int = 256
    max_model_len: int = 0
    kv_cache_gib: float = 0.0
    gpu_memory_utilization: float = 0.5
    stop: list[str] = field(default_factory=list)
    enforce_eager: bool = False
    mismatch_warning: float = 0.05
    bucket_mib: float = 256.0
    check_updates: bool = False

    def __post_init__(self) -> None:
        _require(self.bucket_mib > 0, f"rollout.bucket_mib={self.bucket_mib} must be positive")
        _require(self.temperature > 0, f"rollout.temperature={self.temperature} must be positive")
        _require(
            self.top_p == 1.0,
            f"rollout.top_p={self.top_p}: the trainer scores the whole distribution, so sampling must too; use 1.0",
        )
        _choice("rollout.schedule", self.schedule, ("static", "shared"))
        _require(self.tp >= 1, f"rollout.tp={self.tp} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Problem sets that the live weights answer every ``every`` steps or iterations, and at the end (0: never).

    ``limit`` takes the first problems of each set (0: all).  Greedy responses of at most ``max_tokens`` are scored;
    ``samples`` more at temperature 1 give pass@k.  ``workers`` processes grade.
    """

    every: int = 0
    sources: list[SourceConfig] = field(default_factory=list)
    limit: int = 0
    max_tokens: int = 1024
    samples: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        for key in ("every", "limit", "samples"):
            _require(getattr(self, key) >= 0, f"evaluation.{key}={getattr(self, key)} must be 0 or more")
        _require(self.max_tokens > 0 and self.workers > 0, "evaluation.max_tokens and .workers must be positive")
        _require(
            not self.every or bool(self.sources),
            f"evaluation.every={self.every} has nothing to ask: give evaluation.sources=[{{path: FILE, name: NAME}}]",
        )
        names = [source.name or "" for source in self.sources]
        for source, name in zip(self.sources, names, strict=True):
            _require(
                bool(re.fullmatch(r"[\w.-]+", name)),
                f"evaluation.sources: {source.path} is called {name!r}; give it a name of letters, digits, - _ or .",
            )
            _require(names.count(name) == 1, f"evaluation.sources: two sets are called {name}; name one of them anew")


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Stage 1: supervised training on packed samples (paper, section 3.1).

    ``steps=0``: as many as ``epochs`` take, which needs ``data.tokenised``.  ``rollout`` is the engine of
    ``evaluation``, which is started only for that.
    """

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    steps: int = 900
    epochs: int = 5
    packs_per_step: int = 640

    def __post_init__(self) -> None:
        _check_pack(self.data, self.parallel)
        _require(self.steps >= 0, f"steps={self.steps} must be positive, or 0 to train for {self.epochs} epochs")
        _require(self.epochs > 0, f"epochs={self.epochs} must be positive")
        _require(
            self.steps > 0 or not self.data.sources,
            "steps=0 with data.sources: only the epochs of data.tokenised=DIR have an end; give steps",
        )
        _require(self.packs_per_step > 0, f"packs_per_step={self.packs_per_step} must be positive")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the length curriculum: up to iteration ``until``, ``max_tokens`` of prompt and response together.

    ``mean_tokens`` is what `tools/plan.py` expects of their mean; 0: a third of the limit.
    """

    until: int
    max_tokens: int
    mean_tokens: int = 0

    def __post_init__(self) -> None:
        _require(self.until > 0 and self.max_tokens > 0, "curriculum[].until and .max_tokens must be positive")


ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce_pp")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What the policy learns from.  The defaults are the paper's PPO (section 3.2); docs/algorithms.md has the rest.

    ``estimator``: of the advantage; all but ``gae`` go without a critic.  ``clip_high`` (0: as ``clip``) is the upper
    bound of the ratio alone.  ``reduction``: what weighs the same, every ``token``, every response (``sequence``),
    every token by a ``constant`` divisor, or every ``pack``.  With ``policy_epochs`` or ``policy_steps`` (of an epoch)
    over 1 the log-probabilities before the update are stored.  ``kl_coefficient`` holds the policy to the weights in
    ``reference`` (none: those that it began with) by an estimate of ``kl_form``, in the ``loss`` or taken from the
    ``reward`` (``kl_in``).  ``importance_cap`` (0: off) weighs each token by the trainer's probability over the rollout
    engine's, up to this cap.  ``dynamic_sampling`` (0: off) is how many times prompts are drawn until enough have
    responses that differ in reward.  ``overlong_buffer``: the last tokens before the limit, which cost up to 1.
    """

    estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    clip: float = 0.2
    clip_high: float = 0.0
    value_clip: float = 0.0
    reduction: str = "token"
    critic_steps: int = 4
    critic_warmup_iterations: int = 0
    policy_epochs: int = 1
    policy_steps: int = 1
    kl_coefficient: float = 0.0
    kl_form: str = "k3"
    kl_in: str = "loss"
    reference: str | None = None
    entropy_bonus: float = 0.0
    importance_cap: float = 0.0
    dynamic_sampling: int = 0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        _choice("algorithm.estimator", self.estimator, ESTIMATORS)
        _choice("algorithm.reduction", self.reduction, ("token", "sequence", "constant", "pack"))
        _choice("algorithm.kl_form", self.kl_form, ("k1", "k2", "k3"))
        _choice("algorithm.kl_in", self.kl_in, ("loss", "reward"))
        _require(0 < self.clip < 1, f"algorithm.clip={self.clip} must lie between 0 and 1")
        _require(0 < self.gamma <= 1 and 0 <= self.lam <= 1, "algorithm.gamma and algorithm.lam must lie in 0..1")
        for key in ("critic_steps", "policy_epochs", "policy_steps"):
            _require(getattr(self, key) >= 1, f"algorithm.{key}={getattr(self, key)} must be at least 1")
        for key in ("clip_high", "kl_coefficient", "importance_cap", "dynamic_sampling", "overlong_buffer"):
            _require(getattr(self, key) >= 0, f"algorithm.{key}={getattr(self, key)} must be 0 (off) or more")
        _require(
            self.estimator == "gae" or not self.critic_warmup_iterations,
            f"algorithm.critic_warmup_iterations={self.critic_warmup_iterations}: {self.estimator} has no critic",
        )
        _require(
            self.kl_form != "k1" or self.kl_in == "reward" or not self.kl_coefficient,
            "algorithm.kl_form=k1 in the loss has the gradient of the policy's own log-probability, which is none of "
            "the divergence; use k2 or k3, or algorithm.kl_in=reward",
        )

    @property
    def has_critic(self) -> bool:
        """Whether the estimator needs values."""
        return self.estimator == "gae"

    @property
    def in_groups(self) -> bool:
        """Whether the estimator compares the responses to one prompt."""
        return self.estimator in ("grpo", "dr_grpo", "rloo")

    @property
    def most_steps(self) -> int:
        """Into how many steps a batch is cut, at most."""
        return max(self.policy_steps, self.critic_steps if self.has_critic else 1)

    @property
    def scoring_passes(self) -> int:
        """Forward passes over the responses beside the updates, for old and for reference log-probabilities."""
        in_reward = bool(self.kl_coefficient) and self.kl_in == "reward"
        return int(self.policy_updates > 1 or in_reward) + bool(self.kl_coefficient)

    @property
    def policy_updates(self) -> int:
        """Optimizer steps of the policy in an iteration."""
        return self.policy_epochs * self.policy_steps


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The separate value network: same class, another head, its own optimizer; ``parallel``: its own layout."""

    path: str | None = None
    parallel: ParallelConfig | None = None
    head_init: str = "orz"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))

    def __post_init__(self) -> None:
        _choice("critic.head_init", self.head_init, ("orz", "kaiming", "paper"))


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Graders: how many workers, how long one verdict may take and how much memory, and how many are remembered.

    ``rules``: by source, what makes a response right (`ovr_megatron.rewards.rules.rule`); ``auto`` where none is given.
    """

    workers: int = 2
    timeout_s: float = 5.0
    memory_mib: int = 1024
    cache: int = 65536
    rules: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"reward.workers={self.workers} must be at least 1")
        _require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")
        _require(self.memory_mib >= 256, f"reward.memory_mib={self.memory_mib} must be at least 256, for SymPy's sake")
        _require(self.cache >= 0, f"reward.cache={self.cache} must be 0 (off) or a number of verdicts")


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Stage 2: PPO with verifiable rewards.

    ``only`` runs half of the system: ``rollout`` generates and grades with the weights of ``model.path``, ``train``
    learns from the rollouts of the run folder ``rollouts_from``; ``rehearsal`` tries each stage of the curriculum once.
    ``offload``: what a phase does not need, weights, gradients and optimizer state, waits in host memory.
    """

    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    curriculum: list[StageConfig] = field(default_factory=list)
    iterations: int = 900
    prompts: int = 512
    responses: int = 16
    offload: bool = False
    only: str = "all"
    rollouts_from: str | None = None

    def __post_init__(self) -> None:
        _check_pack(self.data, self.parallel)
        _require(
            self.responses > 1 or not (self.algorithm.in_groups or self.algorithm.dynamic_sampling),
            f"responses={self.responses}: algorithm.estimator={self.algorithm.estimator} and dynamic_sampling compare "
            "the responses to one prompt; take 2 or more",
        )
        shortest = min((stage.max_tokens for stage in self.curriculum), default=0)
        _require(
            self.algorithm.overlong_buffer < shortest or not self.algorithm.overlong_buffer,
            f"algorithm.overlong_buffer={self.algorithm.overlong_buffer} must be under the shortest limit of the "
            f"curriculum, {shortest}",
        )
        _require(self.iterations > 0, f"iterations={self.iterations} must be positive")
        _require(self.prompts > 0 and self.responses > 0, "prompts and responses must be positive")
        _choice("only", self.only, ("all", "rollout", "train", "rehearsal"))
        _require(
            (self.only == "train") == bool(self.rollouts_from),
            f"only={self.only} with rollouts_from={self.rollouts_from}: only=train needs the run folder to learn from, "
            "and nothing else takes one",
        )
        _require(bool(self.curriculum), "curriculum is empty: give at least one {until, max_tokens}")
        ends = [stage.until for stage in self.curriculum]
        _require(ends == sorted(set(ends)), f"curriculum: 'until' must rise, got {ends}")
        _require(
            ends[-1] >= self.iterations,
            f"curriculum ends at iteration {ends[-1]} but iterations={self.iterations}; raise the last 'until'",
        )


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Reading the sources.  ``limit`` takes the first rows of each (0: all); ``on_error`` skip counts a bad row."""

    limit: int = 0
    on_error: str = "stop"

    def __post_init__(self) -> None:
        _choice("collect.on_error", self.on_error, ("stop", "skip"))
        _require(self.limit >= 0, f"collect.limit={self.limit} must be 0 (all) or a number of rows")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Duplicates of the whole ``row`` or of the ``prompt``; near ones by MinHash over ``shingle`` words.

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
        _choice("dedup.key", self.key, ("row", "prompt"))
        _require(self.shingle >= 1, f"dedup.shingle={self.shingle} must be at least one word")
        _require(0 < self.threshold <= 1, f"dedup.threshold={self.threshold} must lie between 0 and 1")
        _require(
            self.bands >= 1 and self.permutations % self.bands == 0,
            f"dedup.bands={self.bands} must divide dedup.permutations={self.permutations}",
        )


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Evaluation problems that must not come up: word n-grams of theirs that a row repeats.

    A row goes if it has ``threshold`` of the n-grams of one problem; ``masked_threshold`` (0: off) is the same with
    every number masked, which finds problems with exchanged numbers.  Problems shorter than 4 ``n`` words are cut into
    shorter n-grams, those shorter than ``min_words`` must make half of the prompt.  ``fields``: ``prompt`` or ``row``.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    n: int = 8
    threshold: float = 0.5
    masked_threshold: float = 0.0
    min_words: int = 5
    fields: str = "prompt"

    def __post_init__(self) -> None:
        _choice("decontaminate.fields", self.fields, ("prompt", "row"))
        _require(1 <= self.min_words <= self.n, f"decontaminate.min_words={self.min_words} must lie in 1..n={self.n}")
        for key in ("threshold", "masked_threshold"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"decontaminate.{key}={value} must lie between 0 (off) and 1")
        _require(self.threshold > 0, "decontaminate.threshold=0 would drop every row; leave the stage out instead")


@dataclass(frozen=True, kw_only=True)
class PatternsConfig:
    """Rules on one row alone; see `ovr_megatron.curation.patterns` for each.

    ``max_repetition`` bounds Open-Reasoner-Zero's repeatness of responses of at least ``repetition_min_characters``
    (1: off); ``drop`` maps names of own rules to regular expressions over the response.
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
        _choice("patterns.language", self.language, ("any", "en", "zh"))
        for key in ("max_repetition", "max_foreign", "min_function_words"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"patterns.{key}={value} must lie between 0 and 1")
        for name, pattern in self.drop.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"patterns.drop.{name}={pattern!r} is no regular expression ({error})") from None


@dataclass(frozen=True, kw_only=True)
class ProxyLossConfig:
    """Mean loss of the response under a small model; the high tail of each source is cut.

    ``cut``: above the ``quantile`` of the source, or ``z`` standard deviations over its mean.  Sources of fewer than
    ``min_rows`` rows lose none.  Rows are scored on their first ``max_tokens`` tokens.
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
        _choice("proxy_loss.cut", self.cut, ("quantile", "zscore"))
        _choice("proxy_loss.dtype", self.dtype, ("float32", "bfloat16"))
        _require(0 < self.quantile <= 1, f"proxy_loss.quantile={self.quantile} must lie between 0 and 1")
        _require(
            self.batch >= 1 and self.max_tokens >= 2, "proxy_loss.batch and proxy_loss.max_tokens must be positive"
        )


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig:
    """Pass rate of a prompt: ``samples`` responses of ``model`` at ``temperature``; kept from ``low`` to ``high``."""

    model: str | None = None
    dtype: str = "bfloat16"
    samples: int = 8
    temperature: float = 1.0
    max_tokens: int = 8192
    low: float = 0.01
    high: float = 0.99

    def __post_init__(self) -> None:
        _choice("difficulty.dtype", self.dtype, ("float32", "bfloat16"))
        _require(
            self.samples >= 1 and self.max_tokens >= 1, "difficulty.samples and difficulty.max_tokens must be positive"
        )
        _require(self.temperature > 0, f"difficulty.temperature={self.temperature} must be positive")
        _require(
            0 <= self.low <= self.high <= 1,
            f"difficulty.low={self.low} and difficulty.high={self.high} must be rates, low at most high",
        )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """The last box of the response against the row's answer; ``need_answer`` drops rows that have none."""

    need_answer: bool = False


@dataclass(frozen=True, kw_only=True)
class StratifyConfig:
    """Strata: the source, cut into ``bins`` of equal size by difficulty; at most ``max_rows`` of each (0: all).

    ``measure`` auto takes the row's own ``difficulty`` where all rows of a source have one, else the proxy's loss, else
    the length of the response.
    """

    bins: int = 3
    measure: str = "auto"
    max_rows: int = 0

    def __post_init__(self) -> None:
        _choice("stratify.measure", self.measure, ("auto", "difficulty", "loss", "length"))
        _require(self.bins >= 1, f"stratify.bins={self.bins} must be at least 1")
        _require(self.max_rows >= 0, f"stratify.max_rows={self.max_rows} must be 0 (all) or a number of rows")


@dataclass(frozen=True, kw_only=True)
class WeighConfig:
    """A stratum of n rows gets a share of n**``power``; a row's weight stays between ``min_weight`` and ``max_weight``.

    ``power`` 1 changes nothing, 0 gives all strata the same share.  The mean weight of all rows is 1.
    """

    power: float = 0.5
    min_weight: float = 0.25
    max_weight: float = 4.0

    def __post_init__(self) -> None:
        _require(0 <= self.power <= 1, f"weigh.power={self.power} must lie between 0 and 1")
        _require(
            0 < self.min_weight <= 1 <= self.max_weight,
            f"weigh.min_weight={self.min_weight} and weigh.max_weight={self.max_weight} must lie on both sides of 1",
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Who answers the prompt rows: an OpenAI-compatible endpoint (``base_url``), or a local ``model`` through vLLM.

    The key is read from the environment variable ``key_env`` and goes nowhere but into the request.  ``max_requests``
    and ``max_total_tokens`` are the budget of all runs in this folder (0: none).
    """

    base_url: str | None = None
    model: str | None = None
    key_env: str | None = None
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
        _choice("teacher.dtype", self.dtype, ("float32", "bfloat16"))
        _require(self.temperature >= 0, f"teacher.temperature={self.temperature} must be 0 or more")
        for key in ("samples", "max_tokens", "concurrency", "attempts", "timeout_s"):
            _require(getattr(self, key) > 0, f"teacher.{key}={getattr(self, key)} must be positive")
        for key in ("backoff_s", "max_backoff_s", "max_requests", "max_total_tokens"):
            _require(getattr(self, key) >= 0, f"teacher.{key}={getattr(self, key)} must be 0 or more")


PREPARE_STAGES = tuple(
    "collect dedup decontaminate teacher patterns proxy_loss verify difficulty stratify weigh tokenise".split()
)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Data preparation: ``stages`` in this order, each in its own folder below ``dir``.

    ``model`` is the folder whose tokenizer writes the tokenised set; ``workers`` processes judge rows, ``engines``
    processes run vLLM where a stage needs it (one for each GPU).
    """

    dir: str
    stages: list[str] = field(default_factory=list)
    seed: int = 1
    workers: int = 1
    engines: int = 1
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
            _choice("stages[]", name, PREPARE_STAGES)
        _require(self.stages[:1] == ["collect"], f"stages={self.stages} must begin with collect")
        _require(len(set(self.stages)) == len(self.stages), f"stages={self.stages} names a stage twice")
        order = {name: place for place, name in enumerate(self.stages)}
        _require(
            "weigh" not in order or order.get("stratify", len(order)) < order["weigh"],
            f"stages={self.stages}: weigh needs stratify before it",
        )
        _require("tokenise" not in order or self.stages[-1] == "tokenise", "stages: tokenise must be the last")
        _require(self.workers >= 1 and self.engines >= 1, "workers and engines must be at least 1")
        _require(bool(self.data.sources), "data.sources is empty: give at least one, for example [{path: rows.jsonl}]")
        _require("decontaminate" not in order or bool(self.decontaminate.sources), "decontaminate.sources is empty")
        needed = {"proxy_loss": self.proxy_loss.model, "teacher": self.teacher.model, "tokenise": self.model}
        needed["difficulty"] = self.difficulty.model
        for name, value in needed.items():
            key = "model" if name == "tokenise" else f"{name}.model"
            _require(name not in order or bool(value), f"stages has {name}: give {key}=...")


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
