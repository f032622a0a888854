"""Train by multimodal PPO with verifiable rewards; vLLM runs in the trainer's processes (paper, section 3.2)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from ovr_megatron.chat_model import ChatModel
from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.conversion import export_model
from ovr_megatron.checkpoint.manager import CheckpointManager, RunResult
from ovr_megatron.checkpoint.resume import ResumePoint
from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.evaluation.periodic import PeriodicEvaluation
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.advantage_histogram import advantage_metrics
from ovr_megatron.ppo.advantages import Ragged
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.generators import Generators, ahead_of
from ovr_megatron.ppo.iteration import Clock, IterationResult, iterate, learn
from ovr_megatron.ppo.measures import mfu_metrics, sample_texts, spread_metrics
from ovr_megatron.ppo.prompts import PromptState
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.ppo.split_iteration import iterate_split
from ovr_megatron.ppo.timeline import gather_timeline
from ovr_megatron.rewards.rules import RewardFunction
from ovr_megatron.rl.generation import generate
from ovr_megatron.rl.record import record_run, show_start
from ovr_megatron.rl.rehearsal import rehearse
from ovr_megatron.rl.serving import serve
from ovr_megatron.rl.setup import (
    build_models,
    build_rollouts,
    check_names,
    check_parts,
    check_steps,
    count_iterations,
    open_model_and_prompts,
    with_rewards,
)
from ovr_megatron.rl.split import RemoteEvaluation, check_sides, join_generators
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import get_logger, set_step
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import RunLog, open_log
from ovr_megatron.runtime.starts import LaunchArgs
from ovr_megatron.runtime.steps import matrix_rate, peak_gib
from ovr_megatron.runtime.stop import Stop, StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.trackers.protocol import Histogram

logger = get_logger(__name__)


def train(config: RLConfig, world: World, launch: LaunchArgs | None = None) -> RunResult:
    """Run every iteration, or until a signal comes, from the newest checkpoint if there is one.  A collective.

    With ``only=train`` and ``only=critic`` the rollouts are read from ``rollouts_from``, and no engine is started.  A
    rank of ``rollout.ranks`` generates for the others until they are done.
    """
    if world.job and world.job.generates:
        return RunResult(Path(config.run.dir), serve(config, world))
    with RL(config, world, launch) as rl:
        return rl.run()


class RL:
    """Reinforcement learning of a run, iteration by iteration or to its end.  Every method is a collective.

    It goes on from the newest checkpoint of ``run.dir``.  Use it in a ``with`` block, or call `close`.

    Attributes:
        config: the settings, a reward that a program passed under the name of its place.
        world: this process.
        policy: the model that trains, for log-probabilities and samples between the iterations.
        critic: the value network, for values; None where the algorithm has none.
        next_iteration: index of the next iteration, from 0.
        last: the number of iterations after which the run ends.
        rollouts: vLLM and graders; None with ``only=train``, ``only=critic`` and where other ranks generate.
        generators: the ranks that only generate; None without ``rollout.ranks``.
        evaluation: None where it is off, and with ``only=train`` and ``only=critic``.
        log: on the main rank only.
        peak_flops: FLOP per second of a device that the MFU refers to.
    """

    def __init__(
        self,
        config: RLConfig | ColdStartConfig,
        world: World | None = None,
        launch: LaunchArgs | None = None,
        rewards: Mapping[str, RewardFunction] | None = None,
    ):
        """Load the models, start vLLM and graders, and open data, log and checkpoints.

        Args:
            config: settings of a recipe; ``only=rollout`` and ``only=rehearsal`` are for the command alone.
            world: the ranks, where the program has joined them already.
            launch: recipe and overrides of a command line, for the run's record.
            rewards: by source of the rows, functions that grade responses, as `ovr_megatron.rewards.rules.place_of`
                takes them; the same as ``reward.rules`` with the functions' places.

        Raises:
            RuleError: graders cannot import a function.
            UserError: a setting, a model, the data or the run folder cannot work.
        """
        config = with_rewards(config, rewards or {})
        check_sides(config, world)
        with ExitStack() as resources:
            check_names(config)
            if world is None:
                world = resources.enter_context(distributed.process_group(config.run, config.parallel))
            self.config = config
            self.world = world
            self.run_folder = Path(config.run.dir)
            self.checkpoints = self._open_checkpoints(resources)
            if launch is None:
                # A command's process ends with its run: until then a signal must not change the exit code.
                resources.callback(self.checkpoints.stop.close)
            check_steps(config, world)
            check_parts(config, world.size)
            self.skipped = skipped_rows(config.data, self.run_folder, world.is_main)
            model_folder, self.prompts = open_model_and_prompts(config, self.skipped)
            processor = self.prompts.processor
            if world.is_main:
                processor.log_template()
            self.last = count_iterations(config)
            self.models, self.engines = build_models(config, model_folder, processor, world)
            # vLLM takes the memory that they leave free; each is onloaded when it works.
            self.models.offload_except(None)
            checkpoint = self._resume()
            self.generators = self._join_generators(checkpoint, resources)
            self.rollouts = self._start_rollouts(model_folder, resources)
            self._resume_responses(checkpoint)
            self.evaluation = self._build_evaluation()
            self.policy, self.critic = self._chat_models(model_folder)
            self.log = open_log(config, self.next_iteration, world)
            if world.is_main:
                record_run(config, processor, world, launch)
                show_start(config, self.engines, world, checkpoint)
            self.peak_flops = config.run.peak_tflops * 1e12 or matrix_rate(self.models.policy.config.params_dtype)
            self._may_lack_scores = True
            self._stopped = False
            # Empty until an iteration is done; a stop before that saves no checkpoint (`stop_early`).
            self._state: dict[str, object] = {}
            self._resources = resources.pop_all()

    def _open_checkpoints(self, resources: ExitStack) -> CheckpointManager:
        """Enter the run folder, and have ranks that only generate hear of errors and progress from here on."""
        job = self.world.job
        if job:
            resources.push(job.announce)
        checkpoints = CheckpointManager(self.config, self.world)
        if job:
            # The generators wait while the models are loaded.
            resources.enter_context(job.reporting(checkpoints.stop))
        return checkpoints

    def _join_generators(self, checkpoint: ResumePoint | None, resources: ExitStack) -> Generators | None:
        """Bring the weights to the ranks that only generate, which end with ``resources``; None if there are none."""
        if self.world.job is None:
            return None
        stop = self.checkpoints.stop
        generators = join_generators(
            self.config, self.world.job, stop, self.last, lambda: self.checkpoints.result().exit_code, resources
        )
        generators.start(self.models, self.next_iteration, checkpoint, self.run_folder, self.prompts)
        return generators

    def _resume(self) -> ResumePoint | None:
        """Load the newest checkpoint and go to its position in the data; return it, or None without one."""
        checkpoint = self.checkpoints.resume(self.engines)
        self.next_iteration = 0
        if checkpoint:
            self.prompts.load(checkpoint.state["prompts"])
            self.next_iteration = checkpoint.step
            if "warmup" in checkpoint.state:
                self.models.load_warmup(checkpoint.state["warmup"])
                self._end_with_warmup()
        return checkpoint

    def _end_with_warmup(self) -> None:
        """End a run of the critic alone whose warm-up has ended early."""
        warmup = self.models.warmup
        if warmup.critic_only and warmup.end is not None:
            self.last = self.next_iteration

    def _resume_responses(self, checkpoint: ResumePoint | None) -> None:
        """Load the unfinished responses of ``checkpoint``, and have later checkpoints save those of then."""
        if self.generators:
            self.checkpoints.loop_arrays = self.generators.unfinished.tensors
        if self.rollouts is None:
            return
        unfinished = self.rollouts.unfinished
        # Those of a checkpoint of other settings are of an iteration that was generated ahead: they begin again.
        if checkpoint and not ahead_of(checkpoint):
            unfinished.load(store.read_loop_arrays(checkpoint, self.world))
        self.checkpoints.loop_arrays = unfinished.tensors

    def _start_rollouts(self, model_folder: Path, resources: ExitStack) -> Rollouts | None:
        """Start vLLM, and graders, which end with ``resources``; None if no rank generates or others do."""
        if self.config.learns_from_archive or self.generators:
            return None
        rollouts = build_rollouts(self.config, model_folder, self.prompts.processor, self.models)
        rollouts.stop = self.checkpoints.stop
        # The graders are processes, which must end however the loop ends.
        resources.enter_context(rollouts.grader)
        return rollouts

    def _build_evaluation(self) -> PeriodicEvaluation | RemoteEvaluation | None:
        config = self.config
        if not config.evaluation.every:
            return None
        if self.generators:
            return RemoteEvaluation(config, self.generators, self.prompts.processor, self.run_folder)
        if self.rollouts is None:
            return None
        # Rollouts and evaluation share the engine: there is no memory for a second one.
        engine = self.rollouts.engine
        return PeriodicEvaluation(
            config.evaluation, engine, self.prompts.processor, config.rollout.tp, self.run_folder, config.run.seed
        )

    def _chat_models(self, model_folder: Path) -> tuple[ChatModel, ChatModel | None]:
        """Return the models for scores and samples between the iterations."""
        models = self.models
        rest = (self.prompts.processor, self.config, self.world, model_folder)
        policy = ChatModel(models.policy, *rest)
        if self.rollouts:
            # The loop keeps its weights the policy's; its cache needs the memory of the trainer's models.
            policy.rollout = self.rollouts.engine
            policy.make_room = partial(models.offload_except, None)
        critic = ChatModel(models.critic, *rest) if models.critic else None
        return policy, critic

    @property
    def done(self) -> bool:
        """Whether no iteration is left, or a signal has ended the run."""
        return self._stopped or self.next_iteration >= self.last

    @property
    def stopped(self) -> bool:
        """Whether a signal has ended the run before its last iteration; the same program, started again, goes on."""
        return self.checkpoints.stopped > Stop.NO

    def result(self) -> RunResult:
        """Return the last checkpoint and the exit code, 75 where the run is to be started again; call it at the end."""
        return self.checkpoints.result()

    def run(self) -> RunResult:
        """Run the iterations up to the last one or a signal; return the result of the run."""
        name = self.run_folder.name
        with Progress(self.last, name, "iteration", self.world.is_main, self.next_iteration) as progress:
            self._score_resumed()
            while not self.done:
                metrics = self.iterate()
                if metrics is None:
                    break
                reward = metrics["reward/mean"]
                length = metrics["response/length"]
                progress.update(reward=f"{reward:.3f}", length=f"{length:.0f}")
        return self.checkpoints.result()

    def iterate(self) -> dict[str, float] | None:
        """Generate, grade and learn once, log it, and evaluate and save where they are due.

        Returns:
            The metrics as the log has them; None where a signal has ended the run before the iteration was done.

        Raises:
            ConfigError: the run is done, or a signal has ended it.
        """
        if self.stopped:
            raise ConfigError(f"{self.run_folder}: a signal has ended the run; start the same program again to go on")
        if self.done:
            raise ConfigError(f"{self.run_folder}: all {self.last} iterations are done; raise iterations")
        self._score_resumed()
        iteration = self.next_iteration
        set_step(iteration)
        # Before the draw: from here the archived iteration draws its prompts again.
        stream_state = self.prompts.state()
        dropped_before = self.prompts.dropped
        try:
            result = self._learn(iteration)
        except StopRequested:
            if self.rollouts:
                self.rollouts.engine.sleep(deep=True)  # with `offload`, what is saved needs its memory
            self.checkpoints.stop_early(iteration, self.engines, self._state)
            self._stopped = True
            return None
        metrics = result.metrics
        metrics["data/dropped_prompts"] = self.prompts.dropped - dropped_before
        advantages = self._add_metrics(result, iteration)
        timeline = gather_timeline(result.timeline, result.rollout.lengths, result.rollout.limit)
        self._archive(result, iteration, stream_state)
        self._evaluate(result, iteration)
        if self.log:
            self.log.timeline(iteration, timeline)
            if advantages is not None:
                self.log.histogram(iteration, "advantage", advantages)
            self._write_log(self.log, result, iteration)
        self._state = {"prompts": self.prompts.state(), "curriculum": metrics["curriculum/max_tokens"]}
        self.next_iteration += 1
        warmup = self.models.warmup
        # Also in a run that goes on without patience after its warm-up has ended early.
        if warmup.patience or warmup.end is not None:
            self._state["warmup"] = warmup.state()
            self._end_with_warmup()
        if self.generators and self.next_iteration % self.config.run.save_every == 0:
            # Before the checkpoint, which is complete with these responses alone.
            self._state["ahead"] = self.generators.archive_received(self.run_folder, self.prompts, self.world)
        self._stopped = self.checkpoints.end_step(self.next_iteration, self.done, self.engines, self._state)
        return metrics

    def save(self) -> Path:
        """Save a checkpoint of the iterations done, unless it is there, and return its folder.

        Raises:
            CheckpointError: no iteration is done, or it could not be written.
        """
        return self.checkpoints.save(self.next_iteration, self.engines, self._state)

    def export(self, out: str | Path, dtype: str | None = None, critic: bool = False) -> None:
        """Save, and write the policy as a Hugging Face folder, adapters merged.

        Args:
            out: a folder that is not there yet.
            dtype: of its weights; by default that of the run.
            critic: export the critic instead, without its value head.

        Raises:
            CheckpointError: no iteration is done, the checkpoint could not be written, or there is no critic.
        """
        export_model(self.save(), out, dtype, critic)

    def close(self) -> None:
        """Publish the checkpoint that is being written, close log and graders, and leave the other ranks."""
        # The stack gets an error of these, after which other ranks may not come to the collectives of an orderly end.
        with self._resources:
            try:
                self.checkpoints.finish_pending()
            finally:
                self.checkpoints.result()
                if self.log:
                    self.log.close()
                self.log = None

    def __enter__(self) -> Self:
        """Return the run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        # After an error other ranks may not come to the collectives of an orderly end.
        self._resources.__exit__(kind, error, traceback)

    def _learn(self, iteration: int) -> IterationResult:
        """Generate and learn, or learn from archived rollouts.

        Raises:
            StopRequested: a signal came while responses were generated.
        """
        if self.generators:
            goes_on = not self._evaluates(iteration + 1)
            return iterate_split(self.models, self.generators, self.prompts, iteration, goes_on)
        if self.rollouts:
            return iterate(self.models, self.rollouts, self.prompts, iteration)
        return self._learn_archived(iteration)

    def _score_resumed(self) -> None:
        """Score the checkpoint that the run goes on from, if its scores are missing.  A collective."""
        # An earlier start may have saved this checkpoint and ended before it was scored.
        if self.evaluation and self._may_lack_scores and self.evaluation.is_missing(self.next_iteration):
            self.models.offload_except(None)
            scores = self.evaluation.scores(self.next_iteration)
            if self.log:
                self.log.scalars(self.next_iteration - 1, scores)
        self._may_lack_scores = False

    def _learn_archived(self, iteration: int) -> IterationResult:
        """Learn from the rollouts of ``iteration`` in ``rollouts_from``.  A collective."""
        source = Path(self.config.rollouts_from or "")
        saved = archive.read(source, iteration, self.world)
        rollout = archive.restore(saved, self.prompts)
        return learn(self.models, rollout, iteration, Clock())

    def _add_metrics(self, result: IterationResult, iteration: int) -> Histogram | None:
        """Add what the run measures to the metrics of ``result``; return the histogram of the advantages.

        A collective.
        """
        metrics = result.metrics
        # That of the iteration before: this one is saved after its metrics are logged.
        metrics["timing/save"] = self.checkpoints.save_seconds
        if self.skipped is not None:
            metrics["data/skipped_rows"] = self.skipped.count
        for name, engine in self.engines.items():
            metrics[f"{name}/skipped"] = engine.skipped
        metrics["memory/peak_gib"] = peak_gib()
        metrics |= spread_metrics(result.rollout)
        experience = result.experience
        values, advantages = advantage_metrics(experience.advantages, experience.sources, self.world.layout)
        metrics |= values
        metrics |= mfu_metrics(self.models, result.experience, iteration, metrics, self.peak_flops)
        return advantages

    def _archive(self, result: IterationResult, iteration: int, stream_state: PromptState) -> None:
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
        problem = archive.write(self.run_folder, iteration, result.rollout, stream_state, responses, arrays, self.world)
        if problem and self.world.is_main:
            logger.warning(f"the rollouts of iteration {iteration} are not kept ({problem}); training goes on")

    def _evaluates(self, done: int) -> bool:
        """Return whether the weights after ``done`` iterations are to be scored."""
        is_end = done == self.config.iterations
        return self.evaluation is not None and self.evaluation.due(done, is_end)

    def _evaluate(self, result: IterationResult, iteration: int) -> None:
        """Score the new weights where an evaluation is due, and add the scores to ``result``.  A collective."""
        done = iteration + 1
        if self.evaluation and self._evaluates(done):
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


def warn(metrics: dict[str, float], iteration: int, config: RLConfig) -> None:
    """Say what a person should know at once.

    Rollout and trainer disagree, the value head starts too wide, or stale tokens are learned from without a correction.
    """
    if iteration == 0 and config.rollout.max_staleness and config.algorithm.correction is None:
        logger.warning(
            f"rollout.max_staleness={config.rollout.max_staleness} without algorithm.correction: tokens that earlier "
            "weights drew count as the current policy's; algorithm.correction=token_truncate weighs them"
        )
    mismatch = metrics.get("rollout/mismatch_p99", 0.0)
    if metrics.get("rollout/staleness_share/0", 1.0) < 1:
        # Tokens that older weights drew differ by what the policy has learned since, which is no fault.
        mismatch = metrics.get("rollout/mismatch_p99/staleness_0", 0.0)
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
    if config.only in ("rollout", "rehearsal"):
        check_names(config)
        work = generate if config.only == "rollout" else rehearse
        with distributed.process_group(config.run, config.parallel, config.rollout.ranks) as world:
            _show_result(work(config, world), world)
        return 0
    check_names(config)
    with distributed.process_group(config.run, config.parallel, config.rollout.ranks) as world:
        result = train(config, world, launch)
        _show_result(result.path, world)
    return result.exit_code


def _show_result(folder: Path, world: World) -> None:
    if world.is_main and not (world.job and world.job.generates):
        say(f"rl: {folder}", sys.stdout)
