"""A whole cold start and a whole PPO run of the miniature on one device, each in a process of its own.

``ANYWHERE=1 pytest tests/gpu/test_stages.py`` runs them on a CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def train(module: str, recipe: str, run: Path, *settings: str) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    command += ["-m", f"ovr_megatron.{module}", "--config-name", recipe, f"run.dir={run}", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (run / "metrics/train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cold_start(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stages") / "cold_start"
    lines = train("coldstart", "tiny_cold_start", run, f"model.path={folders['untied']}", "steps=40")
    assert lines[-1]["loss/train"] < 0.7 * lines[0]["loss/train"]
    return run / "checkpoints/step_000040"


@pytest.mark.parametrize(
    ("dtype", "mean", "largest"), [("float32", 1e-5, 1e-3), ("bfloat16", 2e-2, 0.5)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("offload", [False, True], ids=["on device", "offloaded"])
def test_ppo(cold_start: Path, tmp_path: Path, dtype: str, mean: float, largest: float, offload: bool) -> None:
    settings = [f"model.path={cold_start}", f"model.dtype={dtype}", "iterations=4", "prompts=16", f"offload={offload}"]
    settings.append("rollout.gpu_memory_utilization=0.2")
    lines = train("rl", "tiny_rl", tmp_path / "rl", *settings, "algorithm.critic_warmup_iterations=1")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines[1:]:  # before that the critic alone learns
        assert line["rollout/mismatch_mean"] < mean and line["rollout/mismatch_max"] < largest
        assert line["response/length"] > 1
    print(dtype, offload, {key: f"{value:.2e}" for key, value in lines[-1].items() if "mismatch" in key})
