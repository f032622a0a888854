"""Settings of the two training stages: the root dataclasses that recipes are merged onto."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from ovr_megatron.config.algorithm import AlgorithmConfig, CriticConfig, RewardConfig, StageConfig
from ovr_megatron.config.checks import ZeroMeans, require
from ovr_megatron.config.data import DataConfig
from ovr_megatron.config.evaluation import EvaluationConfig
from ovr_megatron.config.fields import Count, PositiveInt, section
from ovr_megatron.config.model import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.config.rollout import RolloutConfig
from ovr_megatron.config.run import RunConfig
from ovr_megatron.config.validation import ValidationConfig


@section("")
class ColdStartConfig:
    """Supervised fine-tuning on packed samples; in the paper the linguistic cold start (section 3.1)."""

    run: RunConfig
    """Run folder, checkpoints and logs."""
    model: ModelConfig
    """Initial weights, their dtype, and which parts train."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the model over the ranks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and its schedule."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources of rows, and how rows become tokens."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Engine of the evaluation, which is started for nothing else."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation of the live weights."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Rows whose loss is measured and not trained."""
    # Five epochs and 640 packs of data.pack_tokens are the paper's (section 3.1).
    steps: Annotated[Count, ZeroMeans("as many as epochs take")] = 900
    """Optimizer steps."""
    epochs: PositiveInt = 5
    """With steps=0, how often the data are gone through; data.sources[].weight then repeats the rows of a source."""
    packs_per_step: PositiveInt = 640
    """Packs of an optimizer step, over all ranks."""

    def __post_init__(self) -> None:
        _check_pack(self.data, self.parallel)
        _check_trains(self.model)
        require(
            not self.rollout.ranks,
            f"rollout.ranks={self.rollout.ranks}: supervised fine-tuning has no rollouts; leave it at 0",
        )
        for source in self.data.sources:
            if not source.streaming:
                continue
            require(
                self.steps > 0,
                f"steps=0 with the streamed source {source.path}, whose number of rows is not known; give steps",
            )
            require(
                not self.validation.holds_out,
                f"validation: no rows can be held out of the streamed source {source.path}; give validation.sources",
            )
        require(
            not any(source.streaming for source in self.validation.sources),
            "validation.sources[].streaming: validation rows are read by number; leave streaming out",
        )


@section("")
class RLConfig:
    """Stage 2: PPO with verifiable rewards."""

    run: RunConfig
    """Run folder, checkpoints and logs."""
    model: ModelConfig
    """Initial weights, their dtype, and which parts train."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the model over the ranks."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and its schedule."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources of rows, and how rows become tokens."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Engine of the rollouts and the evaluation."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Objective of the policy."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The separate value network."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Graders of responses."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation of the live weights."""
    curriculum: list[StageConfig] = field(default_factory=list)
    """Stages of the length limit."""
    # Iterations, prompts and responses are the paper's (section 3.2).
    iterations: PositiveInt = 900
    """Iterations of rollouts and updates."""
    prompts: PositiveInt = 512
    """Prompts of an iteration."""
    responses: PositiveInt = 16
    """Responses to each prompt."""
    offload: bool = False
    """Offload weights, gradients and optimizer state that a phase does not need to host memory."""
    share_prompts: bool = False
    """Compute a prompt with its images once for all of its responses in a pack; algorithm.reduction=pack then weighs
    other packs."""
    only: Literal["all", "rollout", "train", "critic", "rehearsal"] = "all"
    """Part of the loop to run: all; rollout (generate and grade with the weights of model.path); train (learn from the
    rollouts in rollouts_from); critic (the same, for the critic alone); rehearsal (each stage of the curriculum
    once)."""
    rollouts_from: str | None = None
    """Run folder whose rollouts only=train and only=critic learn from."""

    def __post_init__(self) -> None:
        _check_pack(self.data, self.parallel)
        _check_trains(self.model)
        _check_sides(self.only, self.rollout)
        require(
            self.responses > 1 or not (self.algorithm.in_groups or self.algorithm.dynamic_sampling),
            f"responses={self.responses}: algorithm.estimator={self.algorithm.estimator} and dynamic_sampling compare "
            "the responses to one prompt; take 2 or more",
        )
        _check_choice(self)
        _check_rounds(self)
        # The penalty begins so many tokens before the limit: within a shorter one it would begin before the response.
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
        require(
            self.learns_from_archive == bool(self.rollouts_from),
            f"only={self.only} with rollouts_from={self.rollouts_from}: only=train and only=critic need the run folder "
            "to learn from, and nothing else takes one",
        )
        _check_critic_alone(self)
        _check_parts(self)
        # Resolved, as one folder can be written in several ways.
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
        # A stage begins after the `until` of the one before: without a rise it would never run.
        ends = [stage.until for stage in self.curriculum]
        require(ends == sorted(set(ends)), f"curriculum: 'until' must rise, got {ends}")
        require(
            ends[-1] >= self.iterations,
            f"curriculum ends at iteration {ends[-1]} but iterations={self.iterations}; raise the last 'until'",
        )

    @property
    def learns_from_archive(self) -> bool:
        """Whether the run learns from the rollouts of another one and generates none."""
        return self.only in ("train", "critic")

    @property
    def generates(self) -> bool:
        """Whether the run has engines that generate responses."""
        return not self.learns_from_archive

    @property
    def learns_in_parts(self) -> bool:
        """Whether ``rollout.stream_parts`` is possible beside ``rollout.ranks``."""
        return not _obstacle_to_parts(self)

    @property
    def trains_policy(self) -> bool:
        """Whether the policy learns; with ``only=rollout`` it does in the run that takes the rollouts."""
        return self.only != "critic"

    @property
    def scoring_passes(self) -> int:
        """Return `AlgorithmConfig.scoring_passes` of this run: a critic alone needs those of its rewards."""
        if self.trains_policy or self.algorithm.kl_coefficient:
            return self.algorithm.scoring_passes
        return 0

    @property
    def reduction_tokens(self) -> int:
        """Return the divisor of ``algorithm.reduction=constant`` in tokens.

        It does not follow the curriculum: a divisor that jumps with the limit would change the step size.
        """
        return self.algorithm.reduction_tokens or max(stage.max_tokens for stage in self.curriculum)

    @property
    def longest_sequence(self) -> int:
        """Return the tokens of a prompt and its response for which the engine is built."""
        return self.rollout.max_model_len or max(stage.max_tokens for stage in self.curriculum)

    @property
    def has_reference(self) -> bool:
        """Whether the divergence is measured from a model of its own; a policy with adapters has it without them."""
        shares_weights = self.model.lora.rank > 0 and not self.algorithm.reference
        return self.algorithm.kl_coefficient > 0 and not shares_weights

    @property
    def critic_shares_base(self) -> bool:
        """Return whether policy and critic have one frozen base in memory: adapters, the same folder and layout.

        A ``critic.path`` counts as another folder; a run shares the memory also where it turns out to be the same one.
        """
        own_layout = self.critic.parallel is not None and self.critic.parallel != self.parallel
        has_adapters = self.model.lora.rank > 0 and self.algorithm.has_critic
        # A critic that learns alone has no policy beside it that trains.
        return has_adapters and not self.critic.path and not own_layout and self.only != "critic"


def _check_critic_alone(config: RLConfig) -> None:
    """Raise `ConfigError` if only=critic or critic_warmup_patience has nothing to act on."""
    algorithm = config.algorithm
    require(
        config.only != "critic" or algorithm.has_critic,
        f"only=critic: algorithm.estimator={algorithm.estimator} has no critic; take gae, or only=train",
    )
    require(
        config.only != "critic" or algorithm.teacher is None,
        f"only=critic with algorithm.teacher={algorithm.teacher}: the teacher is for the policy, which does not learn; "
        "leave it out",
    )
    require(
        config.only != "critic" or not config.run.export_every,
        f"only=critic with run.export_every={config.run.export_every}: there is no policy to export; leave it at 0",
    )
    require(
        config.only != "critic" or not config.model.lora.rank,
        f"only=critic with model.lora.rank={config.model.lora.rank}: the checkpoint would have adapters alone, which "
        "critic.path cannot take; set model.lora.rank=0",
    )
    # Without a reference of its own the divergence of a policy that does not learn from itself is 0.
    changes_rewards = algorithm.kl_in == "reward" and algorithm.reference is not None
    require(
        config.only != "critic" or not algorithm.kl_coefficient or changes_rewards,
        f"only=critic with algorithm.kl_coefficient={algorithm.kl_coefficient:g}: the policy does not learn, so that "
        "its divergence is of no effect; set it to 0, or algorithm.kl_in=reward with algorithm.reference",
    )
    require(
        not algorithm.critic_warmup_patience or algorithm.critic_warmup_iterations > 0 or config.only == "critic",
        f"algorithm.critic_warmup_patience={algorithm.critic_warmup_patience} ends a warm-up early, and there is none; "
        "set algorithm.critic_warmup_iterations to the most iterations that it may take",
    )


def _check_parts(config: RLConfig) -> None:
    """Raise `ConfigError` if the policy cannot learn from an iteration's responses in parts."""
    if config.rollout.stream_parts:
        obstacle = _obstacle_to_parts(config)
        require(not obstacle, f"rollout.stream_parts={config.rollout.stream_parts}: {obstacle}")


def _obstacle_to_parts(config: RLConfig) -> str:
    """Return why the policy cannot learn from an iteration's responses in parts, and the remedy; empty if it can."""
    algorithm = config.algorithm
    if algorithm.normalises or algorithm.has_critic:
        return (
            f"advantages of algorithm.estimator={algorithm.estimator} are normalised over all responses of an "
            "iteration; take grpo, dr_grpo, rloo, opo, maxrl, or none with algorithm.teacher, or rollout.stream_parts=0"
        )
    if algorithm.policy_updates > 1:
        return (
            f"each of the {algorithm.policy_updates} policy updates of an iteration learns from responses to all of "
            "its prompts; set algorithm.policy_steps=1 and algorithm.policy_epochs=1, or rollout.stream_parts=0"
        )
    if algorithm.positive_nll:
        return (
            f"algorithm.positive_nll={algorithm.positive_nll:g} divides by the tokens of all right responses of an "
            "iteration; set algorithm.positive_nll=0 or rollout.stream_parts=0"
        )
    if algorithm.dynamic_sampling:
        return (
            f"with algorithm.dynamic_sampling={algorithm.dynamic_sampling} only the last round says which prompts an "
            "iteration trains on; set algorithm.dynamic_sampling=0 or rollout.stream_parts=0"
        )
    if config.offload and (config.has_reference or algorithm.teacher):
        return (
            "with offload=true the reference or teacher needs the device memory of the policy's gradients, which must "
            "stay there until the last part; set offload=false, or rollout.stream_parts=0"
        )
    return ""


def _check_choice(config: RLConfig) -> None:
    """Raise `ConfigError` if prompts cannot be chosen by the rewards of earlier responses."""
    algorithm = config.algorithm
    names = [name for name in ("prompt_replay", "prompt_exploration") if getattr(algorithm, name)]
    for name in names:
        value = getattr(algorithm, name)
        require(
            config.responses > 1,
            f"responses={config.responses}: algorithm.{name}={value:g} compares the responses to one prompt; take 2 or "
            "more",
        )
        require(
            not any(source.streaming for source in config.data.sources),
            f"algorithm.{name}={value:g} knows a prompt by its number, which a streamed source does not have; leave "
            f"data.sources[].streaming out, or set algorithm.{name} to 0",
        )


def _check_rounds(config: RLConfig) -> None:
    """Raise `ConfigError` if rounds that end before their longest prompts cannot work."""
    require(
        not (config.rollout.oversample and config.algorithm.dynamic_sampling),
        f"rollout.oversample={config.rollout.oversample:g} and algorithm.dynamic_sampling both start more prompts "
        "than an iteration trains on; set one of them to 0",
    )
    require(
        not (config.rollout.oversample and any(source.streaming for source in config.data.sources)),
        f"rollout.oversample={config.rollout.oversample:g} draws long prompts once more, which a streamed source "
        "cannot; leave data.sources[].streaming out, or set rollout.oversample to 0",
    )
    require(
        config.only != "rollout" or not config.rollout.max_staleness,
        f"only=rollout with rollout.max_staleness={config.rollout.max_staleness}: one policy draws all tokens, so "
        "that none is older than another; set rollout.max_staleness to 0",
    )


def _check_trains(model: ModelConfig) -> None:
    """Raise `ConfigError` if nothing of the model trains."""
    require(
        bool(model.lora.rank) or model.trains_vision or model.trains_merger or model.trains_language,
        "model.freeze_vision, model.freeze_merger and model.freeze_language leave nothing to train; "
        "set one of them to false",
    )


def _check_sides(only: str, rollout: RolloutConfig) -> None:
    """Raise `ConfigError` if ranks that only generate have nothing to do, or the others have nothing to learn from."""
    require(
        not rollout.ranks or only in ("all", "rehearsal"),
        f"only={only} with rollout.ranks={rollout.ranks}: one of the two sides would have nothing to do; leave "
        "rollout.ranks at 0",
    )


def _check_pack(data: DataConfig, parallel: ParallelConfig) -> None:
    """Raise `ConfigError` if a pack is too short for one token in each of the two chunks of a context-parallel rank."""
    chunks = 2 * parallel.cp if parallel.cp > 1 else 1
    require(
        data.pack_tokens >= chunks,
        f"data.pack_tokens={data.pack_tokens} is shorter than two chunks for each of parallel.cp={parallel.cp} ranks; "
        f"use at least {chunks} tokens or cp={max(1, data.pack_tokens // 2)}",
    )
