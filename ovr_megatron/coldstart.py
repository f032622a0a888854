"""Stage 1: the linguistic cold start, supervised training on packed samples (paper, section 3.1).

``python -m ovr_megatron.coldstart --config-name tiny_cold_start run.dir=RUN model.path=MODEL``; under ``torchrun``
or ``srun`` for more than one process.  The same command on the same run folder goes on where the run ended.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ovr_megatron import config as configuration
from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.companions import write_companions
from ovr_megatron.checkpoint.keeper import Ended, Keeper
from ovr_megatron.config import ColdStartConfig
from ovr_megatron.data.packing import Pack, PackStream
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.engine import Engine, LossSum
from ovr_megatron.launch import launch
from ovr_megatron.model.qwen25vl import Scores
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.runtime.runlog import RunLog
from ovr_megatron.weights.folder import WeightFolder


def cross_entropy(scores: Scores, pack: Pack) -> LossSum:
    """Negative log-likelihood of the labelled tokens, every token of the step weighing the same."""
    assert scores.logprobs is not None
    return LossSum(-scores.logprobs.sum(), len(scores.rows), {})


def train(config: ColdStartConfig, world: World) -> Ended:
    """Train to the last step, or until a signal comes, from the newest checkpoint if there is one."""
    run, keeper = Path(config.run.dir), Keeper(config.run, world)
    source = store.weights_of(config.model.path)
    engine = Engine(ModelShape.from_hf(source), config.model, config.parallel, world)
    engine.with_optimizer(config.optimizer, config.steps)
    processor = Processor(source, config.data)
    packs = PackStream(
        open_stream(config.data, config.run.seed),
        processor,
        config.data.pack_tokens,
        config.packs_per_step,
        world.dp_rank,
        world.dp_size,
    )
    engines = {"policy": engine}
    found = keeper.resume(engines)
    if found:
        packs.load(found.state["packs"])
    else:
        engine.load(WeightFolder(source))
    first = found.step if found else 0
    log = RunLog(run, "train", first) if world.is_main else None
    if world.is_main:
        configuration.save(config, run / "config.yaml")
        write_companions(source, run / "companions", processor)

    with Progress(config.steps, run.name, "step", world.is_main, first) as progress:
        for step in range(first, config.steps):
            began = time.perf_counter()
            step_packs = next(packs)
            packed = sum(len(pack.tokens) for pack in step_packs) * world.dp_size
            metrics = engine.train(step_packs, cross_entropy)
            seconds = time.perf_counter() - began
            if log:
                log.scalars(
                    step,
                    {
                        "loss/train": metrics["loss"],
                        "optimizer/lr": metrics["lr"],
                        "optimizer/grad_norm": metrics["grad_norm"],
                        "data/tokens": metrics["count"],
                        "data/fill": packs.fill,
                        "perf/tokens_per_second": packed / seconds,
                    },
                )
            progress.update(loss=f"{metrics['loss']:.4f}")
            done = step + 1
            if keeper.after(done, done == config.steps, engines, {"packs": packs.state()}):
                break
    if log:
        log.close()
    return keeper.ended()


def run(config: ColdStartConfig) -> None:
    """Join the process group, train, and say where the result lies."""
    world = distributed.start(config.parallel, config.run.seed, config.run.threads)
    result = train(config, world)
    if world.is_main:
        print(f"cold start: {result.path}", flush=True)
    distributed.finish()
    sys.exit(result.exit_code)


def main() -> None:
    """Entry point; the recipe is chosen with ``--config-name`` and changed with ``key=value``."""
    launch(ColdStartConfig, "cold_start_7b_64gpu", run)


if __name__ == "__main__":
    main()
