"""Settings: schema, defaults and validation; those of data preparation are in ``curation/settings.py``.

The YAML files under ``recipes/`` hold values only; each is merged onto one of the root
dataclasses (here `ColdStartConfig` and `RLConfig`), so an unknown key or a value of the
wrong type stops the run before anything is loaded.  All dataclasses are frozen.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ovr_megatron.errors import UserError
from ovr_megatron.keys import unknown_setting


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the key, its value and what to change."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(message)


def choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless the ``value`` of ``key`` is one of those ``allowed``."""
    require(value in allowed, f"{key}={value!r} is not known; choose one of {', '.join(allowed)}")


FORMATS = (
    *("auto", "messages", "orz", "verl", "llava", "alpaca", "query", "mathvision", "puzzlevqa"),
    *("math", "gpqa", "mmlu", "mmlu_pro", "mathvista", "mathverse", "dynamath", "wemath", "logicvista", "mmmu_pro"),
)


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
        choice("data.sources[].format", self.format, FORMATS)
        require(self.weight > 0, f"data.sources[].weight={self.weight} of {self.path} must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they become tokens; one image budget for trainer, engine and export.

    Rows come from ``sources``, or for the cold start from ``tokenised``, a folder that ``tools/tokenise.py`` wrote.
    ``on_error``: a row that cannot be used stops the run, or is skipped, counted and listed.
    ``template``: ``think`` writes chats with our template, whose replies begin after an opened ``<think>``, in place of
    the model folder's own; ``model`` takes the folder's.  ``without_thought``: a reply to learn that never closes the
    opened thought is an error (``refuse``), gets an empty thought (``close``), or is learned as it is (``open``).
    ``learn``: of a chat of several turns ``all`` replies are learned, or the ``last``.
    ``after_video``: positions of a text after a video go on one past the largest position (``extent``, as vLLM and
    Transformers 4 do) or after the larger side of the picture (``grid``, Transformers 5.3 and later); by default as
    the model folder says that it was trained, else ``extent``.  It is written into what is exported.
    ``mean_tokens`` and ``expected_samples`` are what `tools/plan.py` expects where it has no data to look at.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    tokenised: str | None = None
    on_error: str = "stop"
    template: str = "think"
    without_thought: str = "refuse"
    learn: str = "all"
    min_pixels: int = 3136
    max_pixels: int = 1003520
    max_images: int = 8
    max_frames: int = 16
    max_image_bytes: int = 50_000_000
    max_image_pixels: int = 100_000_000
    pack_tokens: int = 65536
    max_prompt_tokens: int = 8192
    exclude: str | None = None
    after_video: str | None = None
    mean_tokens: int = 0
    expected_samples: int = 0

    def __post_init__(self) -> None:
        choice("data.template", self.template, ("think", "model"))
        choice("data.without_thought", self.without_thought, ("refuse", "close", "open"))
        choice("data.learn", self.learn, ("all", "last"))
        choice("data.on_error", self.on_error, ("stop", "skip"))
        if self.after_video is not None:
            choice("data.after_video", self.after_video, ("grid", "extent"))
        require(
            not self.tokenised or not (self.sources or self.exclude),
            f"data.tokenised={self.tokenised} replaces data.sources and data.exclude; remove one or the other",
        )
        require(
            0 < self.min_pixels <= self.max_pixels,
            f"data.min_pixels={self.min_pixels} must be positive and at most data.max_pixels={self.max_pixels}",
        )
        for key in ("max_images", "max_frames", "pack_tokens", "max_prompt_tokens"):
            require(getattr(self, key) > 0, f"data.{key}={getattr(self, key)} must be positive")


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
        choice("model.dtype", self.dtype, ("float32", "bfloat16"))
        choice("model.recompute", self.recompute, ("none", "selective", "full"))
        choice("model.layers", self.layers, ("auto", "local", "transformer_engine"))
        choice("model.fp8", self.fp8, ("none", "delayed", "current", "block"))
        require(
            self.fp8 == "none" or (self.dtype == "bfloat16" and self.layers != "local"),
            f"model.fp8={self.fp8} needs model.dtype=bfloat16 and Transformer Engine's layers",
        )
        require(
            self.fp8 != "delayed" or not self.fp8_bf16_layers,
            f"model.fp8_bf16_layers={self.fp8_bf16_layers}: delayed scaling is for all layers; use current or block",
        )
        require(
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
            require(getattr(self, key) >= 1, f"parallel.{key}={getattr(self, key)} must be at least 1")
        require(
            not self.sequence_parallel or self.tp > 1,
            "parallel.sequence_parallel=true needs parallel.tp of at least 2",
        )
        for key in ("first_stage_layers", "last_stage_layers"):
            count = getattr(self, key)
            require(count >= 0, f"parallel.{key}={count} must be 0 (even) or a number of layers")
            require(not count or self.pp > 1, f"parallel.{key}={count} needs parallel.pp of at least 2")
        require(self.vpp == 1 or self.pp > 1, f"parallel.vpp={self.vpp} needs parallel.pp of at least 2")

    @property
    def ranks(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.pp * self.cp

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size in a world of ``world_size`` ranks, or `ConfigError` if it does not divide."""
        ranks = self.ranks
        require(
            world_size % ranks == 0,
            f"{world_size} processes cannot be cut into tp={self.tp} x pp={self.pp} x cp={self.cp} = {ranks} ranks "
            f"a replica; start a multiple of {ranks} processes or change parallel.*",
        )
        return world_size // ranks


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.  ``warmup_steps`` counts optimizer steps; ``weight_decay`` leaves out norms and biases.

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
        choice("optimizer.schedule", self.schedule, ("constant", "cosine", "linear", "wsd"))
        require(self.lr > 0, f"optimizer.lr={self.lr} must be positive")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must be 0 or more")
        require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "optimizer.beta1 and optimizer.beta2 must lie in 0..1")
        require(0 <= self.min_lr_ratio <= 1, f"optimizer.min_lr_ratio={self.min_lr_ratio} must lie in 0..1")
        require(0 < self.decay_share <= 1, f"optimizer.decay_share={self.decay_share} must be above 0 and at most 1")
        require(self.skip_above >= 0, f"optimizer.skip_above={self.skip_above} must be 0 (no bound) or a norm")
        require(
            self.stop_after_skipped >= 1,
            f"optimizer.stop_after_skipped={self.stop_after_skipped} must be at least 1 step",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run folder, what is written to it, and when a run counts as ill (``docs/running.md``).

    Of the checkpoints the ``keep_last`` newest stay (0: all) and every one whose step is a multiple of ``keep_every``.
    ``export_every`` keeps the policy of those of its multiples, and of the last, in ``exports/`` for Transformers.
    With ``async_save`` they are written while training goes on, from copies that take at most ``save_buffer_gib`` of
    host memory on a rank.  ``hang_timeout_s`` bounds every hang: a rank without an engine step, a pack or a file of
    weights for so long ends, and a collective fails that waits longer.  ``peak_tflops`` (0: measured at the start) is
    what ``perf/mfu`` refers to.
    """

    dir: str
    seed: int = 1
    save_every: int = 100
    keep_last: int = 0
    keep_every: int = 0
    export_every: int = 0
    async_save: bool = True
    save_buffer_gib: float = 4.0
    stop_on_failed_save: bool = False
    log_every: int = 1
    threads: int = 0
    hang_timeout_s: float = 1800.0
    peak_tflops: float = 0.0
    spike_deviations: float = 6.0
    spike_window: int = 64

    def __post_init__(self) -> None:
        for key in ("save_every", "log_every", "save_buffer_gib", "spike_window"):
            require(getattr(self, key) > 0, f"run.{key}={getattr(self, key)} must be positive")
        for key, zero in (
            ("keep_last", "keep all"),
            ("keep_every", "none"),
            ("export_every", "none"),
            ("hang_timeout_s", "no bound"),
            ("peak_tflops", "measure"),
            ("spike_deviations", "no record"),
        ):
            require(getattr(self, key) >= 0, f"run.{key}={getattr(self, key)} must be 0 ({zero}) or more")
        require(
            not self.export_every % self.save_every,
            f"run.export_every={self.export_every} must be a multiple of run.save_every={self.save_every}: "
            "checkpoints are what is exported",
        )


def _check_pack(data: DataConfig, parallel: ParallelConfig) -> None:
    chunks = 2 * parallel.cp if parallel.cp > 1 else 1
    require(
        data.pack_tokens >= chunks,
        f"data.pack_tokens={data.pack_tokens} is shorter than two chunks for each of parallel.cp={parallel.cp} ranks; "
        f"use at least {chunks} tokens or cp={max(1, data.pack_tokens // 2)}",
    )


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """vLLM: its layout, its memory and how it samples.

    ``schedule``: ``static`` gives every engine the same number of prompts at once, so that a run that is repeated draws
    the same batches; ``shared`` has each take the next prompt when it has room, which ends sooner where lengths differ.
    ``mismatch_warning``: an iteration in which a hundredth of the tokens' log-probabilities differ by more between
    engine and trainer is warned of.  ``bucket_mib``: new weights travel to the engines in buckets of this size, two at
    a time; ``check_updates`` compares checksums of every slice.  ``async_scheduling=false`` has vLLM plan a step on a
    GPU only after the one before (on a CPU it does so anyway).  ``gpu_memory_utilization``: vLLM's share of the GPU
    while it generates; 0: a half, and 0.85 where the trainer's models are offloaded meanwhile.
    """

    tp: int = 1
    schedule: str = "static"
    temperature: float = 1.0
    top_p: float = 1.0
    max_num_seqs: int = 256
    max_model_len: int = 0
    kv_cache_gib: float = 0.0
    gpu_memory_utilization: float = 0.0
    stop: list[str] = field(default_factory=list)
    enforce_eager: bool = False
    async_scheduling: bool = True
    mismatch_warning: float = 0.05
    bucket_mib: float = 256.0
    check_updates: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.gpu_memory_utilization < 1,
            f"rollout.gpu_memory_utilization={self.gpu_memory_utilization} must be a share of the GPU below 1, or 0: "
            "half of it, and 0.85 with offload=true",
        )
        require(self.bucket_mib > 0, f"rollout.bucket_mib={self.bucket_mib} must be positive")
        require(self.temperature > 0, f"rollout.temperature={self.temperature} must be positive")
        require(
            self.top_p == 1.0,
            f"rollout.top_p={self.top_p}: the trainer scores the whole distribution, so sampling must too; use 1.0",
        )
        choice("rollout.schedule", self.schedule, ("static", "shared"))
        require(self.tp >= 1, f"rollout.tp={self.tp} must be at least 1")

    def memory_share(self, offload: bool) -> float:
        """Return the share of the GPU that vLLM takes; ``offload``: the trainer's models are away meanwhile."""
        return self.gpu_memory_utilization or (0.85 if offload else 0.5)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Problem sets that the live weights answer every ``every`` steps or iterations, and at the end (0: never).

    ``limit`` takes the first problems of each set (0: all).  Greedy responses of at most ``max_tokens`` are scored (0:
    what the model's positions leave beside ``data.max_prompt_tokens``, at most 32,768, as of ``tools/evaluate.py``);
    ``samples`` more at temperature 1 give pass@k.  ``workers`` processes grade.
    """

    every: int = 0
    sources: list[SourceConfig] = field(default_factory=list)
    limit: int = 0
    max_tokens: int = 0
    samples: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        for key in ("every", "limit", "max_tokens", "samples"):
            require(getattr(self, key) >= 0, f"evaluation.{key}={getattr(self, key)} must be 0 or more")
        require(self.workers > 0, f"evaluation.workers={self.workers} must be positive")
        require(
            not self.every or bool(self.sources),
            f"evaluation.every={self.every} has nothing to ask: give evaluation.sources=[{{path: FILE, name: NAME}}]",
        )
        names = [source.name or "" for source in self.sources]
        for source, name in zip(self.sources, names, strict=True):
            require(
                bool(re.fullmatch(r"[\w.-]+", name)),
                f"evaluation.sources: {source.path} is called {name!r}; give it a name of letters, digits, - _ or .",
            )
            require(names.count(name) == 1, f"evaluation.sources: two sets are called {name}; name one of them anew")


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
        require(self.steps >= 0, f"steps={self.steps} must be positive, or 0 to train for {self.epochs} epochs")
        require(self.epochs > 0, f"epochs={self.epochs} must be positive")
        require(
            self.steps > 0 or not self.data.sources,
            "steps=0 with data.sources: only the epochs of data.tokenised=DIR have an end; give steps",
        )
        require(self.packs_per_step > 0, f"packs_per_step={self.packs_per_step} must be positive")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the length curriculum: up to iteration ``until``, ``max_tokens`` of prompt and response together.

    ``mean_tokens`` is what `tools/plan.py` expects of their mean; 0: a third of the limit.
    """

    until: int
    max_tokens: int
    mean_tokens: int = 0

    def __post_init__(self) -> None:
        require(self.until > 0 and self.max_tokens > 0, "curriculum[].until and .max_tokens must be positive")


ESTIMATORS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce_pp")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What the policy learns from.  The defaults are the paper's PPO (section 3.2); docs/algorithms.md has the rest.

    ``estimator``: of the advantage; all but ``gae`` go without a critic.  ``clip_high`` (0: as ``clip``) is the upper
    bound of the ratio alone.  ``reduction``: what weighs the same, every ``token``, every response (``sequence``),
    every token by a ``constant`` divisor, or every ``pack``.  ``reduction_tokens`` is that divisor (0: the longest
    limit of the curriculum), the same in the whole run.  With ``policy_epochs`` or ``policy_steps`` (of an epoch)
    over 1 the log-probabilities before the update are stored.  ``kl_coefficient`` holds the policy to the weights in
    ``reference`` (none: those that it began with) by an estimate of ``kl_form``, in the ``loss`` or taken from the
    ``reward`` (``kl_in``).  ``importance_cap`` (0: off) weighs each token by the trainer's probability over the rollout
    engine's, up to this cap.  ``dynamic_sampling`` (0: off) is how many times prompts are drawn until enough have
    responses that differ in reward.  ``overlong_buffer``: the last tokens before the limit, which cost up to 1.
    ``wrong_reward``: what the estimator takes for a wrong response; a right one is 1, and what a reward function gives
    in between is mapped linearly.  The metrics keep the verdicts of 0 to 1.
    """

    estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    clip: float = 0.2
    clip_high: float = 0.0
    value_clip: float = 0.0
    reduction: str = "token"
    reduction_tokens: int = 0
    wrong_reward: float = 0.0
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
        choice("algorithm.estimator", self.estimator, ESTIMATORS)
        choice("algorithm.reduction", self.reduction, ("token", "sequence", "constant", "pack"))
        choice("algorithm.kl_form", self.kl_form, ("k1", "k2", "k3"))
        choice("algorithm.kl_in", self.kl_in, ("loss", "reward"))
        require(0 < self.clip < 1, f"algorithm.clip={self.clip} must lie between 0 and 1")
        require(0 < self.gamma <= 1 and 0 <= self.lam <= 1, "algorithm.gamma and algorithm.lam must lie in 0..1")
        for key in ("critic_steps", "policy_epochs", "policy_steps"):
            require(getattr(self, key) >= 1, f"algorithm.{key}={getattr(self, key)} must be at least 1")
        for key in ("clip_high", "kl_coefficient", "importance_cap", "dynamic_sampling", "overlong_buffer"):
            require(getattr(self, key) >= 0, f"algorithm.{key}={getattr(self, key)} must be 0 (off) or more")
        require(
            self.reduction_tokens >= 0,
            f"algorithm.reduction_tokens={self.reduction_tokens} must be 0 (the curriculum's longest limit) or more",
        )
        require(
            not self.reduction_tokens or self.reduction == "constant",
            f"algorithm.reduction_tokens={self.reduction_tokens} needs algorithm.reduction=constant, which is "
            f"{self.reduction}; change one of them",
        )
        require(
            math.isfinite(self.wrong_reward) and self.wrong_reward < 1,
            f"algorithm.wrong_reward={self.wrong_reward} must be below 1, which a right response earns",
        )
        require(
            self.estimator == "gae" or not self.critic_warmup_iterations,
            f"algorithm.critic_warmup_iterations={self.critic_warmup_iterations}: {self.estimator} has no critic",
        )
        require(
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
        choice("critic.head_init", self.head_init, ("orz", "kaiming", "paper"))


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Graders: how many workers, how much CPU time and memory one verdict may take, and how many are remembered.

    ``rules``: by source, what makes a response right (`ovr_megatron.rewards.rules.rule`); ``auto`` where none is given.
    """

    workers: int = 2
    timeout_s: float = 5.0
    memory_mib: int = 1024
    cache: int = 65536
    rules: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"reward.workers={self.workers} must be at least 1")
        require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")
        require(self.memory_mib >= 256, f"reward.memory_mib={self.memory_mib} must be at least 256, for SymPy's sake")
        require(self.cache >= 0, f"reward.cache={self.cache} must be 0 (off) or a number of verdicts")


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
        require(
            self.responses > 1 or not (self.algorithm.in_groups or self.algorithm.dynamic_sampling),
            f"responses={self.responses}: algorithm.estimator={self.algorithm.estimator} and dynamic_sampling compare "
            "the responses to one prompt; take 2 or more",
        )
        shortest = min((stage.max_tokens for stage in self.curriculum), default=0)
        require(
            self.algorithm.overlong_buffer < shortest or not self.algorithm.overlong_buffer,
            f"algorithm.overlong_buffer={self.algorithm.overlong_buffer} must be under the shortest limit of the "
            f"curriculum, {shortest}",
        )
        # Its scaling factors are reduced over all ranks after every pack, of which they have different numbers here.
        require(
            self.model.fp8 != "delayed",
            "model.fp8=delayed: ranks that train different numbers of packs would wait for each other; "
            "take model.fp8=current or block",
        )
        require(self.iterations > 0, f"iterations={self.iterations} must be positive")
        require(self.prompts > 0 and self.responses > 0, "prompts and responses must be positive")
        choice("only", self.only, ("all", "rollout", "train", "rehearsal"))
        require(
            (self.only == "train") == bool(self.rollouts_from),
            f"only={self.only} with rollouts_from={self.rollouts_from}: only=train needs the run folder to learn from, "
            "and nothing else takes one",
        )
        require(
            not self.rollouts_from or Path(self.rollouts_from).resolve() != Path(self.run.dir).resolve(),
            f"rollouts_from={self.rollouts_from} is run.dir: the run would replace what it learns from; choose another "
            "run.dir",
        )
        require(bool(self.curriculum), "curriculum is empty: give at least one {until, max_tokens}")
        for number, stage in enumerate(self.curriculum):
            require(
                stage.max_tokens > self.data.max_prompt_tokens,
                f"curriculum[{number}].max_tokens={stage.max_tokens} leaves no room for a response to a prompt of "
                f"data.max_prompt_tokens={self.data.max_prompt_tokens}; raise the first or lower the second",
            )
        ends = [stage.until for stage in self.curriculum]
        require(ends == sorted(set(ends)), f"curriculum: 'until' must rise, got {ends}")
        require(
            ends[-1] >= self.iterations,
            f"curriculum ends at iteration {ends[-1]} but iterations={self.iterations}; raise the last 'until'",
        )

    @property
    def reduction_tokens(self) -> int:
        """Return the divisor of ``algorithm.reduction=constant`` in tokens.

        It does not follow the curriculum: a divisor that jumps with the limit would change the step size.
        """
        return self.algorithm.reduction_tokens or max(stage.max_tokens for stage in self.curriculum)


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
    try:
        _remember_environment(config)
        missing = sorted(OmegaConf.missing_keys(config))
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation of a variable or a setting that is not there
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from None
    require(not missing, f"no value for {', '.join(missing)}; give it as KEY=VALUE on the command line")
    try:
        settings: Any = TypeAdapter(schema).validate_python(resolved)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":  # one of ours, which names its key
            raise ConfigError(str(first["ctx"]["error"])) from None
        key = ".".join(str(part) for part in first["loc"]) or "config"
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(unknown_setting(schema, key)) from None
        text = _environment.get(tuple(map(str, first["loc"])), (None, first["input"]))[1]
        raise ConfigError(f"{key}: {first['msg']} (got {text!r})") from error
    check_numbers(settings)
    return settings


# A reward may be below 0, and these counts have no size that must fit into memory.
SIGNED = ("wrong_reward",)
UNBOUNDED = ("seed", "expected_samples", "max_requests", "max_total_tokens")
LARGEST = 2**31 - 1


def check_numbers(settings: Any, prefix: str = "") -> None:
    """Refuse numbers that no setting can have: not finite, negative, or a count that no machine can hold.

    Bounds of single settings stand in the ``__post_init__`` of their schema.

    Raises:
        ConfigError: names the key and its value.
    """
    if isinstance(settings, (list, tuple)):
        for index, item in enumerate(settings):
            check_numbers(item, f"{prefix.rstrip('.')}[{index}].")
        return
    if not dataclasses.is_dataclass(settings):
        return
    for item in dataclasses.fields(settings):
        value, key = getattr(settings, item.name), f"{prefix}{item.name}"
        if isinstance(value, (int, float)):
            require(math.isfinite(value), f"{key}={value} must be a finite number")
            require(value >= 0 or item.name in SIGNED, f"{key}={value} must be 0 or more")
            bounded = isinstance(value, int) and item.name not in UNBOUNDED
            require(not bounded or value <= LARGEST, f"{key}={value} must be at most {LARGEST}")
        else:
            check_numbers(value, f"{key}.")


# Settings that hold values of environment variables: by path, what they resolve to, and how they are written.
_environment: dict[tuple[str, ...], tuple[Any, str]] = {}


def _remember_environment(config: DictConfig) -> None:
    """Remember how settings are written, where environment variables come in: files show that, not their values."""
    if "oc.env" not in OmegaConf.to_yaml(config):
        return
    written = _leaves(OmegaConf.to_container(config, resolve=False))
    resolved = dict(_leaves(OmegaConf.to_container(config, resolve=True)))
    for path, text in written:
        if isinstance(text, str) and "${" in text and path in resolved:
            _environment[path] = (resolved[path], text)


def _leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, (*path, str(key)))


def _as_written(value: Any, path: tuple[str, ...] = ()) -> Any:
    """Return ``value`` with the settings of `_remember_environment` as they were written."""
    if isinstance(value, dict):
        return {key: _as_written(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_written(item, (*path, str(place))) for place, item in enumerate(value)]
    resolved, text = _environment.get(path, (None, ""))
    return text if text and str(resolved) == str(value) else value


def as_yaml(config: Any) -> str:
    """Return the checked ``config`` as YAML; values of environment variables stay ``${oc.env:NAME}``."""
    return OmegaConf.to_yaml(OmegaConf.create(_as_written(dataclasses.asdict(config))))


def save(config: Any, path: Path) -> None:
    """Write the resolved ``config`` as YAML to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_yaml(config))


def forbid_unknown_keys(names: dict[str, Any]) -> None:
    """Have `build` refuse keys that the dataclasses among the ``names`` of a module do not have."""
    for item in list(names.values()):
        if isinstance(item, type) and dataclasses.is_dataclass(item):
            setattr(item, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010


forbid_unknown_keys(globals())
