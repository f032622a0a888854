"""The scripts of docs/api.md and the same commands, in one process, for tests/test_api.py: ``tests/api_runs.py PAGE``.

It works in the current folder, which has the files that the page names, and writes the scores of chats to scores.npz.
"""

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np

from ovr_megatron import SFT, compose, load_model
from ovr_megatron.cli import main
from ovr_megatron.config import ConfigError

ANSWER = "<think>Dots.</think>\\boxed{3}"
CHATS = [
    {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "<think>1</think>2"}]},
    {
        "messages": [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": ANSWER}],
        "images": ["dots.png"],
    },
]
SFT_WORDS = ["model.path=runs/tiny", "steps=3", "data.sources=[{path: chats.jsonl}]"]
RL_WORDS = ["model.path=runs/sft_hf", "algorithm.estimator=grpo", "prompts=4", "responses=4", "iterations=2"]
RL_WORDS += ["algorithm.critic_warmup_iterations=0", "data.sources=[{path: problems.jsonl, name: mine}]"]
RL_WORDS += ["reward.rules.mine=my_rewards:score"]


def run_block(block: str) -> None:
    try:
        exec(compile(block, "api.md", "exec"), {})
    except SystemExit as end:  # the script ends its process
        assert end.code == 0


def convert(run: str, step: int, out: str) -> None:
    try:
        main(["convert", "to-hf", "--checkpoint", f"{run}/checkpoints/step_{step:06d}", "--out", out])
    except SystemExit as end:  # the command ends its process
        assert end.code == 0


def step_on_chats() -> float:
    """The loss of a step on chats that the program passes."""
    config = compose("tiny_cold_start", ["run.dir=runs/chats", "model.path=runs/tiny", "steps=1", "data.sources=[]"])
    with SFT(config) as sft:
        return sft.step(CHATS)["loss"]


def stopped_run() -> dict[str, object]:
    """The end of a run with adapters that a signal stops in its second of three steps."""
    words = ["run.dir=runs/stopped", "model.path=runs/tiny", "steps=3", "data.sources=[]"]
    config = compose("tiny_cold_start", [*words, "model.lora.rank=2", "optimizer.lr=0.01"])
    handler = signal.getsignal(signal.SIGTERM)
    message = ""
    with SFT(config) as sft:
        sft.step(CHATS)
        stopped_before = sft.stopped
        os.kill(os.getpid(), signal.SIGTERM)
        sft.step(CHATS)
        try:
            sft.step(CHATS)
        except ConfigError as error:
            message = str(error)
        sft.export("runs/stopped_hf")
    return {
        "stopped": [stopped_before, sft.stopped],
        "next_step": sft.next_step,
        "exit_code": sft.result().exit_code,
        "message": message,
        "handler_restored": signal.getsignal(signal.SIGTERM) == handler,
    }


def scores() -> dict[str, np.ndarray]:
    """Log-probabilities, samples and values of the chats."""
    arrays = {}
    with load_model(compose("tiny_rl", ["model.path=runs/rl"])) as model:
        for index, logprobs in enumerate(model.logprobs(CHATS)):
            arrays[f"logprobs_{index}"] = logprobs
        replies = [reply for replies in model.sample(CHATS, responses=2, seed=5) for reply in replies]
        alone = model.sample(CHATS[1:], responses=1, seed=6)[0][0]
        arrays["same"] = np.array([replies[3].tokens == alone.tokens, replies[2].tokens == alone.tokens])
        arrays["lengths"] = np.array([len(reply.tokens) for reply in replies])
    with load_model(compose("tiny_cold_start", ["model.path=runs/stopped"])) as adapted:
        for index, logprobs in enumerate(adapted.logprobs(CHATS)):
            arrays[f"adapted_{index}"] = logprobs
    with load_model(compose("tiny_rl", ["model.path=runs/sft_hf"]), critic=True) as critic:
        for index, values in enumerate(critic.values(CHATS)):
            arrays[f"values_{index}"] = values
        arrays["head"] = dict(critic.engine.weights())["value_head.weight"].numpy()
    return arrays


if __name__ == "__main__":
    blocks = re.findall(r"^```python\n(.*?)^```$", Path(sys.argv[1]).read_text(), re.MULTILINE | re.DOTALL)
    sft_block, rl_block, model_block = blocks[:3]
    main(["tiny-model", "--out", "runs/tiny", "--seed", "5"])
    main(["sft", "--config-name", "tiny_cold_start", "run.dir=runs/sft_command", *SFT_WORDS])
    run_block(sft_block)
    convert("runs/sft_command", 3, "runs/sft_command_hf")
    main(["rl", "--config-name", "tiny_rl", "run.dir=runs/rl_command", *RL_WORDS])
    run_block(rl_block)
    convert("runs/rl_command", 2, "runs/rl_command_hf")
    run_block(model_block)
    Path("stopped.json").write_text(json.dumps(stopped_run()))
    np.savez("scores.npz", loss=step_on_chats(), **scores())
