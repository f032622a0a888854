"""The Python interface: its scripts compute what the commands compute; scores are Transformers'; parts load alone."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from ovr_megatron.config import DataConfig
from ovr_megatron.data.chats import read_chats
from ovr_megatron.data.processing import Processor
from ovr_megatron.rewards.rules import RuleError, place_of
from ovr_megatron.runtime.stop import Stop, StopRequest
from tests import api_runs

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = ("timing/", "perf/", "memory/")


@pytest.fixture(scope="module")
def folder(loaded_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    # A reward that a model without training earns now and then.
    (folder / "my_rewards.py").write_text(
        "def score(response, answer, options):\n    return float(len(response) % 2)\n"
    )
    Image.new("RGB", (56, 56)).save(folder / "dots.png")
    picture = [{"type": "image", "image": "dots.png"}, {"type": "text", "text": "How many dots?"}]
    with (folder / "chats.jsonl").open("w") as chats, (folder / "problems.jsonl").open("w") as problems:
        for number in range(8):
            question = {"role": "user", "content": picture if number % 2 else f"{number} + 1?"}
            reply = {"role": "assistant", "content": f"<think>One more.</think>\\boxed{{{number + 1}}}"}
            chats.write(json.dumps({"messages": [question, reply]}) + "\n")
            problems.write(json.dumps({"messages": [question], "answer": str(number + 1)}) + "\n")
    result = subprocess.run(
        [loaded_python, ROOT / "tests/api_runs.py", ROOT / "docs/api.md"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder


def curve(run: Path) -> list[dict[str, float]]:
    """Every metric but those of a clock."""
    lines = [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]


@pytest.mark.parametrize(("stage", "steps"), [("sft", 3), ("rl", 2)])
def test_a_program_computes_what_the_command_does(folder: Path, stage: str, steps: int) -> None:
    command, program = folder / f"runs/{stage}_command", folder / f"runs/{stage}"
    assert len(curve(command)) == steps
    assert curve(program) == curve(command)
    exports = (f"{stage}_hf", f"{stage}_command_hf")
    ours, theirs = (load_file(folder / "runs" / name / "model.safetensors") for name in exports)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not ours[name].equal(theirs[name])] == []
    start = load_file(folder / ("runs/tiny" if stage == "sft" else "runs/sft_hf") / "model.safetensors")
    assert any(not ours[name].equal(start[name]) for name in ours)
    settings = [(run / "config.yaml").read_text().replace(f"dir: runs/{run.name}\n", "") for run in (command, program)]
    assert settings[0] == settings[1]


def transformers_scores(model_dir: Path, chat: int, head: np.ndarray | None) -> np.ndarray:
    """Transformers' log-probabilities of the learned tokens of a chat, or with a value head its values there."""
    model = AutoModelForImageTextToText.from_pretrained(model_dir, dtype=torch.float32).eval()
    settings = DataConfig(min_pixels=784, max_pixels=12544, max_images=1)
    processor = Processor(model_dir, settings)
    (sample,) = processor.encode(read_chats(api_runs.CHATS[chat : chat + 1]), generation=False)
    tokens = torch.from_numpy(sample.tokens)[None]
    images = {}
    if len(sample.grid_thw):
        images = {"pixel_values": torch.from_numpy(sample.patches), "image_grid_thw": torch.from_numpy(sample.grid_thw)}
    position_ids = torch.from_numpy(sample.position_ids)[:, None]
    with torch.no_grad():
        output = model(input_ids=tokens, position_ids=position_ids, output_hidden_states=True, **images)
    learned = torch.from_numpy(sample.loss_mask)[1:]
    if head is not None:
        values = output.hidden_states[-1][0, :-1] @ torch.from_numpy(head).T
        return values[learned, 0].numpy()
    logprobs = output.logits[0, :-1].float().log_softmax(-1).gather(1, tokens[0, 1:, None])
    return logprobs[learned, 0].numpy()


@pytest.mark.parametrize("chat", [0, 1], ids=["text", "image"])
def test_scores_are_those_of_transformers(folder: Path, chat: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # where the chat's image lies
    arrays = np.load("scores.npz")
    logprobs = transformers_scores(folder / "runs/rl_hf", chat, None)
    assert len(logprobs) > 3
    np.testing.assert_allclose(arrays[f"logprobs_{chat}"], logprobs, atol=1e-4)
    values = transformers_scores(folder / "runs/sft_hf", chat, arrays["head"])
    assert np.abs(values).max() > 1e-3
    np.testing.assert_allclose(arrays[f"values_{chat}"], values, atol=1e-4)


def test_a_step_on_chats_learns_all_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    logprobs = [transformers_scores(folder / "runs/tiny", chat, None) for chat in (0, 1)]
    assert np.load("scores.npz")["loss"] == pytest.approx(-np.concatenate(logprobs).mean(), abs=1e-4)


def test_a_sample_depends_on_its_own_seed_alone(folder: Path) -> None:
    arrays = np.load(folder / "scores.npz")
    assert arrays["same"].tolist() == [True, False]
    assert (arrays["lengths"] > 0).all()


def test_a_signal_stops_a_program_as_it_stops_a_command(folder: Path) -> None:
    stopped = json.loads((folder / "stopped.json").read_text())
    assert "start the same program again" in stopped.pop("message")
    # The second of three steps is done and saved; 75 asks for another start.
    assert stopped == {"stopped": [False, True], "next_step": 2, "exit_code": 75, "handler_restored": True}
    assert (folder / "runs/stopped/checkpoints/step_000002").is_dir()


@pytest.mark.parametrize("chat", [0, 1], ids=["text", "image"])
def test_scores_of_a_run_with_adapters_are_those_of_the_merged_model(
    folder: Path, chat: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    logprobs = np.load("scores.npz")[f"adapted_{chat}"]
    np.testing.assert_allclose(logprobs, transformers_scores(folder / "runs/stopped_hf", chat, None), atol=1e-4)
    assert np.abs(logprobs - transformers_scores(folder / "runs/tiny", chat, None)).max() > 1e-3


def test_stop_request_leaves_signals_to_the_program_outside_of_the_main_thread() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(StopRequest).result()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    request.close()
    assert request.received is Stop.NO


def local_reward(response: str, answer: str, options: tuple[str, ...]) -> float:
    return 1.0


class Scorer:
    def __call__(self, response: str, answer: str, options: tuple[str, ...]) -> float:
        return 1.0

    def score(self, response: str, answer: str, options: tuple[str, ...]) -> float:
        return 1.0


def test_a_reward_has_the_name_under_which_graders_import_it() -> None:
    assert place_of(json.dumps) == "json:dumps"


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        (lambda response, answer, options: 1.0, "no function"),
        (Scorer(), "Scorer is no function"),
        (Scorer().score, "no function Scorer.score at its top level"),
        ("my_rewards:score", "str is no function"),
    ],
    ids=["lambda", "object", "method", "name"],
)
def test_a_reward_that_graders_cannot_import_is_refused(reward: object, complaint: str) -> None:
    with pytest.raises(RuleError, match=complaint) as error:
        place_of(reward)
    assert "PYTHONPATH" in str(error.value)


def test_a_reward_of_the_program_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_reward, "__module__", "__main__")
    with pytest.raises(RuleError, match="local_reward stands in the program itself"):
        place_of(local_reward)


@pytest.mark.parametrize(
    "module", ["rewards.grader", "rewards.pool", "data.best_fit", "data.packing", "weights.table", "api"]
)
def test_grader_packer_and_weight_table_load_alone(module: str) -> None:
    heavy = ["megatron", "vllm", "transformer_engine", "torch", "transformers", "datasets", "hydra"]
    script = (
        f"import sys, time; began = time.perf_counter(); import ovr_megatron.{module}; "
        f"print(sorted(set({heavy}) & set(sys.modules)), f'{{time.perf_counter() - began:.2f}} s')"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    print(f"{module}: {result.stdout}")
    assert result.stdout.startswith("[] "), result.stdout + result.stderr
