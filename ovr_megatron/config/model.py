"""Settings of one model: weights and dtype, layout over the ranks, optimizer."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Annotated, Literal

from pydantic import Field

from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.fields import (
    Count,
    Dtype,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
    section,
)

Recompute = Literal["none", "selective", "full"]


@section("model.lora.")
class LoraConfig:
    """Low-rank adapters that train beside frozen weights (LoRA, arXiv 2106.09685)."""

    rank: Annotated[Count, ZeroMeans("no adapters, the weights themselves train")] = 0
    """Rank of each adapter."""
    alpha: PositiveFloat = 32.0
    """What an adapter computes is multiplied by alpha / rank."""
    layers: Literal["attention", "mlp", "all"] = "all"
    """Linear layers that have an adapter: those of the attention, of the MLP, or both."""
    vision: bool = False
    """Adapters in the blocks of the vision tower, too."""

    @property
    def scale(self) -> float:
        """Return the factor of what an adapter computes."""
        return self.alpha / self.rank


@section("model.")
class ModelConfig:
    """Initial weights, their dtype, and which parts train."""

    path: str
    """Hugging Face folder of a model, its name on the Hugging Face hub, or one of our checkpoints."""
    dtype: Dtype = "float32"
    """Dtype of weights and activations."""
    freeze_vision: bool = False
    """Leave the vision tower as it is."""
    freeze_merger: bool = False
    """Leave the merger of the vision tower as it is."""
    freeze_language: bool = False
    """Leave the language model as it is."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again: those of the MLPs (selective; attention stores none that grow
    with the square of the length), or those of entire layers (full)."""
    layers: Literal["auto", "local", "transformer_engine"] = "auto"
    """Transformer Engine's layers where it is installed (auto), or ours (local)."""
    fp8: Literal["none", "delayed", "current", "block"] = "none"
    """Scaling recipe of the language model's matrix products."""
    fp8_bf16_layers: Annotated[Count, ZeroMeans("none")] = 0
    """First and last layers that stay in bfloat16, this many at each end."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in place of training the weights."""

    @property
    def trains_language(self) -> bool:
        """Whether the language model's weights train, not only adapters beside them."""
        return not (self.freeze_language or self.lora.rank)

    @property
    def trains_vision(self) -> bool:
        """Whether the vision tower's weights train."""
        return not (self.freeze_vision or self.lora.rank)

    @property
    def trains_merger(self) -> bool:
        """Whether the weights of the tower's merger train."""
        return not (self.freeze_merger or self.lora.rank)

    @property
    def adapts_vision(self) -> bool:
        """Whether the vision tower has adapters."""
        return self.lora.rank > 0 and self.lora.vision

    def __post_init__(self) -> None:
        require(
            not self.lora.rank or not self.freeze_language,
            f"model.lora.rank={self.lora.rank} trains adapters of the language model, whose weights it freezes by "
            "itself; leave out model.freeze_language",
        )
        require(
            not self.adapts_vision or not self.freeze_vision,
            "model.lora.vision=true trains adapters of the vision tower and model.freeze_vision=true nothing of it; "
            "leave out one of them",
        )
        # FP8 products are Transformer Engine's alone, whose layers are not taken in float32.
        require(
            self.fp8 == "none" or (self.dtype == "bfloat16" and self.layers != "local"),
            f"model.fp8={self.fp8} needs model.dtype=bfloat16 and Transformer Engine's layers",
        )
        require(
            self.fp8 != "delayed" or not self.fp8_bf16_layers,
            f"model.fp8_bf16_layers={self.fp8_bf16_layers}: delayed scaling is for all layers; use current or block",
        )

    def frozen(self) -> ModelConfig:
        """Return these settings for a model that never trains, without adapters."""
        return replace(self, freeze_vision=True, freeze_merger=True, freeze_language=True, lora=LoraConfig())


@section("parallel.")
class ParallelConfig:
    """Layout of one model over the ranks; the data-parallel size is the world size over `ranks`."""

    tp: PositiveInt = 1
    """Tensor-parallel size."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    vpp: PositiveInt = 1
    """Interleaved parts of each pipeline stage."""
    cp: PositiveInt = 1
    """Context-parallel size."""
    sequence_parallel: bool = False
    """Cut the activations between the tensor-parallel parts over the sequence."""
    first_stage_layers: Annotated[Count, ZeroMeans("the same as the others")] = 0
    """Layers of the first pipeline stage, which has the vision tower, too."""
    last_stage_layers: Annotated[Count, ZeroMeans("the same as the others")] = 0
    """Layers of the last pipeline stage, which has the head, too."""
    distributed_optimizer: bool = False
    """Shard Adam's moments over the data-parallel ranks."""
    overlap: bool = False
    """Hide the gradients' traffic behind the computation; with the distributed optimizer also the parameters'."""

    def __post_init__(self) -> None:
        # Megatron refuses it, too, but not before the model is built.
        require(
            not self.sequence_parallel or self.tp > 1,
            "parallel.sequence_parallel=true needs parallel.tp of at least 2",
        )
        # Without a pipeline the only stage has all layers.
        for key in ("first_stage_layers", "last_stage_layers"):
            count = getattr(self, key)
            require(not count or self.pp > 1, f"parallel.{key}={count} needs parallel.pp of at least 2")
        require(self.vpp == 1 or self.pp > 1, f"parallel.vpp={self.vpp} needs parallel.pp of at least 2")

    @property
    def ranks(self) -> int:
        """Return the number of ranks of one replica."""
        return self.tp * self.pp * self.cp

    def data_parallel(self, world_size: int) -> int:
        """Return the data-parallel size of ``world_size`` ranks; raise `ConfigError` if it does not divide."""
        ranks = self.ranks
        # Every replica has all of the model: a rest of ranks would have no place.
        require(
            world_size % ranks == 0,
            f"{world_size} processes cannot be cut into tp={self.tp},pp={self.pp},cp={self.cp}, {ranks} ranks a "
            f"replica; start a multiple of {ranks} processes, change parallel.*, or name a recipe that fits with "
            "--config-name",
        )
        return world_size // ranks


@section("optimizer.")
class OptimizerConfig:
    """AdamW and its schedule."""

    # The policy's, as in the recipe of stage 2; that of stage 1 has its own.
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    min_lr_ratio: UnitFloat = 1.0
    """Learning rate at the end as a share of the peak."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Course of the rate after the warm-up; wsd stays, and decays linearly over the last decay_share of all steps."""
    warmup_steps: Count = 50
    """Optimizer steps of the warm-up."""
    # Below 1, as for beta2: Adam divides its means by 1 - beta^t.
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the mean squared gradient."""
    eps: NonNegativeFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay, of neither norms nor biases."""
    clip_grad: NonNegativeFloat = 1.0
    """Largest norm of the gradient."""
    decay_share: PositiveUnitFloat = 0.1
    """Share of all steps in which wsd decays."""
    skip_above: Annotated[NonNegativeFloat, ZeroMeans("no bound")] = 0.0
    """Norm of a gradient above which its step is skipped and counted, like one whose gradient is not finite."""
    stop_after_skipped: PositiveInt = 10
    """Skipped steps in a row that end the run."""
