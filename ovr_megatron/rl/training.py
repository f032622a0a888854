"""The loop of multimodal PPO with verifiable rewards; vLLM runs in the trainer's processes (paper, section 3.2)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.checkpoint.manager import CheckpointManager, RunResult
from ovr_megatron.config import ConfigError, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.skipped import skipped_rows
from ovr_megatron.data.stream import open_stream
from ovr_megatron.engine import Engine
from ovr_megatron.evaluation.periodic import PeriodicEvaluation
from ovr_megatron.model.layers import cautions, layers_in_use
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.plan.heading import run_rows, show_heading, source_rows
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.archive import ArchiveError
from ovr_megatron.ppo.curriculum import max_tokens
from ovr_megatron.ppo.experience import Models
from ovr_megatron.ppo.iteration import Clock, iterate, learn, response_metrics
from ovr_megatron.ppo.measures import mfu_metrics, sample_texts, spread_metrics
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.rewards import rules
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import banned_tokens
from ovr_megatron.runtime import distributed, run_folder
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import RunLog, record_layers
from ovr_megatron.runtime.starts import LaunchArgs, record_start
from ovr_megatron.runtime.steps import matrix_rate, memory_peaks, peak_gib
from ovr_megatron.runtime.stop import StopRequested
from ovr_megatron.runtime.terminal import say
from ovr_megatron.runtime.watchdog import Watchdog
from ovr_megatron.weights.folder import WeightFolder


def train(config: RLConfig, world: World, launch: LaunchArgs | None = None) -> RunResult:
    """Run every iteration, or until a signal comes, from the newest checkpoint if there is one.

    With ``only=train`` the rollouts are those that ``rollouts_from`` holds, and no engine is started.
    """
    run = Path(config.run.dir)
    checkpoints = CheckpointManager(config, world)
    source = store.weights_of(config.model.path)
    processor = Processor(source, config.data)
    check_lengths(config, processor.shape)
    check_steps(config, world)
    if world.is_main and processor.template_notice:
        print(processor.template_notice, file=sys.stderr, flush=True)
    skipped = skipped_rows(config.data, run, world.is_main)
    stream = open_stream(config.data, config.run.seed, skipped)
    prompts = PromptStream(stream, processor, config.reward.rules, skipped)
    archived = archive.iterations(Path(config.rollouts_from)) if config.rollouts_from else []
    if config.rollouts_from and not archived:
        raise ArchiveError(f"rollouts_from={config.rollouts_from} has no rollouts; give the run folder of a PPO run")
    models, engines = build_models(config, source, processor, world)
    models.offload_except(None)
    checkpoint = checkpoints.resume(engines)
    if checkpoint:
        stream.load(checkpoint.state["prompts"])
    rollouts = None if config.only == "train" else build_rollouts(config, source, processor, models)
    if rollouts:
        rollouts.stop = checkpoints.stop
    evaluation = None
    if rollouts and config.evaluation.every:
        given = (config.evaluation, rollouts.engine, processor, config.rollout.tp, run, config.run.seed)
        evaluation = PeriodicEvaluation(*given)
    first = checkpoint.step if checkpoint else 0
    last = min(config.iterations, max(archived, default=-1) + 1) if config.only == "train" else config.iterations
    log = RunLog(run, "train", first) if world.is_main else None
    if world.is_main:
        run_folder.record(config, run)
        record_layers(run, layers_in_use(config.model), cautions(config.model, rollout=True))
        if launch:
            record_start(run, launch, world.size)
        write_hf_assets(run / "companions", processor)
        show_start(config, engines, world, (checkpoint.path, checkpoint.step) if checkpoint else None)

    peak_flops = config.run.peak_tflops * 1e12 or matrix_rate(models.policy.config.params_dtype)
    with (
        rollouts.grader if rollouts else nullcontext(),
        Progress(last, run.name, "iteration", world.is_main, first) as progress,
    ):
        if evaluation and evaluation.is_missing(first):
            models.offload_except(None)
            scores = evaluation.scores(first)
            if log:
                log.scalars(first - 1, scores)
        state: dict[str, Any] = {}
        for iteration in range(first, last):
            before, dropped = stream.state(), prompts.dropped
            if rollouts:
                try:
                    outcome = iterate(models, rollouts, prompts.draw, iteration)
                except StopRequested:
                    rollouts.engine.sleep(deep=True)  # with `offload`, what is saved needs its memory
                    checkpoints.stop_early(iteration, engines, state)
                    break
            else:
                saved = archive.read(Path(config.rollouts_from or ""), iteration, world)
                outcome = learn(models, archive.restore(saved, prompts), iteration, Clock())
            outcome.metrics["data/dropped_prompts"] = prompts.dropped - dropped
            outcome.metrics["timing/save"] = checkpoints.save_seconds
            if skipped is not None:
                outcome.metrics["data/skipped_rows"] = skipped.count
            for name, engine in engines.items():
                outcome.metrics[f"{name}/skipped"] = engine.skipped
            outcome.metrics["memory/peak_gib"] = peak_gib()
            outcome.metrics |= spread_metrics(outcome.rollout)
            outcome.metrics |= mfu_metrics(models, outcome.experience, iteration, outcome.metrics, peak_flops)
            own = outcome.experience
            mine = own.responses if world.layout.leads_replica else []
            arrays = {name: getattr(own, name) if mine else None for name in archive.ARRAYS}
            problem = archive.write(run, iteration, outcome.rollout, before, mine, arrays, world)
            if problem and world.is_main:
                say(f"warning: the rollouts of iteration {iteration} are not kept ({problem}); training goes on")
            done = iteration + 1
            if evaluation and evaluation.due(done, done == config.iterations):
                models.offload_except(None)
                with suppress(StopRequested):  # the run leaves below, and its next start scores these weights
                    outcome.metrics |= evaluation.scores(done, None if done == last else checkpoints.stop)
            if log:
                log.scalars(iteration, outcome.metrics)
                for name, text in sample_texts(outcome.rollout.responses).items():
                    log.text(iteration, f"samples/{name}", text)
                warn(outcome.metrics, iteration, config)
            shown = outcome.metrics
            progress.update(reward=f"{shown['reward/mean']:.3f}", length=f"{shown['response/length']:.0f}")
            state = {"prompts": stream.state(), "curriculum": outcome.metrics["curriculum/max_tokens"]}
            if checkpoints.end_step(done, done == last, engines, state):
                break
    if log:
        log.close()
    return checkpoints.result()


def show_start(config: RLConfig, engines: dict[str, Engine], world: World, resumed: tuple[Path, int] | None) -> None:
    """Print what is about to be trained, on what, and from where."""
    begins = [0, *(stage.until for stage in config.curriculum)]
    limits = [(stage.max_tokens, begin) for stage, begin in zip(config.curriculum, begins, strict=False)]
    stages = ", ".join(f"{limit:,} from iteration {begin}" for limit, begin in limits if begin < config.iterations)
    rows = [
        ("batch", f"{config.prompts} prompts x {config.responses} responses an iteration"),
        ("tokens", f"of prompt and response at most: {stages}"),
        ("algorithm", f"{config.algorithm.estimator}, policy_updates={config.algorithm.policy_updates}"),
        *source_rows(config, float(config.iterations * config.prompts)),
        *run_rows(config, engines, world, resumed),
        ("rollouts", f"{world.size // config.rollout.tp} vLLM engines, tp={config.rollout.tp}"),
    ]
    print(show_heading(f"reinforcement learning in {config.run.dir}", rows), flush=True)


def generate(config: RLConfig, world: World) -> Path:
    """Only roll out, ``iterations`` times with the weights of ``model.path``, from the last whole one on."""
    run = Path(config.run.dir)
    run_folder.enter(run, run_folder.ROLLOUTS, world.is_main)
    source = store.weights_of(config.model.path)
    processor = Processor(source, config.data)
    check_lengths(config, processor.shape)
    skipped = skipped_rows(config.data, run, world.is_main)
    stream = open_stream(config.data, config.run.seed, skipped)
    prompts = PromptStream(stream, processor, config.reward.rules, skipped)
    store.check_weights(config.model.path, world)
    models, _ = build_models(config, source, processor, world, training=False)
    rollouts = build_rollouts(config, source, processor, models)
    there = archive.iterations(run)
    first = there[-1] + 1 if there else 0
    if there:
        archive.skip(run, there[-1], prompts)
    if world.is_main:
        run_folder.record(config, run)
    with rollouts.grader, Progress(config.iterations, run.name, "iteration", world.is_main, first) as progress:
        for iteration in range(first, config.iterations):
            before = stream.state()
            rollout = rollouts.collect(prompts.draw, iteration, max_tokens(config.curriculum, iteration))
            kept = [r for r in rollout.responses if r.prompt in rollout.train_prompts]
            if problem := archive.write(run, iteration, rollout, before, kept, {}, world):
                raise ArchiveError(
                    f"the rollouts of iteration {iteration} could not be written: {problem}. Those of {iteration} "
                    f"iterations before it are whole: make room in {run}, then start the same command again"
                )
            progress.update(reward=f"{response_metrics(rollout)['reward/mean']:.3f}")
    return run / "rollouts"


def rehearse(config: RLConfig, world: World) -> Path:
    """One iteration of responses of full length at each stage of the curriculum: seconds and peak memory of each.

    It takes as many prompts as fill all engines, at most those of an iteration, writes ``rehearsal.json`` and keeps no
    weights.
    """
    run = Path(config.run.dir)
    run_folder.enter(run, run_folder.REHEARSAL, world.is_main)
    source = store.weights_of(config.model.path)
    engines = world.size // config.rollout.tp
    needed = max(
        -(-config.rollout.max_num_seqs * engines // config.responses), world.size * config.algorithm.most_steps
    )
    config = replace(config, prompts=min(config.prompts, needed))
    processor = Processor(source, config.data)
    check_lengths(config, processor.shape)
    check_steps(config, world)
    skipped = skipped_rows(config.data, run, world.is_main)
    prompts = PromptStream(open_stream(config.data, config.run.seed, skipped), processor, config.reward.rules, skipped)
    models, _ = build_models(config, source, processor, world)
    models.offload_except(None)
    rollouts = build_rollouts(config, source, processor, models)
    rollouts.endless = True
    told: list[dict[str, Any]] = []
    with rollouts.grader:
        for first, stage in zip([0, *(stage.until for stage in config.curriculum)], config.curriculum, strict=False):
            if first >= config.iterations:
                break
            memory_peaks()  # on a GPU they begin anew
            metrics = iterate(models, rollouts, prompts.draw, first).metrics
            seconds = {key.partition("/")[2]: value for key, value in metrics.items() if key.startswith("timing/")}
            told.append({"max_tokens": stage.max_tokens, "prompts": config.prompts, "peak_gib": peak_gib()})
            told[-1] |= {"length": metrics["response/length"], "seconds": seconds}
            if world.is_main:
                phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
                peak = f"{told[-1]['peak_gib']:.2f} GiB at most"
                say(f"{stage.max_tokens:,} tokens: {peak}; seconds: {phases}", sys.stdout)
    path = run / "rehearsal.json"
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(told, indent=1) + "\n")
    return path


def check_steps(config: RLConfig, world: World) -> None:
    """Refuse an iteration of fewer prompts than replicas, or of fewer responses than optimizer steps.

    Raises:
        ConfigError: names the numbers.
    """
    settings = {"policy_steps": config.parallel}
    if config.algorithm.has_critic:
        settings["critic_steps"] = config.critic.parallel or config.parallel
    responses = config.prompts * config.responses
    for name, parallel in settings.items():
        replicas, steps = parallel.data_parallel(world.size), getattr(config.algorithm, name)
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
    for number, stage in enumerate(config.curriculum):
        shape.check_length(stage.max_tokens, f"curriculum[{number}].max_tokens")


def evaluated_tokens(config: RLConfig, shape: ModelShape) -> int:
    """Return the most tokens of an evaluated prompt and its response together; 0 without evaluation."""
    if not config.evaluation.every:
        return 0
    prompt_tokens = config.data.max_prompt_tokens
    return prompt_tokens + shape.response_limit(config.evaluation.max_tokens, prompt_tokens)


def build_models(
    config: RLConfig, source: Path, processor: Processor, world: World, training: bool = True
) -> tuple[Models, dict[str, Engine]]:
    """The models of an iteration, and by name those that train; without ``training``, a policy to roll out alone."""
    banned = banned_tokens(processor.shape, processor.tokenizer)
    if training:
        engines = build_engines(config, source, world)
        reference = build_reference(config, source, banned, world)
    else:
        engines, reference = {"policy": frozen_policy(config, source, world)}, None
    engines["policy"].sample_from(banned, config.rollout.temperature)
    return Models(config, world, processor, engines["policy"], engines.get("critic"), reference), engines


def build_engines(config: RLConfig, source: Path, world: World) -> dict[str, Engine]:
    """The policy, and where one is needed the critic, which starts from the same weights with a fresh value head."""
    shape, algorithm = ModelShape.from_hf(source), config.algorithm
    policy = Engine(shape, config.model, config.parallel, world)
    store.check_weights(config.model.path, world)
    learning = max(config.iterations - algorithm.critic_warmup_iterations, 1)  # iterations in which the policy moves
    policy.with_optimizer(config.optimizer, learning * algorithm.policy_updates).load(WeightFolder(source))
    if not algorithm.has_critic:
        return {"policy": policy}
    if config.offload:
        policy.offload()  # before the critic takes its memory
    critic = Engine(shape, config.model, config.critic.parallel or config.parallel, world, critic=True)
    critic.with_optimizer(config.critic.optimizer, config.iterations * algorithm.critic_steps)
    start = source
    if config.critic.path:
        store.check_weights(config.critic.path, world, "critic")
        start = store.weights_of(config.critic.path, "critic")
    critic.load(WeightFolder(start), config.critic.head_init, seed=config.run.seed)
    return {"policy": policy, "critic": critic}


def build_reference(config: RLConfig, source: Path, banned: Sequence[int], world: World) -> Engine | None:
    """The frozen policy that ``algorithm.kl_coefficient`` holds the trained one to; None where it is 0."""
    if not config.algorithm.kl_coefficient:
        return None
    folder = source
    if config.algorithm.reference:
        store.check_weights(config.algorithm.reference, world)
        folder = store.weights_of(config.algorithm.reference)
    reference = frozen_policy(config, folder, world)
    reference.sample_from(banned, config.rollout.temperature)
    return reference


def frozen_policy(config: RLConfig, folder: Path, world: World) -> Engine:
    """A policy that never trains, without gradients or an optimizer."""
    frozen = replace(config.model, freeze_vision=True, freeze_merger=True, freeze_language=True)
    return Engine(ModelShape.from_hf(folder), frozen, config.parallel, world).load(WeightFolder(folder))


def build_rollouts(config: RLConfig, source: Path, processor: Processor, models: Models) -> Rollouts:
    """VLLM on this rank with the policy's weights, and graders."""
    engine = RolloutEngine(
        source,
        config.rollout,
        processor,
        config.model.dtype,
        max_model_len=max(
            config.rollout.max_model_len or max(stage.max_tokens for stage in config.curriculum),
            evaluated_tokens(config, processor.shape),
        ),
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
        say(
            f"warning: iteration {iteration}: a hundredth of the tokens' log-probabilities differ by {mismatch:.2e} or "
            f"more between rollout and trainer (rollout.mismatch_warning={config.rollout.mismatch_warning:g})"
        )
    spread = metrics.get("critic/value_std", 0.0)
    if iteration == 0 and spread > 1:
        say(f"warning: initial values spread by {spread:.1f}: see critic.head_init")


def run(config: RLConfig, launch: LaunchArgs | None = None) -> int:
    """Join the process group, train or roll out, and say where the result lies; return the exit code."""
    for name in config.reward.rules.values():
        rules.check(name)
    settings = config.run
    with Watchdog(Path(settings.dir), settings.hang_timeout_s):
        world = distributed.start(config.parallel, settings.seed, settings.threads, settings.hang_timeout_s)
        if config.only in ("rollout", "rehearsal"):
            folder, code = (generate if config.only == "rollout" else rehearse)(config, world), 0
        else:
            result = train(config, world, launch)
            folder, code = result.path, result.exit_code
        if world.is_main:
            say(f"rl: {folder}", sys.stdout)
        distributed.finish()
    return code
