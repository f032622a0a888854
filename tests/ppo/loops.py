"""PPO and its relatives on two ranks, for tests/ppo/test_loops.py: ``torchrun ... tests/ppo/loops.py OUT``."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor

from ovr_megatron import replay
from ovr_megatron.config import ParallelConfig, RLConfig, build, defaults
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.launch import RECIPES
from ovr_megatron.ppo import archive
from ovr_megatron.ppo.experience import evaluate, own_share
from ovr_megatron.ppo.objectives import ValueObjective
from ovr_megatron.ppo.prompts import PromptStream
from ovr_megatron.ppo.update import critic_packs
from ovr_megatron.rl import training as rl
from ovr_megatron.runtime import distributed

SIZES = ("iterations=2", "prompts=4", "responses=4", "run.save_every=1", "run.keep_last=0")
RULES = "reward.rules={image: 'parity:even', text: 'parity:even'}"
ALGORITHMS = {
    "grpo": ("estimator=grpo",),
    "dapo": (
        *("estimator=grpo", "clip_high=0.28", "policy_steps=2", "wrong_reward=-1", "dynamic_sampling=3"),
        *("overlong_buffer=16", "importance_cap=2.0"),
    ),
    "dr_grpo": ("estimator=dr_grpo", "reduction=constant", "kl_coefficient=0.01", "entropy_bonus=0.001"),
    "rloo": (
        "estimator=rloo",
        "reduction=constant",
        "reduction_tokens=1",
        "kl_coefficient=0.05",
        "kl_in=reward",
        "kl_form=k1",
    ),
    "reinforce_pp": ("estimator=reinforce_pp", "policy_epochs=2", "policy_steps=2"),
    "ppo_epochs": ("policy_epochs=2", "reduction=pack", "value_clip=0.2"),
    "ppo_stored": ("policy_epochs=2",),
}


def config(name: str, *more: str) -> RLConfig:
    values = OmegaConf.load(RECIPES / "tiny_rl.yaml")
    values.pop("defaults")
    options = [f"run.dir={out / name}", f"model.path={out / 'model'}", *SIZES, RULES, *more]
    options += [] if any("estimator" in option for option in more) else ["algorithm.critic_warmup_iterations=0"]
    merged = OmegaConf.merge(defaults(RLConfig), values, {"algorithm": {"critic_warmup_iterations": 0}})
    return build(RLConfig, OmegaConf.merge(merged, OmegaConf.from_dotlist(options)))


def train(name: str, *more: str) -> None:
    chosen = config(name, *more)
    rl.train(chosen, replace(world, layout=world.arrange(chosen.parallel)))


def again(name: str, iteration: int, *more: str) -> list[dict]:
    chosen = replay.load(out / name, more)
    there = replace(world, layout=world.arrange(chosen.parallel))
    return [vars(line) for line in replay.replay(chosen, out / name, iteration, there)]


def critic_gradients(*more: str) -> dict[str, Tensor]:
    """Those of the first step of iteration 0, with the saved responses cut in another way."""
    chosen = config("ppo", *more)
    there = replace(world, layout=world.arrange(chosen.parallel))
    processor = Processor(out / "model", chosen.data)
    models, _ = rl.build_models(chosen, out / "model", processor, there)
    prompts = PromptStream(open_stream(chosen.data, chosen.run.seed), processor, chosen.reward.rules)
    rollout = archive.restore(archive.read(out / "ppo", 0, world), prompts)
    _, study = evaluate(models, rollout, *own_share(models, rollout, models.policy))
    packs = critic_packs(models, study, 0)
    models.critic.backward(packs, ValueObjective(chosen.algorithm))
    return {name: gradient.clone() for name, gradient in models.critic.gradients()} | {"packs": len(packs)}


def differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Of all gradients together, and the numbers of packs."""
    names = [name for name in ours if name != "packs"]
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in names) ** 0.5
    size = sum(float(theirs[name].double().square().sum()) for name in names) ** 0.5
    return {"error": apart / size, "packs": ours["packs"], "before": theirs["packs"]}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    train("ppo")
    train("ppo_offload", "offload=true", "rollout.check_updates=true", "rollout.bucket_mib=0.1")
    train("ppo_shared", "rollout.schedule=shared", "rollout.max_num_seqs=8")
    train("ppo_critic_tp2", "critic.parallel={tp: 2}")
    for name, settings in ALGORITHMS.items():
        train(name, *(f"algorithm.{setting}" for setting in settings))
    train("learned", "only=train", f"rollouts_from={out / 'ppo'}")
    half = config("rolled_out", "only=rollout", "iterations=1")
    rl.generate(half, world)
    found = {
        "same": again("ppo", 1),
        "tp2": again("ppo", 1, "parallel.tp=2"),
        "rloo": again("rloo", 1, "parallel.pp=2"),
        "reinforce_pp": again("reinforce_pp", 1, "parallel.cp=2"),
        "critic_tp2": again("ppo_critic_tp2", 1, "critic.parallel=null"),
    }
    whole = critic_gradients()
    small = "data.max_prompt_tokens=64", "data.pack_tokens=160"
    cuts = {"micro-batches": small, "ranks": ("critic.parallel={cp: 2}",), "both": (*small, "critic.parallel={tp: 2}")}
    gradients = {name: differences(critic_gradients(*more), whole) for name, more in cuts.items()}
    if world.is_main:
        (out / "gradients.json").write_text(json.dumps(gradients))
        (out / "replays.json").write_text(json.dumps(found))
    distributed.finish()
