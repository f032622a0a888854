"""Both stages in one process group, for tests/test_stages.py: ``torchrun ... tests/stages.py OUT TP ROLLOUT_TP``.

A process can hold vLLM in one layout only.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from PIL import Image

from ovr_megatron import SFT, load_model
from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.coldstart import training as coldstart
from ovr_megatron.config import (
    ColdStartConfig,
    EvaluationSettings,
    ParallelConfig,
    RLConfig,
    RolloutConfig,
    SourceConfig,
    build,
    defaults,
)
from ovr_megatron.data.row_json import row_to_json
from ovr_megatron.data.sources import open_source
from ovr_megatron.data.tokenising import tokenise
from ovr_megatron.evaluation import evaluator
from ovr_megatron.launch import RECIPES
from ovr_megatron.rl import training as rl
from ovr_megatron.runtime import distributed
from tests.validation import layout_losses


def recipe(schema: type, name: str, *overrides: str) -> Any:
    values = OmegaConf.load(RECIPES / f"{name}.yaml")
    values.pop("defaults")
    return build(schema, OmegaConf.merge(defaults(schema), values, OmegaConf.from_dotlist(list(overrides))))


REPLY = {"role": "assistant", "content": "<think>One more.</think>\\boxed{2}"}
PICTURE = {"type": "image", "image": Image.new("RGB", (56, 56), "red")}
# Three over two replicas.
CHATS = [
    {"messages": [{"role": "user", "content": content}, REPLY]}
    for content in ("1 + 1?", [PICTURE, {"type": "text", "text": "How many?"}], "How many ones are there in 1 + 1 + 1?")
]
PUZZLE = "puzzle:digits?form=text&task=sum&split=heldout&answered=0&count=6"
EVALUATION = ["evaluation.every=2", f"evaluation.sources=[{{path: '{PUZZLE}', name: text}}]", "evaluation.max_tokens=8"]
VALIDATION = [
    "validation.every=3",
    "validation.sources=[{path: 'puzzle:digits?form=image&split=heldout&count=5', name: image}, "
    "{path: 'puzzle:digits?form=text&split=heldout&count=3', name: text}]",
]


def cold_start(run: Path, model: Path, tp: int, dtype: str = "float32", *more: str) -> None:
    options = [f"run.dir={run}", f"model.path={model}", f"parallel.tp={tp}", "steps=4", "run.save_every=2", *more]
    config = recipe(ColdStartConfig, "tiny_cold_start", *options, "data.pack_tokens=512", f"model.dtype={dtype}")
    coldstart.train(config, world)


def cold_start_by_steps(run: Path, model: Path) -> None:
    """The run of `cold_start`, step by step, with scores of chats between the steps."""
    options = [f"run.dir={run}", f"model.path={model}", "steps=4", "run.save_every=2", "data.pack_tokens=512"]
    with SFT(recipe(ColdStartConfig, "tiny_cold_start", *options), world) as sft:
        while not sft.done:
            sft.step()
            sft.policy.logprobs(CHATS)


def score(checkpoint: Path, out: Path) -> None:
    """The log-probabilities of `CHATS` in this launch's layout."""
    options = ["run.dir=x", f"model.path={checkpoint}", f"parallel.tp={tp}"]
    with load_model(recipe(ColdStartConfig, "tiny_cold_start", *options), world=world) as model:
        logprobs = [array.tolist() for array in model.logprobs(CHATS)]
    if world.is_main:
        out.write_text(json.dumps(logprobs))


def evaluate(checkpoint: Path, out: Path) -> None:
    """What `ovr evaluate` does with a checkpoint, by an engine of its own."""
    data = recipe(ColdStartConfig, "tiny_cold_start", "run.dir=x", "model.path=x").data
    settings = EvaluationSettings(sources=[SourceConfig(path=PUZZLE, name="text")], max_tokens=8)
    for _ in evaluator.evaluate_sets(weights_of(checkpoint), settings, data, RolloutConfig(), "float32", out):
        pass


def tokenised_cold_start(run: Path, model: Path) -> None:
    """Two epochs of a tokenised set, whose second begins inside a step; the first process writes it."""
    folder, options = run.parent / "tokenised", [f"run.dir={run}", f"model.path={model}", "steps=0", "epochs=2"]
    options += ["run.save_every=2", "data.pack_tokens=512", "data.sources=[]", f"data.tokenised={folder}"]
    config = recipe(ColdStartConfig, "tiny_cold_start", *options)
    if world.is_main and not folder.exists():
        rows = open_source(SourceConfig(path="puzzle:digits?form=text&task=sum"))
        path = run.parent / "rows.jsonl"
        path.write_text("".join(json.dumps(row_to_json(rows[i])) + "\n" for i in range(30)))
        sources = [SourceConfig(path=str(path))]
        tokenise(replace(config.data, tokenised=None, sources=sources), model, folder)
    dist.barrier()
    coldstart.train(config, world)


def row_epochs(run: Path, model: Path) -> None:
    """Two epochs of the rows that `tokenised_cold_start` wrote, some of them held out."""
    options = [f"run.dir={run}", f"model.path={model}", "steps=0", "epochs=2", "validation.share=0.2"]
    config = recipe(ColdStartConfig, "tiny_cold_start", *options, "run.save_every=2", "data.pack_tokens=512")
    data = replace(config.data, sources=[SourceConfig(path=str(run.parent / "rows.jsonl"))])
    coldstart.train(replace(config, data=data), world)


def ppo(run: Path, model: Path, tp: int, rollout_tp: int, *layout: str) -> None:
    options = [f"run.dir={run}", f"model.path={model}", f"parallel.tp={tp}", f"rollout.tp={rollout_tp}"]
    sizes = ["iterations=3", "prompts=4", "responses=4", "run.save_every=2", "run.keep_last=0"]
    config = recipe(RLConfig, "tiny_rl", *options, *sizes, *layout, "algorithm.critic_warmup_iterations=0")
    rl.train(config, replace(world, layout=world.arrange(config.parallel)))


def copy_without_last(run: Path, copy: Path) -> None:
    """As if the run had been killed before its last checkpoint."""
    if world.is_main:
        shutil.copytree(run, copy)
        shutil.rmtree(sorted((copy / "checkpoints").glob("step_*"))[-1])
        for manifest in (copy / "checkpoints").glob("step_*/manifest.json"):
            former = manifest.read_text().replace(
                '"stage": "SFT"', '"stage": "cold start"'
            )  # as earlier versions wrote
            manifest.write_text(former)
    dist.barrier()


if __name__ == "__main__":
    out, tp, rollout_tp = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    world = distributed.start(ParallelConfig(tp=tp), seed=1, threads=1)
    model = out / "model"
    if tp == 1:
        cold_start(out / "cold", model, tp)
        cold_start_by_steps(out / "cold_by_steps", model)
        score(out / "cold/checkpoints/step_000004", out / "scores_tp1.json")
        copy_without_last(out / "cold", out / "cold_resumed")
        cold_start(out / "cold_resumed", model, tp)
        tokenised_cold_start(out / "epochs", model)
        copy_without_last(out / "epochs", out / "epochs_resumed")
        tokenised_cold_start(out / "epochs_resumed", model)
        row_epochs(out / "row_epochs", model)
        copy_without_last(out / "row_epochs", out / "row_epochs_resumed")
        row_epochs(out / "row_epochs_resumed", model)
        cold_start(out / "validated", model, tp, "float32", *VALIDATION)
        copy_without_last(out / "validated", out / "validated_resumed")
        cold_start(out / "validated_resumed", model, tp, "float32", *VALIDATION)
        cold_start(out / "bf16", model, tp, "bfloat16")
        copy_without_last(out / "bf16", out / "bf16_resumed")
        cold_start(out / "bf16_resumed", model, tp, "bfloat16")
        cold_start(out / "cold_evaluated", model, tp, "float32", *EVALUATION)
        for step in ("step_000002", "step_000004"):
            evaluate(out / "cold_evaluated/checkpoints" / step, out / "cold_evaluated/fresh" / step)
        (out / f"validation_{world.rank}.json").write_text(json.dumps(layout_losses(model, out / "chats", world)))
        ppo(out / "rl", model, tp, 1)
        ppo(out / "rl_evaluated", model, tp, 1, *EVALUATION)
        copy_without_last(out / "rl", out / "rl_resumed")
        ppo(out / "rl_resumed", model, tp, 1)
        ppo(out / "rl_cp2", model, tp, 1, "parallel.cp=2")
        ppo(
            out / "rl_pp2",
            model,
            tp,
            1,
            "parallel.pp=2",
            "parallel.distributed_optimizer=true",
            "parallel.overlap=true",
        )
    else:
        if rollout_tp == 2:
            cold_start(out / "cold_tp2", model, tp)
            score(out / "cold", out / "scores_tp2.json")  # the run's newest checkpoint
            copy_without_last(out / "cold", out / "cold_resumed_tp2")
            cold_start(out / "cold_resumed_tp2", model, tp)
        ppo(out / f"rl_tp2_engine_tp{rollout_tp}", model, tp, rollout_tp)
    if world.is_main:
        print(json.dumps({"done": True}))
    distributed.finish()
