"""slurm/coldstart_64gpu.sh without Slurm: what it refuses before it trains, and how it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovr_megatron.model.tiny import make_tiny_model
from tests.slurm.cluster import shell_environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm/coldstart_64gpu.sh"
LIMIT_S = float(os.environ.get("SLURM_TEST_LIMIT_S", "240"))


def environment(**others: str) -> dict[str, str]:
    given = {"OVR_RECIPE": "tiny_cold_start", "OVR_GPUS": "0", "OVR_PREFLIGHT_S": str(LIMIT_S)}
    return shell_environment() | given | others


def start(python: Path, *arguments: str, script: Path = SCRIPT, **others: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", script, *arguments],
        env=environment(OVR_PYTHON=str(python), **others),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=5)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A path may hold any character."""
    return tmp_path / "it's, (ü=1)"


def test_without_a_run_folder() -> None:
    result = subprocess.run(["bash", SCRIPT], env=environment(), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "give run.dir=DIR as an argument or OVR_RUN=DIR" in result.stderr


def test_pre_flight_names_every_problem(loaded_python: Path, model: Path, run: Path) -> None:
    absent = run.with_name("it's, (rows).jsonl")
    floors = {"OVR_MIN_BUS_GBPS": "1e6", "OVR_MIN_WRITE_MBPS": "1e9"}
    process = start(
        loaded_python,
        f"run.dir={run}",
        "packs_per_step=3",
        OVR_MODEL=str(model),
        OVR_DATA=str(absent),
        OVR_RANKS="2",
        **floors,
    )
    output, _ = process.communicate(timeout=2 * LIMIT_S)
    assert process.returncode == 2, output
    said = "\n".join(line for line in output.splitlines() if line.startswith("preflight: "))
    assert "packs_per_step=3 cannot be dealt to 2 data-parallel replicas" in said
    assert f"{absent} cannot be read (No such file or directory)" in said
    assert "GB/s, under OVR_MIN_BUS_GBPS=1e+06; see that NCCL takes the fast network" in said
    assert "MB/s, under OVR_MIN_WRITE_MBPS=1e+09" in said
    assert said.splitlines()[-1].startswith("preflight: refused: 2 ranks")
    assert "summary: job=local-" in output and "state=refused status=2 steps=0/0" in output
    assert not (run / "metrics").exists()


def test_a_rehearsal_passes_the_pre_flight_and_is_finished(model: Path, run: Path) -> None:
    """By an interpreter of its own, as a user starts it."""
    own = run.with_name("own recipe.yaml")
    own.write_text("defaults: [tiny_rl, _self_]\n")
    process = start(
        Path(sys.executable),
        *["--rehearse", "prompts=4", "responses=2", f"run.dir={run}", "curriculum=[{until: 100, max_tokens: 72}]"],
        script=ROOT / "slurm/rl.sh",
        OVR_RECIPE=str(own),
        OVR_MODEL=str(model),
        OVR_RANKS="1",
    )
    output, _ = process.communicate(timeout=2 * LIMIT_S)
    assert process.returncode == 0, output
    assert "state=finished status=0" in output
    assert [stage["max_tokens"] for stage in json.loads((run / "rehearsal.json").read_text())] == [72]


def test_stops_in_order_and_says_so(loaded_python: Path, model: Path, run: Path) -> None:
    process = start(
        loaded_python, "steps=5000", "data.pack_tokens=512", OVR_RUN=str(run), OVR_MODEL=str(model), OVR_RANKS="1"
    )
    metrics, deadline = run / "metrics/train.jsonl", time.monotonic() + 2 * LIMIT_S
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 75, output
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    assert (checkpoint / "manifest.json").exists()
    summary = (run / "logs/jobs.log").read_text()
    assert f"state=stopped status=75 steps={int(checkpoint.name[5:])}/5000" in summary
    assert f"requeues=0 checkpoint={checkpoint}\n" in summary
