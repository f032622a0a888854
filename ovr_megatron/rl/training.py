"""Train by multimodal PPO with verifiable rewards; vLLM runs in the trainer's processes (paper, section 3.2)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.checkpoint.manager import CheckpointManager, RunResult
from ovr_megatron.config import ConfigError, LoraConfig, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.skipped import SkippedRows, skipped_rows
from ovr_megatron.data.stream import StreamState, open_stream
from ovr_megatron.engine import Engine
from ovr_megatron.evaluation.periodic import PeriodicEvaluation
from ovr_megatron.families import ModelShape
from ovr_megatron.model.layers import cautions, layers_in_use
from ovr_megatron.plan.heading import run_rows, show_heading, source_rows
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.archive import ArchiveError
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.iteration import Clock, IterationResult, iterate, learn, response_metrics
from ovr_megatron.ppo.losses import find_loss
from ovr_megatron.ppo.measures import mfu_metrics, sample_texts, spread_metrics
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rewards import rules
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import banned_tokens
from ovr_megatron.runtime import distributed, run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.files import write_json
from ovr_megatron.runtime.logs import NOTICE, get_logger, set_step
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import RunLog, open_log, record_layers
from ovr_megatron.runtime.starts import LaunchArgs, record_start
from ovr_megatron.runtime.steps import matrix_rate, memory_peaks, peak_gib
from ovr_megatron.runtime.stop import StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.trackers.table import check_trackers
from ovr_megatron.runtime.watchdog import Watchdog
from ovr_megatron.weights.folder import WeightFolder

logger = get_logger(__name__)


def train(config: RLConfig, world: World, launch: LaunchArgs | None = None) -> RunResult:
    """Run every iteration, or until a signal comes, from the newest checkpoint if there is one.  A collective.

    With ``only=train`` the rollouts are read from ``rollouts_from``, and no engine is started.
    """
    return PPOTrainer(config, world, launch).train()


class PPOTrainer:
    """The models, prompts and records of a run, and the loop over its iterations.

    Attributes:
        first: the iteration to begin with.
        last: the number of iterations after which the run ends.
        rollouts: None with ``only=train``.
        evaluation: None where it is off, and with ``only=train``.
        log: on the main rank only.
        peak_flops: FLOP per second of a device that the MFU refers to.
    """

    def __init__(self, config: RLConfig, world: World, launch: LaunchArgs | None):
        self.config = config
        self.world = world
        self.run = Path(config.run.dir)
        self.checkpoints = CheckpointManager(config, world)
        check_steps(config, world)
        self.skipped = skipped_rows(config.data, self.run, world.is_main)
        model_folder, self.prompts = open_model_and_prompts(config, self.skipped)
        self.stream = self.prompts.stream
        processor = self.prompts.processor
        if world.is_main and processor.template_notice:
            logger.log(NOTICE, processor.template_notice)
        self.last = count_iterations(config)
        self.models, self.engines = build_models(config, model_folder, processor, world)
        # vLLM takes the memory that they leave free; each is onloaded when it works.
        self.models.offload_except(None)
        checkpoint = self.checkpoints.resume(self.engines)
        if checkpoint:
            self.stream.load(checkpoint.state["prompts"])
        self.first = checkpoint.step if checkpoint else 0
        self.rollouts: Rollouts | None = None
        self.evaluation: PeriodicEvaluation | None = None
        if config.only != "train":
            self.rollouts = build_rollouts(config, model_folder, processor, self.models)
            self.rollouts.stop = self.checkpoints.stop
            if config.evaluation.every:
                self.evaluation = PeriodicEvaluation(
                    config.evaluation, self.rollouts.engine, processor, config.rollout.tp, self.run, config.run.seed
                )
        self.log = open_log(config, self.first, world)
        if world.is_main:
            record_run(config, processor, world, launch)
            show_start(config, self.engines, world, (checkpoint.path, checkpoint.step) if checkpoint else None)
        self.peak_flops = config.run.peak_tflops * 1e12 or matrix_rate(self.models.policy.config.params_dtype)

    def train(self) -> RunResult:
        """Run the iterations up to the last one or a signal.  A collective."""
        with (
            self.rollouts.grader if self.rollouts else nullcontext(),
            Progress(self.last, self.run.name, "iteration", self.world.is_main, self.first) as progress,
        ):
            # An earlier start may have saved this checkpoint and ended before it was scored.
            if self.evaluation and self.evaluation.is_missing(self.first):
                self.models.offload_except(None)
                scores = self.evaluation.scores(self.first)
                if self.log:
                    self.log.scalars(self.first - 1, scores)
            # Empty until an iteration is done; a stop before that saves no checkpoint (`stop_early`).
            state: Mapping[str, object] = {}
            for iteration in range(self.first, self.last):
                set_step(iteration)
                # Before the draw: from here the archived iteration draws its prompts again.
                stream_state = self.stream.state()
                dropped_before = self.prompts.dropped
                if self.rollouts:
                    try:
                        result = iterate(self.models, self.rollouts, self.prompts.draw, iteration)
                    except StopRequested:
                        self.rollouts.engine.sleep(deep=True)  # with `offload`, what is saved needs its memory
                        self.checkpoints.stop_early(iteration, self.engines, state)
                        break
                else:
                    saved = archive.read(Path(self.config.rollouts_from or ""), iteration, self.world)
                    result = learn(self.models, archive.restore(saved, self.prompts), iteration, Clock())
                self._add_metrics(result, iteration, self.prompts.dropped - dropped_before)
                self._archive(result, iteration, stream_state)
                self._evaluate(result, iteration)
                metrics = result.metrics
                if self.log:
                    self._write_log(self.log, result, iteration)
                progress.update(reward=f"{metrics['reward/mean']:.3f}", length=f"{metrics['response/length']:.0f}")
                state = {"prompts": self.stream.state(), "curriculum": metrics["curriculum/max_tokens"]}
                done = iteration + 1
                if self.checkpoints.end_step(done, done == self.last, self.engines, state):
                    break
        if self.log:
            self.log.close()
        return self.checkpoints.result()

    def _add_metrics(self, result: IterationResult, iteration: int, dropped_prompts: int) -> None:
        """Add what the run measures to the metrics of ``result``.  A collective."""
        metrics = result.metrics
        metrics["data/dropped_prompts"] = dropped_prompts
        # That of the iteration before: this one is saved after its metrics are logged.
        metrics["timing/save"] = self.checkpoints.save_seconds
        if self.skipped is not None:
            metrics["data/skipped_rows"] = self.skipped.count
        for name, engine in self.engines.items():
            metrics[f"{name}/skipped"] = engine.skipped
        metrics["memory/peak_gib"] = peak_gib()
        metrics |= spread_metrics(result.rollout)
        metrics |= mfu_metrics(self.models, result.experience, iteration, metrics, self.peak_flops)

    def _archive(self, result: IterationResult, iteration: int, stream_state: StreamState) -> None:
        """Archive the rollouts of ``result``; a full disk is a warning.  A collective.

        ``stream_state`` is that of the prompt stream before the iteration.
        """
        experience = result.experience
        # The ranks of a replica hold the same responses: its leader alone writes them.
        responses = experience.responses if self.world.layout.leads_replica else []
        arrays = {name: getattr(experience, name) if responses else None for name in archive.ARRAYS}
        problem = archive.write(self.run, iteration, result.rollout, stream_state, responses, arrays, self.world)
        if problem and self.world.is_main:
            logger.warning(f"the rollouts of iteration {iteration} are not kept ({problem}); training goes on")

    def _evaluate(self, result: IterationResult, iteration: int) -> None:
        """Score the new weights where an evaluation is due, and add the scores to ``result``.  A collective."""
        done = iteration + 1
        if self.evaluation and self.evaluation.due(done, done == self.config.iterations):
            self.models.offload_except(None)
            stop = None if done == self.last else self.checkpoints.stop
            with suppress(StopRequested):  # `end_step` ends the run, and its next start scores these weights
                result.metrics |= self.evaluation.scores(done, stop)

    def _write_log(self, log: RunLog, result: IterationResult, iteration: int) -> None:
        """Log metrics and two responses to read, and say what is out of bounds."""
        log.scalars(iteration, result.metrics)
        for name, text in sample_texts(result.rollout.responses).items():
            log.text(iteration, f"samples/{name}", text)
        warn(result.metrics, iteration, self.config)


def count_iterations(config: RLConfig) -> int:
    """Return the number of iterations of the run; with ``only=train`` it ends with the archived rollouts.

    Raises:
        ArchiveError: ``rollouts_from`` has no rollouts.
    """
    archived = archive.iterations(Path(config.rollouts_from)) if config.rollouts_from else []
    if config.rollouts_from and not archived:
        raise ArchiveError(f"rollouts_from={config.rollouts_from} has no rollouts; give the run folder of a PPO run")
    if config.only == "train":
        return min(config.iterations, max(archived, default=-1) + 1)
    return config.iterations


def record_run(config: RLConfig, processor: Processor, world: World, launch: LaunchArgs | None) -> None:
    """Write settings, layers, the start and the Hugging Face files of the model into the run folder."""
    run = Path(config.run.dir)
    run_folder.record(config, run)
    record_layers(run, layers_in_use(config.model), cautions(config.model, rollout=True))
    if launch:
        record_start(run, launch, world.size)
    write_hf_assets(run / "companions", processor)


def show_start(config: RLConfig, engines: dict[str, Engine], world: World, resumed: tuple[Path, int] | None) -> None:
    """Print the heading of the run: batch, curriculum, algorithm, data, models, and the checkpoint it goes on from."""
    stages = []
    for first_iteration, stage in zip(stage_starts(config), config.curriculum, strict=True):
        if first_iteration < config.iterations:
            stages.append(f"{stage.max_tokens:,} from iteration {first_iteration}")
    rows = [
        ("batch", f"{config.prompts} prompts x {config.responses} responses an iteration"),
        ("tokens", f"of prompt and response at most: {', '.join(stages)}"),
        ("algorithm", f"{config.algorithm.estimator}, policy_updates={config.algorithm.policy_updates}"),
        *source_rows(config, float(config.iterations * config.prompts)),
        *run_rows(config, engines, world, resumed),
        ("rollouts", f"{world.size // config.rollout.tp} vLLM engines, tp={config.rollout.tp}"),
    ]
    logger.info(show_heading(f"reinforcement learning in {config.run.dir}", rows))


def stage_starts(config: RLConfig) -> list[int]:
    """Return the first iteration of each stage of the curriculum."""
    return [0, *(stage.until for stage in config.curriculum[:-1])]


def generate(config: RLConfig, world: World) -> Path:
    """Only roll out, ``iterations`` times with the weights of ``model.path``, and archive it.  A collective.

    A run folder that has some iterations already goes on after the last complete one.

    Raises:
        ArchiveError: the disk is full, or an earlier iteration is damaged.
    """
    run = Path(config.run.dir)
    run_folder.enter(run, run_folder.ROLLOUTS, world.is_main)
    model_folder, prompts = open_model_and_prompts(config, skipped_rows(config.data, run, world.is_main))
    store.check_weights(config.model.path, world)
    models, _ = build_models(config, model_folder, prompts.processor, world, training=False)
    rollouts = build_rollouts(config, model_folder, prompts.processor, models)
    archived = archive.iterations(run)
    first = archived[-1] + 1 if archived else 0
    if archived:
        archive.skip(run, archived[-1], prompts)
    if world.is_main:
        run_folder.record(config, run)
    with rollouts.grader, Progress(config.iterations, run.name, "iteration", world.is_main, first) as progress:
        for iteration in range(first, config.iterations):
            set_step(iteration)
            # Before the draw: from here ``only=train`` draws the prompts again.
            stream_state = prompts.stream.state()
            rollout = rollouts.collect(prompts.draw, iteration, max_tokens(config.curriculum, iteration))
            # Not exchanged: no rank trains on them, and each writes what its own engine has generated.
            responses = [r for r in rollout.responses if r.prompt in rollout.train_prompts]
            if problem := archive.write(run, iteration, rollout, stream_state, responses, {}, world):
                raise ArchiveError(
                    f"the rollouts of iteration {iteration} could not be written: {problem}. Those of {iteration} "
                    f"iterations before it are whole: make room in {run}, then start the same command again"
                )
            progress.update(reward=f"{response_metrics(rollout)['reward/mean']:.3f}")
    return run / "rollouts"


class RehearsedStage(TypedDict):
    """An entry of ``rehearsal.json``: one iteration at the length limit of a stage of the curriculum.

    Attributes:
        max_tokens: most tokens of a prompt and its response together.
        prompts: of the iteration.
        length: mean tokens of a response.
        seconds: by phase.
    """

    max_tokens: int
    prompts: int
    peak_gib: float
    length: float
    seconds: dict[str, float]


def rehearse(config: RLConfig, world: World) -> Path:
    """Run one iteration of responses of full length at each stage of the curriculum, and measure it.  A collective.

    It takes as many prompts as fill all engines, at most those of an iteration, writes seconds and peak memory of each
    stage to ``rehearsal.json`` and keeps no weights.
    """
    run = Path(config.run.dir)
    run_folder.enter(run, run_folder.REHEARSAL, world.is_main)
    config = replace(config, prompts=min(config.prompts, rehearsal_prompts(config, world)))
    check_steps(config, world)
    model_folder, prompts = open_model_and_prompts(config, skipped_rows(config.data, run, world.is_main))
    models, _ = build_models(config, model_folder, prompts.processor, world)
    models.offload_except(None)
    rollouts = build_rollouts(config, model_folder, prompts.processor, models)
    # The longest responses that the limit allows take the most time and memory, which is what is measured.
    rollouts.endless = True
    measurements: list[RehearsedStage] = []
    with rollouts.grader:
        for first_iteration, stage in zip(stage_starts(config), config.curriculum, strict=True):
            if first_iteration >= config.iterations:
                break
            memory_peaks()  # on a GPU they begin anew
            metrics = iterate(models, rollouts, prompts.draw, first_iteration).metrics
            timings = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith("timing/")}
            measurement: RehearsedStage = {
                "max_tokens": stage.max_tokens,
                "prompts": config.prompts,
                "peak_gib": peak_gib(),
                "length": metrics["response/length"],
                "seconds": timings,
            }
            measurements.append(measurement)
            if world.is_main:
                phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in timings.items())
                peak = f"{measurement['peak_gib']:.2f} GiB at most"
                logger.info(f"{stage.max_tokens:,} tokens: {peak}; seconds: {phases}")
    path = run / "rehearsal.json"
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        write_json(path, measurements, indent=1)
    return path


def rehearsal_prompts(config: RLConfig, world: World) -> int:
    """Return how many prompts fill all engines and give every rank responses for every optimizer step."""
    replicas = world.size // config.rollout.tp
    prompts_to_fill = -(-config.rollout.max_num_seqs * replicas // config.responses)  # rounded up
    return max(prompts_to_fill, world.size * config.algorithm.most_steps)


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
    return model_folder, PromptStream(stream, processor, config.reward.rules, skipped)


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


def check_lengths(config: RLConfig, shape: ModelShape) -> None:
    """Refuse lengths of prompt and response together that the model has no positions for.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    shape.check_length(config.rollout.max_model_len, "rollout.max_model_len")
    shape.check_length(evaluated_tokens(config, shape), "data.max_prompt_tokens with evaluation.max_tokens")
    for index, stage in enumerate(config.curriculum):
        shape.check_length(stage.max_tokens, f"curriculum[{index}].max_tokens")


def evaluated_tokens(config: RLConfig, shape: ModelShape) -> int:
    """Return the most tokens of an evaluated prompt and its response together; 0 without evaluation."""
    if not config.evaluation.every:
        return 0
    prompt_tokens = config.data.max_prompt_tokens
    return prompt_tokens + shape.response_limit(config.evaluation.max_tokens, prompt_tokens)


def build_models(
    config: RLConfig, model_folder: Path, processor: Processor, world: World, training: bool = True
) -> tuple[Models, dict[str, Engine]]:
    """Build the models of an iteration; return them, and by name those that train.

    Without ``training`` it is a policy to roll out, which stands in the dictionary though it does not train.
    """
    banned = banned_tokens(processor.shape, processor.tokenizer)
    reference = None
    if training:
        engines = build_engines(config, model_folder, world)
        if config.model.lora.rank and config.algorithm.kl_coefficient and not config.algorithm.reference:
            reference = engines["policy"]  # without its adapters it is the initial policy
        else:
            reference = build_reference(config, model_folder, banned, world)
    else:
        engines = {"policy": build_frozen_policy(config, model_folder, world)}
    policy = engines["policy"]
    # As the engine samples, so that log-probabilities of both are of the same distribution.
    policy.sample_from(banned, config.rollout.temperature)
    return Models(config, world, processor, policy, engines.get("critic"), reference), engines


def build_engines(config: RLConfig, model_folder: Path, world: World) -> dict[str, Engine]:
    """Build the policy, and where the algorithm needs one the critic.

    The critic starts from the same weights, or those of ``critic.path``, with a fresh value head.
    """
    shape = ModelShape.from_hf(model_folder)
    algorithm = config.algorithm
    policy = Engine(shape, config.model, config.parallel, world)
    store.check_weights(config.model.path, world)
    # The learning rate follows the iterations in which the policy moves.
    policy_iterations = max(config.iterations - algorithm.critic_warmup_iterations, 1)
    policy.with_optimizer(config.optimizer, policy_iterations * algorithm.policy_updates)
    policy.load(WeightFolder(model_folder), seed=config.run.seed)
    if not algorithm.has_critic:
        return {"policy": policy}
    if config.offload:
        policy.offload()  # before the critic takes its memory
    critic = Engine(shape, config.model, config.critic.parallel or config.parallel, world, critic=True)
    critic.with_optimizer(config.critic.optimizer, config.iterations * algorithm.critic_steps)
    critic_folder = model_folder
    if config.critic.path:
        store.check_weights(config.critic.path, world, "critic")
        critic_folder = store.weights_of(config.critic.path, "critic")
    critic.load(WeightFolder(critic_folder), config.critic.head_init, seed=config.run.seed)
    return {"policy": policy, "critic": critic}


def build_reference(config: RLConfig, model_folder: Path, banned: Sequence[int], world: World) -> Engine | None:
    """Build the frozen policy whose divergence ``algorithm.kl_coefficient`` weighs; None where that is 0."""
    if not config.algorithm.kl_coefficient:
        return None
    folder = model_folder
    if config.algorithm.reference:
        store.check_weights(config.algorithm.reference, world)
        folder = store.weights_of(config.algorithm.reference)
    reference = build_frozen_policy(config, folder, world)
    reference.sample_from(banned, config.rollout.temperature)
    return reference


def build_frozen_policy(config: RLConfig, folder: Path, world: World) -> Engine:
    """Build a policy that never trains, without gradients or an optimizer."""
    frozen = replace(config.model, freeze_vision=True, freeze_merger=True, freeze_language=True, lora=LoraConfig())
    return Engine(ModelShape.from_hf(folder), frozen, config.parallel, world).load(WeightFolder(folder))


def build_rollouts(config: RLConfig, model_folder: Path, processor: Processor, models: Models) -> Rollouts:
    """Start vLLM on this rank with the policy's weights, and graders.  A collective."""
    trained_tokens = config.rollout.max_model_len or max(stage.max_tokens for stage in config.curriculum)
    engine = RolloutEngine(
        model_folder,
        config.rollout,
        processor,
        config.model.dtype,
        max_model_len=max(trained_tokens, evaluated_tokens(config, processor.shape)),
        empty=True,
        offload=config.offload,
    )
    if config.offload:
        # The cache has taken what the trainer's models left free; it must be gone before the policy comes back.
        engine.sleep(deep=True)
    engine.update(models.policy.held())
    reward = config.reward
    grader = GraderPool(reward.workers, reward.timeout_s, reward.memory_mib, reward.cache)
    return Rollouts(engine, grader, processor, config, models.world)


def warn(metrics: dict[str, float], iteration: int, config: RLConfig) -> None:
    """Say what a person should know at once: rollout and trainer disagree, or the value head starts too wide."""
    mismatch = metrics.get("rollout/mismatch_p99", 0.0)
    if mismatch > config.rollout.mismatch_warning:
        logger.warning(
            f"iteration {iteration}: a hundredth of the tokens' log-probabilities differ by {mismatch:.2e} or "
            f"more between rollout and trainer (rollout.mismatch_warning={config.rollout.mismatch_warning:g})"
        )
    spread = metrics.get("critic/value_std", 0.0)
    if iteration == 0 and spread > 1:
        logger.warning(f"initial values spread by {spread:.1f}: see critic.head_init")


def run(config: RLConfig, launch: LaunchArgs | None = None) -> int:
    """Join the process group, train or roll out, and say where the result lies; return the exit code."""
    for name in config.reward.rules.values():
        rules.check(name)
    find_loss(config.algorithm.loss)  # refuses an unknown name before any model is loaded
    settings = config.run
    check_trackers(settings.trackers)
    with Watchdog(Path(settings.dir), settings.hang_timeout_s):
        world = distributed.start(config.parallel, settings.seed, settings.threads, settings.hang_timeout_s)
        code = 0
        if config.only == "rollout":
            folder = generate(config, world)
        elif config.only == "rehearsal":
            folder = rehearse(config, world)
        else:
            result = train(config, world, launch)
            folder = result.path
            code = result.exit_code
        if world.is_main:
            say(f"rl: {folder}", sys.stdout)
        distributed.finish()
    return code
