"""Train every recipe for two steps at a small size, in one process group, for tests/recipes/test_recipes.py.

    torchrun --nproc-per-node 2 tests/recipes/launch.py OUT RECIPE ...

OUT has the folder ``model`` and the files ``chats.jsonl`` and ``problems.jsonl``; each recipe gets a run folder and
``RECIPE.json``, what its trainer built: the record that the test reads.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from ovr_megatron.coldstart import training as coldstart
from ovr_megatron.config import ColdStartConfig, ParallelConfig, RLConfig
from ovr_megatron.engine import Engine
from ovr_megatron.launch import RECIPES, compose, compose_values, recipe_path
from ovr_megatron.rl import training as rl
from ovr_megatron.runtime import distributed

RANKS = 2
LONGEST = 128  # tokens of a prompt and its response


def scale_down(recipe: str, out: Path) -> list[str]:
    """Return the overrides that let any training recipe run on two ranks of a CPU: sizes, paths and parallel sizes.

    Estimator, loss, adapters, frozen parts, dtype, recomputation, optimizer, template and offload stay the recipe's.
    """
    own = compose(recipe, [f"model.path={out / 'model'}"])
    tp = min(own.parallel.tp, RANKS)
    overrides = [
        f"run.dir={out / recipe}",
        f"model.path={out / 'model'}",
        "run.threads=1",
        "run.save_every=2",
        "run.peak_tflops=1",
        f"parallel.tp={tp}",
        "parallel.cp=1",
        "data.min_pixels=784",
        "data.max_pixels=3136",
        "data.max_prompt_tokens=96",
        "data.pack_tokens=512",
    ]
    if isinstance(own, RLConfig):
        overrides += [
            f"data.sources=[{{path: '{out}/problems.jsonl'}}]",
            f"curriculum=[{{until: 2, max_tokens: {LONGEST}}}]",
            "iterations=2",
            "prompts=2",
            "responses=2",
            "rollout.tp=1",
            "rollout.max_num_seqs=8",
            "rollout.kv_cache_gib=0.1",
            "reward.workers=1",
            "algorithm.critic_warmup_iterations=0",
        ]
    else:
        overrides += [f"data.sources=[{{path: '{out}/chats.jsonl'}}]", "steps=2", "packs_per_step=2"]
    if own.model.fp8 != "none":
        overrides.append("model.fp8=none")
    return overrides


@contextmanager
def recorded_engines() -> Iterator[list[Engine]]:
    """Collect the engines that a trainer gives an optimizer within the block."""
    engines: list[Engine] = []
    with_optimizer = Engine.with_optimizer

    def record(engine: Engine, *arguments: object) -> None:
        engines.append(engine)
        with_optimizer(engine, *arguments)  # type: ignore[arg-type]

    with patch.object(Engine, "with_optimizer", record):
        yield engines


if __name__ == "__main__":
    out = Path(sys.argv[1])
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    for recipe in sys.argv[2:]:
        began = time.perf_counter()
        config = compose(recipe, scale_down(recipe, out))
        placed = replace(world, layout=world.arrange(config.parallel))
        with recorded_engines() as engines:
            if isinstance(config, RLConfig):
                rl.train(config, placed)
            else:
                coldstart.train(config, placed)
        if world.is_main:
            record = {
                "trained": {engine.critic: sorted(engine.trained) for engine in engines},
                "seconds": time.perf_counter() - began,
            }
            print(recipe, f"{record['seconds']:.1f} s", flush=True)
            (out / f"{recipe}.json").write_text(json.dumps(record))
    distributed.finish()
