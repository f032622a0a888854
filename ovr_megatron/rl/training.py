"""Train by multimodal PPO with verifiable rewards; vLLM runs in the trainer's processes (paper, section 3.2)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.checkpoint.manager import CheckpointManager, RunResult
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.config import RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.data.stream import StreamState
from ovr_megatron.engine import Engine
from ovr_megatron.evaluation.periodic import PeriodicEvaluation
from ovr_megatron.model.layers import cautions, layers_in_use
from ovr_megatron.plan.heading import run_rows, show_heading, source_rows
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.archive import ArchiveError
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.curriculum import stage_starts
from ovr_megatron.ppo.iteration import Clock, IterationResult, iterate, learn
from ovr_megatron.ppo.losses import find_loss
from ovr_megatron.ppo.measures import mfu_metrics, sample_texts, spread_metrics
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rewards import rules
from ovr_megatron.rl.generation import generate
from ovr_megatron.rl.rehearsal import rehearse
from ovr_megatron.rl.setup import build_models, build_rollouts, check_steps, open_model_and_prompts
from ovr_megatron.runtime import distributed, run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.folder_kinds import describe_folder
from ovr_megatron.runtime.logs import NOTICE, get_logger, set_step
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import RunLog, open_log, record_layers
from ovr_megatron.runtime.starts import LaunchArgs, record_start
from ovr_megatron.runtime.steps import matrix_rate, peak_gib
from ovr_megatron.runtime.stop import StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.trackers.table import check_trackers
from ovr_megatron.runtime.watchdog import Watchdog

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
        self.first = 0
        if checkpoint:
            self.stream.load(checkpoint.state["prompts"])
            self.first = checkpoint.step
        self.rollouts: Rollouts | None = None
        self.evaluation: PeriodicEvaluation | None = None
        if config.only != "train":
            self.rollouts = build_rollouts(config, model_folder, processor, self.models)
            self.rollouts.stop = self.checkpoints.stop
            if config.evaluation.every:
                # Rollouts and evaluation share the engine: there is no memory for a second one.
                engine = self.rollouts.engine
                self.evaluation = PeriodicEvaluation(
                    config.evaluation, engine, processor, config.rollout.tp, self.run, config.run.seed
                )
        self.log = open_log(config, self.first, world)
        if world.is_main:
            record_run(config, processor, world, launch)
            show_start(config, self.engines, world, checkpoint)
        self.peak_flops = config.run.peak_tflops * 1e12
        if not self.peak_flops:
            self.peak_flops = matrix_rate(self.models.policy.config.params_dtype)

    def train(self) -> RunResult:
        """Run the iterations up to the last one or a signal.  A collective."""
        # The graders are processes, which end with the block, however the loop ends.
        with (
            self.rollouts.grader if self.rollouts else nullcontext(),
            Progress(self.last, self.run.name, "iteration", self.world.is_main, self.first) as progress,
        ):
            self._score_resumed()
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
                    result = self._learn_archived(iteration)
                metrics = result.metrics
                metrics["data/dropped_prompts"] = self.prompts.dropped - dropped_before
                self._add_metrics(result, iteration)
                self._archive(result, iteration, stream_state)
                self._evaluate(result, iteration)
                if self.log:
                    self._write_log(self.log, result, iteration)
                reward = metrics["reward/mean"]
                length = metrics["response/length"]
                progress.update(reward=f"{reward:.3f}", length=f"{length:.0f}")
                state = {"prompts": self.stream.state(), "curriculum": metrics["curriculum/max_tokens"]}
                done = iteration + 1
                is_last = done == self.last
                if self.checkpoints.end_step(done, is_last, self.engines, state):
                    break
        if self.log:
            self.log.close()
        return self.checkpoints.result()

    def _score_resumed(self) -> None:
        """Score the checkpoint that the run goes on from, if its scores are missing.  A collective."""
        # An earlier start may have saved this checkpoint and ended before it was scored.
        if self.evaluation and self.evaluation.is_missing(self.first):
            self.models.offload_except(None)
            scores = self.evaluation.scores(self.first)
            if self.log:
                self.log.scalars(self.first - 1, scores)

    def _learn_archived(self, iteration: int) -> IterationResult:
        """Learn from the rollouts of ``iteration`` in ``rollouts_from``.  A collective."""
        source = Path(self.config.rollouts_from or "")
        saved = archive.read(source, iteration, self.world)
        rollout = archive.restore(saved, self.prompts)
        return learn(self.models, rollout, iteration, Clock())

    def _add_metrics(self, result: IterationResult, iteration: int) -> None:
        """Add what the run measures to the metrics of ``result``.  A collective."""
        metrics = result.metrics
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
        responses: list[Response] = []
        arrays: dict[str, Ragged | None] = {}
        if self.world.layout.leads_replica:
            responses = experience.responses
            for name in archive.ARRAYS:
                arrays[name] = getattr(experience, name)
        problem = archive.write(self.run, iteration, result.rollout, stream_state, responses, arrays, self.world)
        if problem and self.world.is_main:
            logger.warning(f"the rollouts of iteration {iteration} are not kept ({problem}); training goes on")

    def _evaluate(self, result: IterationResult, iteration: int) -> None:
        """Score the new weights where an evaluation is due, and add the scores to ``result``.  A collective."""
        done = iteration + 1
        is_end = done == self.config.iterations
        if self.evaluation and self.evaluation.due(done, is_end):
            self.models.offload_except(None)
            # Scores of the last iteration are made whatever signal comes: no later start would make them.
            stop = None if done == self.last else self.checkpoints.stop
            with suppress(StopRequested):  # `end_step` ends the run, and its next start scores these weights
                result.metrics |= self.evaluation.scores(done, stop)

    def _write_log(self, log: RunLog, result: IterationResult, iteration: int) -> None:
        """Log metrics and two responses to read, and say what is out of bounds."""
        metrics = result.metrics
        log.scalars(iteration, metrics)
        texts = sample_texts(result.rollout.responses)
        for name, text in texts.items():
            log.text(iteration, f"samples/{name}", text)
        warn(metrics, iteration, self.config)


def count_iterations(config: RLConfig) -> int:
    """Return the number of iterations of the run; with ``only=train`` it ends with the archived rollouts.

    Raises:
        ArchiveError: ``rollouts_from`` has no rollouts.
    """
    archived: list[int] = []
    if config.rollouts_from:
        archived = archive.iterations(Path(config.rollouts_from))
        if not archived:
            problem = f"rollouts_from={config.rollouts_from} has no rollouts; give the run folder of a PPO run"
            raise ArchiveError(describe_folder(config.rollouts_from, "run") or problem)
    if config.only == "train":
        archived_end = max(archived, default=-1) + 1
        return min(config.iterations, archived_end)
    return config.iterations


def record_run(config: RLConfig, processor: Processor, world: World, launch: LaunchArgs | None) -> None:
    """Write settings, layers, the start and the Hugging Face files of the model into the run folder."""
    run = Path(config.run.dir)
    run_folder.record(config, run)
    layers = layers_in_use(config.model)
    record_layers(run, layers, cautions(config.model, rollout=True))
    if launch:
        record_start(run, launch, world.size)
    write_hf_assets(run / "companions", processor)


def show_start(config: RLConfig, engines: dict[str, Engine], world: World, checkpoint: ResumePoint | None) -> None:
    """Print the heading of the run: batch, curriculum, algorithm, data, models, and the checkpoint it goes on from."""
    algorithm = config.algorithm
    total_prompts = float(config.iterations * config.prompts)
    replicas = world.size // config.rollout.tp
    resumed = None
    if checkpoint:
        resumed = (checkpoint.path, checkpoint.step)
    rows = [
        ("batch", f"{config.prompts} prompts x {config.responses} responses an iteration"),
        ("tokens", f"of prompt and response at most: {describe_curriculum(config)}"),
        ("algorithm", f"{algorithm.estimator}, policy_updates={algorithm.policy_updates}"),
        *source_rows(config, total_prompts),
        *run_rows(config, engines, world, resumed),
        ("rollouts", f"{replicas} vLLM engines, tp={config.rollout.tp}"),
    ]
    logger.info(show_heading(f"reinforcement learning in {config.run.dir}", rows))


def describe_curriculum(config: RLConfig) -> str:
    """Return the length limit of each stage that the run comes to, and where it begins."""
    limits = []
    for first_iteration, stage in zip(stage_starts(config.curriculum), config.curriculum, strict=True):
        if first_iteration < config.iterations:
            limits.append(f"{stage.max_tokens:,} from iteration {first_iteration}")
    return ", ".join(limits)


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
