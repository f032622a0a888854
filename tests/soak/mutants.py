"""Faults put into the loop on purpose: tests/ppo/test_reference.py must fail for each of them.

    python tests/soak/mutants.py [--only WORD] [--out mutants.json]

Each fault replaces a text in one file of a temporary copy of the project, where the runs of tests/ppo/loops.py are made
anew and compared with the reference, run after run until a test fails.  Prints which test did; exit code 1 if a fault
lives.  A fault takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = ("everything", "ppo", "everything_reward")


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` becomes ``new`` in ``path`` below ``ovr_megatron/``; it takes ``ranks`` processes to show."""

    name: str
    path: str
    old: str
    new: str
    ranks: int = 1


MUTANTS = [
    Mutant("truncated responses are rewarded", "ppo/grading.py", "if response.stopped:", "if True:"),
    Mutant(
        "the trainer forgets the temperature",
        "model/vision_language.py",
        "        self.temperature = temperature",
        "        self.temperature = 1.0",
    ),
    Mutant(
        "the engine forgets the temperature",
        "ppo/rollouts.py",
        "Sampling(config.rollout.temperature, ",
        "Sampling(1.0, ",
    ),
    Mutant(
        "every step of the critic takes the whole batch",
        "ppo/update.py",
        "batch.minibatch(step, config.critic_steps)",
        "range(len(batch))",
    ),
    Mutant(
        "every step of the policy takes the whole batch",
        "ppo/update.py",
        "batch.minibatch(step, config.policy_steps)",
        "range(len(batch))",
    ),
    Mutant("clipping is off", "ppo/losses.py", "ratio.clamp(1 - low, 1 + high) * advantages", "ratio * advantages"),
    Mutant(
        "clip_high is ignored",
        "ppo/losses.py",
        "settings.clip_high or settings.clip",
        "settings.clip",
    ),
    Mutant("advantages are not divided", "ppo/advantages.py", "(a - mean) / (std + 1e-8)", "(a - mean)"),
    Mutant("advantages are not centred", "ppo/advantages.py", "(a - mean) / (std + 1e-8)", "a / (std + 1e-8)"),
    Mutant(
        "each rank normalises on its own",
        "ppo/experience.py",
        "total = sum_over_dp(moments(raw), models.world.layout)",
        "total = moments(raw)",
        ranks=2,
    ),
    Mutant(
        "lambda is ignored",
        "ppo/advantages.py",
        "discounted_sums(deltas, gamma * lam)",
        "discounted_sums(deltas, gamma)",
    ),
    Mutant("gamma is ignored", "ppo/advantages.py", "r + gamma * next_value", "r + next_value"),
    Mutant(
        "the state after the last token has a value",
        "ppo/advantages.py",
        "np.append(value[1:], 0.0)",
        "np.append(value[1:], 0.5)",
    ),
    Mutant("the reward stands on the first token", "ppo/advantages.py", "reward[-1] += scores", "reward[0] += scores"),
    Mutant(
        "the divergence in the loss has the wrong sign",
        "ppo/objectives.py",
        "losses + config.kl_coefficient",
        "losses - config.kl_coefficient",
    ),
    Mutant(
        "the divergence in the reward has the wrong sign",
        "ppo/advantages.py",
        "reward -= penalties",
        "reward += penalties",
    ),
    Mutant("k3 the wrong way round", "ppo/losses.py", "torch.expm1(-d) + d", "torch.expm1(d) - d"),
    Mutant(
        "the reference is the first policy whatever is set",
        "rl/setup.py",
        "folder = store.weights_of(algorithm.reference)",
        "folder = model_folder",
    ),
    Mutant(
        "the entropy has the wrong sign",
        "ppo/objectives.py",
        "losses - config.entropy_bonus",
        "losses + config.entropy_bonus",
    ),
    Mutant("the curriculum is late by one", "ppo/curriculum.py", "iteration < stage.until", "iteration <= stage.until"),
    Mutant(
        "the critic has the policy's optimizer settings",
        "rl/critic.py",
        "with_optimizer(settings.optimizer,",
        "with_optimizer(config.optimizer,",
    ),
    Mutant(
        "responses of a step are counted without the other ranks",
        "ppo/reductions.py",
        '"sequence": response_count * lengths[i]',
        '"sequence": len(members) * lengths[i]',
        ranks=2,
    ),
    Mutant(
        "the reduction by response divides by the mean length",
        "ppo/reductions.py",
        '"sequence": response_count * lengths[i]',
        '"sequence": token_count',
    ),
    Mutant(
        "the constant divisor is the length limit",
        "ppo/reductions.py",
        '"constant": response_count * constant',
        '"constant": response_count * max(lengths)',
    ),
    Mutant("the value clip is off", "ppo/losses.py", "(values - old).clamp(-clip, clip)", "(values - old)"),
    Mutant("the clipped value loss has no half", "ppo/losses.py", "0.5 * torch.maximum(error", "torch.maximum(error"),
    Mutant(
        "importance weights are not truncated", "ppo/corrections.py", "return ratio.clamp(max=high)", "return ratio"
    ),
    Mutant("the overlong penalty is a bonus", "ppo/advantages.py", "return -min(tokens", "return min(tokens"),
    Mutant(
        "the overlong penalty forgets the prompt",
        "ppo/experience.py",
        "limit = rollout.limit - prompt_tokens",
        "limit = rollout.limit",
    ),
    Mutant(
        "wrong responses earn 0 whatever is set",
        "ppo/advantages.py",
        "return wrong + (1.0 - wrong) * verdict",
        "return verdict",
    ),
    Mutant("the value targets are advantages", "ppo/advantages.py", "return [a + v for", "return [a + 0 * v for"),
    Mutant(
        "the schedule is a step ahead",
        "engine.py",
        "learning_rate(self.step_count, ",
        "learning_rate(self.step_count + 1, ",
    ),
    Mutant(
        "the schedule counts the critic's warm-up",
        "ppo/warmup.py",
        "config.iterations - warmup.first_policy_iteration",
        "config.iterations",
    ),
    Mutant(
        "the policy does not wait for the critic",
        "ppo/warmup.py",
        "return not self.critic_only and iteration >= self.first_policy_iteration",
        "return not self.critic_only",
    ),
    Mutant(
        "the trainer bans nothing",
        "model/vision_language.py",
        "self.banned[local_ids] = True",
        "self.banned[local_ids] = False",
    ),
    Mutant("the engine bans nothing", "rollout/engine.py", "model.follow(self.banned,", "model.follow([],"),
    Mutant(
        "old log-probabilities are recomputed",
        "ppo/update.py",
        "old_logprobs = experience.old",
        "old_logprobs = None",
    ),
    Mutant(
        "values and advantages come after the critic's update",
        "ppo/iteration.py",
        "metrics |= update_critic(models, critic_batch)",
        "metrics |= update_critic(models, critic_batch); "
        "experience, _ = compute_experience(models, rollout, responses, batch, iteration)",
    ),
    Mutant(
        "the engine keeps its first weights",
        "rollout/engine.py",
        "traffic = self._reshard.update(shards, everything=self._empty)",
        "traffic = self._first = getattr(self, '_first', None) or self._reshard.update(shards, everything=self._empty)",
    ),
    Mutant("a second epoch is left out", "ppo/update.py", "for _ in range(config.policy_epochs)", "for _ in range(1)"),
    Mutant("gradients are not clipped", "engine.py", "clip_grad=config.clip_grad", "clip_grad=0.0"),
    Mutant("the betas are torch's", "engine.py", "adam_beta2=config.beta2", "adam_beta2=0.999"),
    Mutant("epsilon is torch's", "engine.py", "adam_eps=config.eps", "adam_eps=1e-8"),
    Mutant("norms and biases decay", "engine.py", ' * group["wd_mult"]', ""),
    Mutant(
        "prompts that were given up earn 0",
        "ppo/iteration.py",
        "rewarded = float(r.rewarded)\n        answered = float(bool(r.tokens))",
        "rewarded = 1.0\n        answered = 1.0",
    ),
    Mutant(
        "dynamic sampling takes prompts as they come",
        "ppo/rollouts.py",
        "order = unequal + equal",
        "order = list(tokens)",
    ),
]


def copy_project(target: Path) -> None:
    """Copy what git knows or would take, and link the environment."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def failures(project: Path, run: str, ranks: int) -> list[str]:
    """Make ``run`` anew with the code of ``project`` and compare its last iteration; return the tests that failed."""
    environment = os.environ | {
        "PYTHONPATH": str(project),
        "OVR_TEST_LOOPS": f"reference {run}",
        "OVR_TEST_RANKS": str(ranks),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ppo/test_reference.py"]
    done = subprocess.run([*command, "-k", f"{run}-1"], cwd=project, env=environment, capture_output=True, text=True)
    tests = re.findall(r"^(?:FAILED|ERROR) \S+?::(\S+)", done.stdout, re.MULTILINE)
    return tests or ([] if done.returncode == 0 else [f"pytest ended with {done.returncode}: {done.stdout[-300:]}"])


def kill(mutant: Mutant) -> list[str]:
    """Return the tests that the fault fails in the first of `RUNS` in which any does; none if it lives."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder)
        copy_project(project)
        path = project / "ovr_megatron" / mutant.path
        text = path.read_text()
        assert text.count(mutant.old) == 1, (
            f"{mutant.name}: {mutant.path} has {text.count(mutant.old)} x {mutant.old!r}"
        )
        path.write_text(text.replace(mutant.old, mutant.new))
        for run in RUNS:
            tests = failures(project, run, mutant.ranks)
            if tests:
                return tests
    return []


def main() -> None:
    """Try every fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--out", type=Path, help="JSON of the tests that failed, by fault")
    parser.add_argument("--check", action="store_true", help="only look whether each text is there once")
    args = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if args.only in mutant.name]
    for mutant in MUTANTS:
        count = (ROOT / "ovr_megatron" / mutant.path).read_text().count(mutant.old)
        assert count == 1, f"{mutant.name}: {mutant.path} has {count} x {mutant.old!r}"
    results: dict[str, list[str]] = {}
    if not args.check:
        line = MUTANTS[0].old
        alive = kill(Mutant("no fault", MUTANTS[0].path, line, line))
        assert not alive, f"the project itself fails: {alive}"
    for mutant in [] if args.check else mutants:
        results[mutant.name] = tests = kill(mutant)
        print(f"{'dead ' if tests else 'LIVES'}  {mutant.name}: {', '.join(tests)}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(int(not all(results.values())))


if __name__ == "__main__":
    main()
