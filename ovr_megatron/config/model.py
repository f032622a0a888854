"""Settings of one model: weights and dtype, layout over the ranks, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from ovr_megatron.config.checks import choice, require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Initial weights, their dtype, and which parts train.

    ``path`` is the Hugging Face directory of a model or one of our checkpoints.  ``recompute`` names the activations
    that the backward pass computes again: ``selective`` those of the MLPs (attention stores none that grow with the
    square of the length), ``full`` those of entire layers.  ``layers``: Transformer Engine's where it is installed
    (``auto``), or ours (``local``).  ``fp8``: the scaling recipe of the language model's matrix products; the first
    and the last ``fp8_bf16_layers`` layers stay in bfloat16.
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
    """Layout of one model over the ranks; the data-parallel size is the world size over `ranks`.

    ``vpp`` cuts each pipeline stage into that many interleaved parts.  ``first_stage_layers`` and
    ``last_stage_layers`` (0: the same as the others) make room for the vision tower and the head.
    ``distributed_optimizer`` shards Adam's moments over the data-parallel ranks; ``overlap`` hides the gradients'
    traffic behind the computation, with the distributed optimizer also that of the parameters.
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
        """Return the number of ranks of one replica."""
        return self.tp * self.pp * self.cp

    def data_parallel(self, world_size: int) -> int:
        """Return the data-parallel size of ``world_size`` ranks; raise `ConfigError` if it does not divide."""
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
    not finite, or has a norm above ``skip_above`` (0: no bound), is skipped and counted; ``stop_after_skipped``
    skipped steps in a row end the run.
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
