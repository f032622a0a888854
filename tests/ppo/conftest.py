"""The one launch that tests/ppo/test_loops.py and tests/ppo/test_reference.py read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.model.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folders of tests/ppo/loops.py.

    For tests/soak/mutants.py ``OVR_TEST_LOOPS`` has further arguments, ``OVR_TEST_RANKS`` the number of processes.
    """
    out = tmp_path_factory.mktemp("loops")
    make_tiny_model(out / "model", tied=True, seed=5)
    make_tiny_model(out / "other", tied=True, seed=6)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={os.environ.get('OVR_TEST_RANKS', 2)}",
    ]
    path = os.pathsep.join(filter(None, (str(ROOT / "tests/ppo"), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [*command, ROOT / "tests/ppo/loops.py", out, *os.environ.get("OVR_TEST_LOOPS", "").split()],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return out
