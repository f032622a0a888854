"""Stage 2: multimodal PPO with verifiable rewards, vLLM in the trainer's own processes (paper, section 3.2).

``python -m ovr_megatron.rl --config-name tiny_rl run.dir=RUN model.path=COLD_START``; under ``torchrun`` or ``srun``
for more than one process.  The same command on the same run folder goes on where the run ended.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from ovr_megatron import config as configuration
from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.companions import write_companions
from ovr_megatron.checkpoint.keeper import Ended, Keeper
from ovr_megatron.config import ConfigError, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row, RowError
from ovr_megatron.data.stream import RowStream, open_stream
from ovr_megatron.engine import Engine
from ovr_megatron.evaluation.periodic import PeriodicEvaluation
from ovr_megatron.launch import USER_ERRORS, launch
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.ppo.iteration import Learner, Outcome, iterate
from ovr_megatron.rewards.choice import verifiable
from ovr_megatron.rewards.pool import GraderPool
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import RolloutError
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import RunLog
from ovr_megatron.runtime.steps import peak_gib
from ovr_megatron.runtime.watchdog import Watchdog
from ovr_megatron.weights.folder import WeightFolder

PICTURES_PER_ITERATION = 2
MOST_DROPPED = 10_000


def train(config: RLConfig, world: World) -> Ended:
    """Run every iteration, or until a signal comes, from the newest checkpoint if there is one."""
    run, keeper = Path(config.run.dir), Keeper(config.run, world)
    source = store.weights_of(config.model.path)
    processor = Processor(source, config.data)
    check_lengths(config, processor.shape)
    stream = open_stream(config.data, config.run.seed)
    mine = config.prompts // world.dp_size * config.responses
    if mine < config.algorithm.critic_steps:
        raise ConfigError(
            f"prompts={config.prompts} x responses={config.responses} leave a data-parallel rank of {world.dp_size} "
            f"{mine} responses for algorithm.critic_steps={config.algorithm.critic_steps}; raise prompts"
        )
    policy, critic = build_engines(config, source, world)
    engines = {"policy": policy, "critic": critic}
    found = keeper.resume(engines)
    if found:
        stream.load(found.state["prompts"])
    rollout = build_rollout(config, source, processor, policy)
    evaluation = None
    if config.evaluation.every:
        given = (config.evaluation, rollout, processor, config.rollout.tp, run, config.run.seed)
        evaluation = PeriodicEvaluation(*given)
    first = found.step if found else 0
    log = RunLog(run, "train", first) if world.is_main else None
    if world.is_main:
        configuration.save(config, run / "config.yaml")
        write_companions(source, run / "companions", processor)

    with (
        GraderPool(config.reward.workers, config.reward.timeout_s) as grader,
        Progress(config.iterations, run.name, "iteration", world.is_main, first) as progress,
        Watchdog(run, world.rank, config.run.hang_timeout_s) as watchdog,
    ):
        learner = Learner(config, world, processor, policy, critic, rollout, grader)
        for iteration in range(first, config.iterations):
            watchdog.touch()
            rows, dropped = next_prompts(stream, processor, config.prompts)
            outcome = iterate(learner, rows, iteration)
            outcome.metrics |= {"data/dropped_prompts": dropped, "timing/save": keeper.seconds}
            outcome.metrics |= {"policy/skipped": policy.skipped, "critic/skipped": critic.skipped}
            outcome.metrics["memory/peak_gib"] = peak_gib()
            record(run, iteration, outcome, world)
            done = iteration + 1
            if evaluation and evaluation.due(done, done == config.iterations):
                watchdog.touch()
                outcome.metrics |= evaluation.scores(done)
            if log:
                log.scalars(iteration, outcome.metrics)
                warn(outcome.metrics, iteration, config)
            shown = outcome.metrics
            progress.update(reward=f"{shown['reward/mean']:.3f}", length=f"{shown['response/length']:.0f}")
            state = {"prompts": stream.state(), "curriculum": outcome.metrics["curriculum/max_tokens"]}
            if keeper.after(done, done == config.iterations, engines, state):
                break
    if log:
        log.close()
    return keeper.ended()


def check_lengths(config: RLConfig, shape: ModelShape) -> None:
    """Refuse lengths of prompt and response together that the model has no positions for.

    Raises:
        ConfigError: names the setting and the remedy.
    """
    shape.check_length(config.rollout.max_model_len, "rollout.max_model_len")
    shape.check_length(evaluated_tokens(config), "data.max_prompt_tokens with evaluation.max_tokens")
    for number, stage in enumerate(config.curriculum):
        shape.check_length(stage.max_tokens, f"curriculum[{number}].max_tokens")


def evaluated_tokens(config: RLConfig) -> int:
    """Most tokens of an evaluated prompt and its response together; 0 without evaluation."""
    return config.data.max_prompt_tokens + config.evaluation.max_tokens if config.evaluation.every else 0


def build_engines(config: RLConfig, source: Path, world: World) -> tuple[Engine, Engine]:
    """The policy, and the critic that starts from the same weights with a fresh value head."""
    shape = ModelShape.from_hf(source)
    policy = Engine(shape, config.model, config.parallel, world)
    policy.with_optimizer(config.optimizer, config.iterations).load(WeightFolder(source))
    critic = Engine(shape, config.model, config.parallel, world, critic=True)
    critic.with_optimizer(config.critic.optimizer, config.iterations * config.algorithm.critic_steps)
    start = store.weights_of(config.critic.path, "critic") if config.critic.path else source
    critic.load(WeightFolder(start), config.critic.head_init, seed=config.run.seed)
    return policy, critic


def build_rollout(config: RLConfig, source: Path, processor: Processor, policy: Engine) -> RolloutEngine:
    """VLLM on this rank, with the policy's live weights; both sides ban the same ids."""
    rollout = RolloutEngine(
        source,
        config.rollout,
        processor,
        config.model.dtype,
        max_model_len=max(
            config.rollout.max_model_len or max(stage.max_tokens for stage in config.curriculum),
            evaluated_tokens(config),
        ),
    )
    policy.sample_from(rollout.banned, config.rollout.temperature)
    rollout.update(policy.weights())
    return rollout


def next_prompts(stream: RowStream, processor: Processor, count: int) -> tuple[list[Row], int]:
    """The next ``count`` prompts, and how many over ``data.max_prompt_tokens`` were dropped on the way.

    Raises:
        RowError: an answer that no grader could verify.
    """
    rows: list[Row] = []
    dropped = 0
    while len(rows) < count:
        drawn = list(islice(stream, count - len(rows)))
        for row in drawn:
            if problem := verifiable(row.answer or "", row.options):
                raise RowError(row.where, "answer", problem, "give the bare final answer or remove the row")
        lengths = processor.lengths(drawn, generation=True)
        fitting = [row for row, length in zip(drawn, lengths, strict=True) if isinstance(length, int)]
        dropped += len(drawn) - len(fitting)
        rows += fitting
        if not rows and dropped >= MOST_DROPPED:
            problem = f"{dropped} prompts in a row are too long"
            raise RowError(drawn[-1].where, "messages", problem, "raise data.max_prompt_tokens")
    return rows, dropped


def record(run: Path, iteration: int, outcome: Outcome, world: World) -> None:
    """Append every response to ``rollouts/``, with the pictures of a few prompts."""
    mine = lines(run, iteration, outcome) if world.layout.leads_replica else []
    everything: list[list[dict]] | None = [[] for _ in range(world.size)] if world.is_main else None
    dist.gather_object(mine, everything)
    if everything is not None:
        path = run / "rollouts" / f"{iteration:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for part in everything for line in part))


def lines(run: Path, iteration: int, outcome: Outcome) -> list[dict]:
    """One JSON object for each response of this rank."""
    prompts = outcome.prompts
    assert prompts is not None
    pictured: dict[int, str] = {}
    found = []
    for r, advantage in zip(outcome.responses, outcome.advantages, strict=True):
        sample, row = prompts.sample(r.prompt), prompts.rows[r.prompt]
        if sample.images and r.prompt not in pictured and len(pictured) < PICTURES_PER_ITERATION:
            name = f"rollouts/images/{iteration:06d}_{r.prompt}.png"
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            sample.images[0].save(run / name)
            pictured[r.prompt] = name
        found.append(
            {
                "iteration": iteration,
                "prompt": row.messages[-1].text,
                "response": r.text,
                "reward": r.reward,
                "verdict": r.verdict,
                "answer": row.answer,
                "source": row.source,
                "tokens": len(r.tokens),
                "stopped": r.stopped,
                "advantage_mean": advantage,
                "image": pictured.get(r.prompt),
            }
        )
    return found


def warn(metrics: dict[str, float], iteration: int, config: RLConfig) -> None:
    """Say what a person should know at once: rollout and trainer disagree, or the value head starts too wide."""
    mismatch = metrics.get("rollout/mismatch_max", 0.0)
    if mismatch > config.rollout.mismatch_warning:
        print(f"warning: iteration {iteration}: rollout and trainer differ by {mismatch:.2e}", file=sys.stderr)
    if iteration == 0 and metrics["critic/value_std"] > 1:
        spread = metrics["critic/value_std"]
        print(f"warning: initial values spread by {spread:.1f}: see critic.head_init", file=sys.stderr)


def run(config: RLConfig) -> None:
    """Join the process group, train, and say where the result lies."""
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    result = train(config, world)
    if world.is_main:
        print(f"rl: {result.path}", flush=True)
    distributed.finish()
    sys.exit(result.exit_code)


def main() -> None:
    """Entry point; the recipe is chosen with ``--config-name`` and changed with ``key=value``."""
    launch(RLConfig, "rl_7b_64gpu", run, (*USER_ERRORS, RolloutError))


if __name__ == "__main__":
    main()
