"""Settings of the two training stages: the root dataclasses that recipes are merged onto."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ovr_megatron.config.algorithm import AlgorithmConfig, CriticConfig, RewardConfig, StageConfig
from ovr_megatron.config.checks import choice, require
from ovr_megatron.config.data import DataConfig
from ovr_megatron.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.config.rollout import EvaluationConfig, RolloutConfig
from ovr_megatron.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class ColdStartConfig:
    """Stage 1: supervised training on packed samples (paper, section 3.1).

    ``steps=0``: as many as ``epochs`` take, which needs ``data.tokenised``.  ``rollout`` is the engine of
    ``evaluation``, and is started for nothing else.
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
        _check_trains(self.model)


@dataclass(frozen=True, kw_only=True)
class RLConfig:
    """Stage 2: PPO with verifiable rewards.

    ``only`` runs half of the system: ``rollout`` generates and grades with the weights of ``model.path``, ``train``
    learns from the rollouts of the run folder ``rollouts_from``; ``rehearsal`` tries each stage of the curriculum once.
    ``offload``: weights, gradients and optimizer state that a phase does not need are offloaded to host memory.
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
        _check_trains(self.model)
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
        # Delayed scaling reduces its factors over all ranks after every pack, and in reinforcement learning ranks have
        # different numbers of packs.
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
        for index, stage in enumerate(self.curriculum):
            require(
                stage.max_tokens > self.data.max_prompt_tokens,
                f"curriculum[{index}].max_tokens={stage.max_tokens} leaves no room for a response to a prompt of "
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


def _check_trains(model: ModelConfig) -> None:
    """Raise `ConfigError` if nothing of the model trains."""
    require(
        not (model.freeze_vision and model.freeze_merger and model.freeze_language),
        "model.freeze_vision, model.freeze_merger and model.freeze_language leave nothing to train; "
        "set one of them to false",
    )


def _check_pack(data: DataConfig, parallel: ParallelConfig) -> None:
    """Raise `ConfigError` if a pack is too short for one token in each of the two chunks of a context-parallel rank."""
    chunks = 2 * parallel.cp if parallel.cp > 1 else 1
    require(
        data.pack_tokens >= chunks,
        f"data.pack_tokens={data.pack_tokens} is shorter than two chunks for each of parallel.cp={parallel.cp} ranks; "
        f"use at least {chunks} tokens or cp={max(1, data.pack_tokens // 2)}",
    )
