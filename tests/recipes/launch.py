"""Train recipes for two steps at a small size, in one process group, for tests/recipes/test_recipe_runs.py.

    torchrun --nproc-per-node 2 tests/recipes/launch.py OUT RECIPE ...

OUT has two model folders for each family of `model_family`, one of them a teacher's, and the files ``chats.jsonl``,
``problems.jsonl`` and ``texts.jsonl``.  The run folder of a recipe is OUT/RECIPE; those of `train_in_turn` are
OUT/images and OUT/text.
"""

import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ovr_megatron.config import ParallelConfig, RLConfig
from ovr_megatron.launch import compose

RANKS = 2
LONGEST = 84  # tokens of a prompt and its response
SIZES = (
    *("run.threads=1", "run.save_every=2", "run.peak_tflops=1", "parallel.pp=1", "parallel.cp=1"),
    *("data.min_pixels=784", "data.max_pixels=3136", "data.max_prompt_tokens=72", "data.pack_tokens=512"),
)
SFT_SIZES = ("steps=2", "packs_per_step=2")
RL_SIZES = (
    *("iterations=2", "prompts=2", "responses=4", f"curriculum=[{{until: 2, max_tokens: {LONGEST}}}]"),
    *("algorithm.critic_warmup_iterations=0", "rollout.tp=1", "rollout.max_num_seqs=8", "rollout.kv_cache_gib=0.05"),
    "reward.workers=1",
)
MULTIMODAL, TEXT_ONLY = "grpo_7b_8gpu", "text_rl_7b_8gpu"


def model_family(recipe: str) -> str:
    """Return the family of the model that a recipe is for, by its name."""
    return "qwen3_vl" if "qwen3_vl" in recipe else "qwen2_5_vl"


def rows_of(recipe: str) -> str:
    """Return the name of the problems that a recipe of reinforcement learning is for."""
    return "texts" if recipe.startswith("text_") else "problems"


def scale_down(recipe: str, out: Path) -> list[str]:
    """Return the overrides that let any training recipe run on two ranks of a CPU: sizes, paths and parallel sizes.

    Estimator, loss, adapters, frozen parts, dtype, recomputation, optimizer, template and offload stay the recipe's.
    """
    model = out / model_family(recipe)
    own = compose(recipe, [f"model.path={model}"])
    is_rl = isinstance(own, RLConfig)
    name = rows_of(recipe) if is_rl else "chats"
    paths = [f"run.dir={out / recipe}", f"model.path={model}"]
    paths.append(f"data.sources=[{{path: '{out / name}.jsonl', name: {name}}}]")
    layout = [f"parallel.tp={min(own.parallel.tp, RANKS)}"]
    if is_rl:
        paths.append(f"reward.rules.{name}=tests.recipes.launch:reward")
    if is_rl and own.algorithm.teacher:
        paths.append(f"algorithm.teacher={model}_teacher")
    # A CPU has no FP8.
    precision = [] if own.model.fp8 == "none" else ["model.fp8=none", "model.fp8_bf16_layers=0"]
    return [*paths, *layout, *precision, *SIZES, *(RL_SIZES if is_rl else SFT_SIZES)]


def reward(response: str, answer: str, options: Sequence[str]) -> float:
    """Return 0 or 1 by a response's letters: a random model solves nothing, and GRPO learns from differences."""
    return float(zlib.crc32(response.encode()) % 2)


def train_in_turn(out: Path) -> None:
    """Train the multimodal recipe on images, and from its checkpoint the text-only one on texts."""
    # In two steps of a recipe's own rate no weight of bfloat16 moves.
    rate = ["optimizer.lr=1e-3", "optimizer.warmup_steps=0"]
    train(MULTIMODAL, out, [f"run.dir={out}/images", *rate])
    train(TEXT_ONLY, out, [f"run.dir={out}/text", f"model.path={out}/images/checkpoints/step_000002", *rate])


def train(recipe: str, out: Path, settings: Sequence[str] = ()) -> None:
    """Train one recipe in the process group, with ``settings`` after those that scale it down."""
    from ovr_megatron.coldstart import training as coldstart
    from ovr_megatron.rl import training as rl

    config = compose(recipe, [*scale_down(recipe, out), *settings])
    placed = replace(world, layout=world.arrange(config.parallel))
    if isinstance(config, RLConfig):
        rl.train(config, placed)
    else:
        coldstart.train(config, placed)


if __name__ == "__main__":
    from ovr_megatron.runtime import distributed

    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    folder = Path(sys.argv[1])
    jobs = {recipe: partial(train, recipe, folder) for recipe in sys.argv[2:]}
    jobs[f"{MULTIMODAL}, then {TEXT_ONLY}"] = partial(train_in_turn, folder)
    for name, job in jobs.items():
        began = time.perf_counter()
        job()
        if world.is_main:
            print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    distributed.finish()
