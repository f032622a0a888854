"""Generate for the ranks that train, on the ranks of ``rollout.ranks``: carry out the commands of the trainers."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from ovr_megatron.config import RLConfig
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.evaluation.periodic import PeriodicEvaluation
from ovr_megatron.ppo.generator_commands import (
    Command,
    Continue,
    Delivery,
    End,
    Evaluate,
    EvaluationReply,
    Generate,
    Update,
    deliver,
    receive_groups,
)
from ovr_megatron.ppo.parts import PartSender
from ovr_megatron.ppo.prompts import PromptState, PromptStream
from ovr_megatron.ppo.rollouts import Rollout, Rollouts
from ovr_megatron.rl.setup import open_model_and_prompts, start_engine, start_graders
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.logs import set_step
from ovr_megatron.runtime.split_job import SplitJob
from ovr_megatron.runtime.steps import peak_gib
from ovr_megatron.runtime.stop import Stop, StopRequest, StopRequested


def serve(config: RLConfig, world: World) -> int:
    """Generate, evaluate and take new weights as the trainers say; return the exit code.

    A collective of the generators, beside the trainers' `RL`.

    Raises:
        UserError: a setting, the data or the engine cannot work; the trainers end with it, too.
    """
    job = world.job
    assert job is not None, "the ranks have joined as one side"
    with ExitStack() as resources:
        stop = StopRequest()
        resources.callback(stop.close)
        resources.push(job.announce)
        resources.enter_context(job.reporting(stop))
        server = _Server(config, world, job, stop, resources)
        return server.run()


class _Server:
    """vLLM, graders and the prompt stream of a rank that only generates."""

    def __init__(self, config: RLConfig, world: World, job: SplitJob, stop: StopRequest, resources: ExitStack) -> None:
        self._config = config
        self._job = job
        self._stop = stop
        run = Path(config.run.dir)
        # The trainers draw the same prompts, and list the rows that are left out.
        skipped = skipped_rows(config.data, run, main=False)
        model_folder, self._prompts = open_model_and_prompts(config, skipped)
        processor = self._prompts.processor
        engine = start_engine(config, model_folder, processor, job.group)
        self._engine = engine
        grader = resources.enter_context(start_graders(config, world))
        self._rollouts = Rollouts(engine, grader, processor, config, world)
        self._rollouts.stop = stop
        self._rollouts.endless = config.only == "rehearsal"
        self._evaluation: PeriodicEvaluation | None = None
        if config.evaluation.every:
            self._evaluation = PeriodicEvaluation(
                config.evaluation, engine, processor, config.rollout.tp, run, config.run.seed
            )

    def run(self) -> int:
        """Carry out commands until the one to end; return its exit code."""
        while True:
            self._job.barrier(self._stop)
            command: Command = self._job.broadcast(None, 0)
            if isinstance(command, End):
                return command.code
            if isinstance(command, Update):
                self._engine.update([])
                self._rollouts.version = command.version
            elif isinstance(command, Generate):
                self._generate(command)
            elif isinstance(command, Continue):
                self._rollouts.unfinished.groups = receive_groups(self._job)
            else:
                self._evaluate(command)

    def _generate(self, command: Generate) -> None:
        """Generate an iteration and deliver its responses, or that a signal has stopped it."""
        set_step(command.iteration)
        began = time.perf_counter()
        # The caches of earlier prompts are lost in a restart: without them responses are the same afterwards.
        self._engine.drop_caches()
        _go_to(self._prompts, command)
        part_sender = None
        if self._config.rollout.stream_parts:
            part_sender = PartSender(self._config, self._job)
        self._rollouts.part_sender = part_sender
        try:
            rollout = self._rollouts.collect(self._prompts, command.iteration, command.limit)
        except StopRequested:
            if part_sender:
                part_sender.cancel()
            delivery = Delivery(stopped=self._level())
            deliver(self._job, delivery, [], {}, self._stop)
            return
        # Those that have been sent in parts are there.
        responses = rollout.responses if self._rollouts.leads and not part_sender else []
        rollout.metrics["memory/rollout_peak_gib"] = peak_gib()
        delivery = _delivery(rollout, self._prompts.state(), time.perf_counter() - began)
        deliver(self._job, delivery, responses, self._rollouts.unfinished.groups, self._stop)

    def _evaluate(self, command: Evaluate) -> None:
        """Score the weights and send the scores, or that a signal has stopped it."""
        assert self._evaluation is not None, "the trainers have the same settings"
        try:
            metrics = self._evaluation.scores(command.done, self._stop if command.may_stop else None)
            reply = EvaluationReply(metrics)
        except StopRequested:
            reply = EvaluationReply({}, self._level())
        self._job.barrier(self._stop)
        self._job.broadcast(reply, self._job.trainers)

    def _level(self) -> Stop:
        """Return the signal that has stopped the generators: of this rank or of another one."""
        # A generator that was not asked itself may not have looked at the store yet.
        return max(self._stop.received, self._job.stop_level(), Stop.LEAVE)


def _go_to(prompts: PromptStream, command: Generate) -> None:
    """Go to the position from which the trainers draw the prompts of an iteration."""
    if prompts.state() != command.stream:
        prompts.load(command.stream)


def _delivery(rollout: Rollout, stream: PromptState, seconds: float) -> Delivery:
    """Return what the trainers need of ``rollout`` to draw its prompts and train on its responses."""
    return Delivery(
        stream,
        len(rollout.prompts.rows),
        seconds,
        rollout.train_prompts,
        rollout.metrics,
        rollout.long,
        rollout.postponed,
        rollout.restarted,
        rollout.unfinished,
        rollout.mixed,
    )
