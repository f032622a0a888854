"""Open the data and build the models, the engine and the graders of a job; refuse settings that cannot work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from ovr_megatron.checkpoint import store
from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.archive import ArchiveError
from ovr_megatron.ppo.corrections import correction_bounds
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.losses import check_loss
from ovr_megatron.ppo.prompt_history import PromptHistory
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.ppo.warmup import CriticWarmup, policy_steps
from ovr_megatron.rewards import rules
from ovr_megatron.rewards.combination import check_rules
from ovr_megatron.rewards.judge_client import Judges
from ovr_megatron.rewards.judge_templates import open_templates
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rewards.rules import RewardFunction
from ovr_megatron.rl.critic import build_critic
from ovr_megatron.rl.teacher import build_teacher
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import banned_tokens
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.folder_kinds import describe_folder
from ovr_megatron.runtime.trackers.table import check_trackers
from ovr_megatron.weights.folder import WeightFolder


def open_model_and_prompts(config: RLConfig, skipped: SkippedRows | None) -> tuple[Path, PromptStream]:
    """Open what every job begins with: the model's folder, and the prompts with its processor.

    Args:
        config: of the job.
        skipped: lists rows that cannot be used; None stops at the first.

    Raises:
        CheckpointError: ``model.path`` is a checkpoint without a policy.
        ConfigError: the model has no positions for the lengths, or the data or a setting of them cannot work.
    """
    model_folder = store.weights_of(config.model.path)
    processor = Processor(model_folder, config.data)
    check_lengths(config, processor.shape)
    stream = open_stream(config.data, config.run.seed, skipped)
    judges = open_templates(config.reward.judges)
    needs_answers = config.algorithm.learns_from_rewards
    history = None
    if config.algorithm.chooses_prompts:
        history = PromptHistory(config.algorithm, config.run.seed)
    prompts = PromptStream(stream, processor, config.reward.rules, skipped, judges, needs_answers, history)
    return model_folder, prompts


def check_names(config: RLConfig) -> None:
    """Refuse unknown names of rules, losses, corrections and trackers before any model is loaded.

    Raises:
        RuleError: a rule of ``reward.rules`` would not work in a grader.
        UserError: there is no such loss, correction or tracker, or the correction cannot have these bounds.
    """
    check_rules(config.reward)
    check_loss(config.algorithm)
    if config.algorithm.correction:
        correction_bounds(config.algorithm)
    check_trackers(config.run.trackers)


def with_rewards(config: RLConfig | ColdStartConfig, rewards: Mapping[str, RewardFunction]) -> RLConfig:
    """Return the settings with the places of a program's functions, by source, in ``reward.rules``.

    Raises:
        ConfigError: they are settings of the cold start, or of a job that trains nothing.
        RuleError: graders could not import a function.
    """
    if not isinstance(config, RLConfig):
        raise ConfigError("RL takes settings of `ovr rl`, and these are of `ovr sft`; compose another recipe")
    if config.only in ("rollout", "rehearsal"):
        raise ConfigError(f"RL takes only=all, train or critic; run only={config.only} with `ovr rl`")
    if not rewards:
        return config
    places = {source: rules.place_of(function) for source, function in rewards.items()}
    return replace(config, reward=replace(config.reward, rules={**config.reward.rules, **places}))


def check_steps(config: RLConfig, world: World) -> None:
    """Refuse an iteration of fewer prompts than replicas, or of fewer responses than optimizer steps.

    Raises:
        ConfigError: names the settings and their values.
    """
    settings = {"policy_steps": config.parallel}
    if config.algorithm.has_critic:
        settings["critic_steps"] = config.critic.parallel or config.parallel
    responses = config.prompts * config.responses
    for name, parallel in settings.items():
        replicas = parallel.data_parallel(world.size)
        steps = getattr(config.algorithm, name)
        if config.prompts < replicas:
            raise ConfigError(
                f"prompts={config.prompts} are fewer than the {replicas} data-parallel replicas, so that some would "
                f"learn nothing; raise prompts to {replicas} or more"
            )
        if responses < steps:
            raise ConfigError(
                f"prompts={config.prompts} x responses={config.responses} are {responses} responses for "
                f"algorithm.{name}={steps}; raise prompts"
            )


def check_parts(config: RLConfig, trainers: int) -> None:
    """Refuse ``rollout.stream_parts`` if a full part has fewer prompts than there are data-parallel replicas.

    Some replicas would be idle.  The last part may be smaller.

    Args:
        config: of the job.
        trainers: ranks that train.

    Raises:
        ConfigError: names the settings and their values.
    """
    if not config.rollout.stream_parts:
        return
    replicas = config.parallel.data_parallel(trainers)
    engines = config.rollout.ranks // config.rollout.tp
    prompts = engines * math.ceil(config.prompts / (engines * config.rollout.stream_parts))
    if prompts < replicas:
        raise ConfigError(
            f"rollout.stream_parts={config.rollout.stream_parts}: a part would have {prompts} of "
            f"prompts={config.prompts}, fewer than the {replicas} data-parallel replicas, so that some would learn "
            f"nothing from it; set rollout.stream_parts={config.prompts // replicas} or less"
        )


def count_iterations(config: RLConfig) -> int:
    """Return the number of iterations of the run; one that learns from archived rollouts ends with these.

    Raises:
        ArchiveError: ``rollouts_from`` has no rollouts.
    """
    archived: list[int] = []
    if config.rollouts_from:
        archived = archive.iterations(Path(config.rollouts_from))
        if not archived:
            problem = f"rollouts_from={config.rollouts_from} has no rollouts; give the run folder of a PPO run"
            raise ArchiveError(describe_folder(config.rollouts_from, "run") or problem)
    if config.learns_from_archive:
        archived_end = max(archived, default=-1) + 1
        return min(config.iterations, archived_end)
    return config.iterations


def check_lengths(config: RLConfig, shape: ModelShape) -> None:
    """Refuse lengths of prompt and response together that the model has no positions for.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    shape.check_length(config.rollout.max_model_len, "rollout.max_model_len")
    evaluated = evaluated_tokens(config, shape)
    shape.check_length(evaluated, "data.max_prompt_tokens with evaluation.max_tokens")
    for index, stage in enumerate(config.curriculum):
        shape.check_length(stage.max_tokens, f"curriculum[{index}].max_tokens")


def evaluated_tokens(config: RLConfig, shape: ModelShape) -> int:
    """Return the most tokens of an evaluated prompt and its response together; 0 without evaluation."""
    if not config.evaluation.every:
        return 0
    prompt_tokens = config.data.max_prompt_tokens
    response_tokens = shape.response_limit(config.evaluation.max_tokens, prompt_tokens)
    return prompt_tokens + response_tokens


def build_models(
    config: RLConfig,
    model_folder: Path,
    processor: Processor,
    world: World,
    training: bool = True,
) -> tuple[Models, dict[str, Engine]]:
    """Build the models of an iteration; return them, and by name those that train.

    Without ``training`` it is a policy to roll out, which stands in the dictionary though it does not train.
    """
    banned = banned_tokens(processor.shape, processor.tokenizer)
    reference = None
    teacher = None
    if training:
        engines = build_engines(config, model_folder, processor, world)
        if config.offload and "policy" not in engines:
            engines["critic"].offload()  # before the frozen policy takes its memory
        # The policy that rolled out, whose layout its responses are balanced for; it does not learn.
        policy = engines.get("policy") or build_frozen_policy(config, model_folder, world)
        if config.offload:
            policy.offload()  # before the reference takes its memory
        if config.model.lora.rank and config.algorithm.kl_coefficient and not config.algorithm.reference:
            reference = policy  # without its adapters it is the initial policy
        else:
            reference = build_reference(config, model_folder, banned, world)
        if config.offload and config.algorithm.teacher:
            for engine in (*engines.values(), reference):
                if engine is not None:
                    engine.offload()  # before the teacher takes its memory
        teacher = build_teacher(config, processor, world)
    else:
        policy = build_frozen_policy(config, model_folder, world)
        engines = {"policy": policy}
    if config.share_prompts:
        # With only=critic the frozen policy is none of the engines that train.
        _check_shared_prompts({"policy": policy} | engines | ({"teacher": teacher} if teacher else {}))
    # As the engine samples, so that log-probabilities of both are of the same distribution.
    policy.sample_from(banned, config.rollout.temperature)
    critic = engines.get("critic")
    models = Models(config, world, processor, policy, critic, reference, teacher)
    return models, engines


def _check_shared_prompts(engines: Mapping[str, Engine]) -> None:
    """Refuse shared prompts where keys are passed around a ring of ranks, which knows whole documents alone.

    Raises:
        ConfigError: names the settings.
    """
    for name, engine in engines.items():
        cp = engine.parallel.cp
        if cp > 1 and not engine.has_own_layers:
            raise ConfigError(
                f"share_prompts=true with context parallelism ({name}: cp={cp}): Transformer Engine's ring attention "
                "has no shared prompts; set share_prompts to false, cp to 1, or model.layers=local"
            )


def build_engines(config: RLConfig, model_folder: Path, processor: Processor, world: World) -> dict[str, Engine]:
    """Build the models that train: the policy, and where the algorithm needs one the critic; or the critic alone.

    The critic starts from the same weights, or those of ``critic.path``. Beside adapters the weights of the two never
    change, and are in memory once where they are the same.
    """
    if config.only == "critic":
        return {"critic": build_critic(config, model_folder, processor, world)}
    policy = build_policy(config, processor.shape, model_folder, world)
    if not config.algorithm.has_critic:
        return {"policy": policy}
    if config.offload:
        policy.offload()  # before the critic takes its memory
    critic = build_critic(config, model_folder, processor, world, policy)
    return {"policy": policy, "critic": critic}


def build_policy(config: RLConfig, shape: ModelShape, model_folder: Path, world: World) -> Engine:
    """Build the policy that trains, with the weights in ``model_folder``."""
    policy = Engine(shape, config.model, config.parallel, world)
    store.check_weights(config.model.path, world)
    # The learning rate follows the iterations in which the policy moves.
    policy.with_optimizer(config.optimizer, policy_steps(config, CriticWarmup.from_config(config)))
    policy.load(WeightFolder(model_folder), seed=config.run.seed)
    return policy


def build_reference(config: RLConfig, model_folder: Path, banned: Sequence[int], world: World) -> Engine | None:
    """Build the frozen policy whose divergence ``algorithm.kl_coefficient`` weighs; None where that is 0."""
    algorithm = config.algorithm
    if not algorithm.kl_coefficient:
        return None
    folder = model_folder
    if algorithm.reference:
        store.check_weights(algorithm.reference, world)
        folder = store.weights_of(algorithm.reference)
    reference = build_frozen_policy(config, folder, world)
    reference.sample_from(banned, config.rollout.temperature)
    return reference


def build_frozen_policy(config: RLConfig, folder: Path, world: World) -> Engine:
    """Build a policy that never trains, without gradients or an optimizer."""
    shape = ModelShape.from_hf(folder)
    policy = Engine(shape, config.model.frozen(), config.parallel, world)
    return policy.load(WeightFolder(folder))


def build_rollouts(config: RLConfig, model_folder: Path, processor: Processor, models: Models) -> Rollouts:
    """Start vLLM on this rank with the policy's weights, and graders.  A collective."""
    engine = start_engine(config, model_folder, processor)
    if config.offload:
        # The cache has taken what the trainer's models left free; it must be gone before the policy comes back.
        engine.sleep(deep=True)
    engine.update(models.policy.held())
    return Rollouts(engine, start_graders(config, models.world), processor, config, models.world)


def start_graders(config: RLConfig, world: World) -> GraderPool:
    """Start the processes that grade on this rank; they end with the pool's ``with`` block."""
    reward = config.reward
    # One of each engine's ranks grades.
    tp = config.rollout.tp
    folder = Path(config.run.dir) / "judges"
    judges = Judges(reward.judges, folder, world.rank // tp, world.size // tp)
    return GraderPool(reward.workers, reward.timeout_s, reward.memory_mib, reward.cache, judges)


def start_engine(
    config: RLConfig,
    model_folder: Path,
    processor: Processor,
    group: dist.ProcessGroup | None = None,
) -> RolloutEngine:
    """Start vLLM on this rank without weights, for rollouts and evaluation.  A collective.

    Args:
        config: of the job.
        model_folder: Hugging Face folder of the model.
        processor: the trainer's.
        group: of all ranks that send weights or have an engine; None: all ranks do both.
    """
    trained_tokens = config.rollout.max_model_len
    if not trained_tokens:
        trained_tokens = max(stage.max_tokens for stage in config.curriculum)
    evaluated = evaluated_tokens(config, processor.shape)
    return RolloutEngine(
        model_folder,
        config.rollout,
        processor,
        config.model.dtype,
        max_model_len=max(trained_tokens, evaluated),
        empty=True,  # an update brings the policy's weights
        offload=config.offload and group is None,
        group=group,
    )
