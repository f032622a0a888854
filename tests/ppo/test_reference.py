"""Whole iterations of real runs beside tests/ppo/reference.py: responses, rewards, every metric, weights afterwards."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.ppo.reference import Iteration

pytestmark = pytest.mark.both_cores

# The paper's defaults; every option with the divergence in the loss, and with it in the reward.
CASES = [("ppo", 0), ("ppo", 1), ("sparse", 0), ("everything", 0), ("everything", 1), ("everything_reward", 1)]
CLOCKS = ("timing/", "perf/", "memory/", "sync/")
cases = pytest.mark.parametrize(("name", "number"), CASES)


@cache
def iteration(run: Path, number: int) -> Iteration:
    return Iteration(run, number).compute()


@cases
def test_responses_are_those_that_the_settings_allow(runs: Path, name: str, number: int) -> None:
    """The curriculum's limit, end tokens, banned ids, the verdict, the prompts that are learnt from."""
    own = iteration(runs / name, number)
    banned = set(own.banned())
    assert own.archive["limit"] == own.limit()
    assert [prompt for prompt, _ in own.archive["kept"]] == own.training_prompts()
    assert len(own.answers) == len(own.training_prompts()) * own.config.responses
    for answer in own.answers:
        ids = answer.tokens.tolist()
        assert not banned & set(ids)
        assert answer.line["stopped"] == (ids[-1] in own.ends) and not own.ends & set(ids[:-1])
        length = len(ids) + len(own.samples[answer.prompt].tokens)
        assert length <= own.limit() and (answer.line["stopped"] or length == own.limit())
        assert answer.line["response"] == own.tokenizer.decode(ids, skip_special_tokens=True)
        assert answer.line["reward"] == own.verdict(answer.line)
    if name == "sparse":
        return
    truncated = [answer.line for answer in own.answers if not answer.line["stopped"]]
    assert 0 < len(truncated) < len(own.answers)
    assert any(len(line["response"]) % 2 == 0 for line in truncated)  # right, had they ended


@cases
def test_arrays_are_those_of_transformers(runs: Path, name: str, number: int) -> None:
    """The rollout's log-probabilities, values, advantages, and old and reference log-probabilities where they are."""
    own = iteration(runs / name, number)
    stored = {"logprobs": "old", "values": "values", "advantages": "advantages"}
    in_reward = own.algorithm.kl_in == "reward"
    # Nothing reads them where the critic alone learns, but a reward that the divergence is taken from.
    learns = number >= own.algorithm.critic_warmup_iterations
    if (learns and own.algorithm.policy_epochs * own.algorithm.policy_steps > 1) or in_reward:
        stored["old"] = "old"
    if own.algorithm.kl_coefficient and (learns or in_reward):
        stored["reference"] = "reference"
    assert {key for answer in own.answers for key in answer.saved} == stored.keys() | {"tokens"}
    for saved, key in stored.items():
        ours = np.concatenate([answer.saved[saved] for answer in own.answers])
        theirs = np.concatenate([answer.arrays[key].numpy() for answer in own.answers])
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(1.0, np.abs(theirs).max()), err_msg=saved)


@cases
def test_metrics_are_those_of_the_reference(runs: Path, name: str, number: int) -> None:
    own = iteration(runs / name, number)
    lines = map(json.loads, (runs / name / "metrics/train.jsonl").read_text().splitlines())
    (logged,) = [line for line in lines if line["step"] == number]
    logged = {key: value for key, value in logged.items() if not key.startswith((*CLOCKS, "step", "time"))}
    if "response/repetition" not in own.metrics:  # not all tokens are archived
        logged = {key: value for key, value in logged.items() if not key.startswith("response/repetition")}
    assert logged.keys() == own.metrics.keys()
    spread = own.metrics["advantage/max"] - own.metrics["advantage/min"]
    for key, value in own.metrics.items():
        within = 2e-5 if key.startswith("rollout/") else 1e-6
        if key.startswith("advantage/"):  # a quantile is the upper edge of one of a thousand bins
            within = 1.1e-3 * spread
        assert logged[key] == pytest.approx(value, rel=1e-4, abs=within), key


@cases
@pytest.mark.parametrize("model", ["policy", "critic"])
def test_weights_are_those_of_the_reference(runs: Path, name: str, number: int, model: str) -> None:
    """The way from the weights before to those after, of each tensor, against the reference's way."""
    own = iteration(runs / name, number)
    after = load_file(runs / name / f"checkpoints/step_{number + 1:06d}" / model / "model.safetensors")
    folder = own.before / model if own.before else Path(own.config.model.path)
    before = load_file(folder / "model.safetensors")
    assert after.keys() == own.weights[model].keys()
    moves = model == "critic" or number >= own.algorithm.critic_warmup_iterations
    errors = {}
    for key, theirs in own.weights[model].items():
        start = before[key] if key in before else torch.zeros_like(theirs)
        way = (theirs - start).norm()
        assert (way > 0) == moves, key
        error = float((after[key] - theirs).norm() / way) if moves else float((after[key] - theirs).norm())
        errors |= {key: error} if error > 1e-2 else {}
    assert not errors
