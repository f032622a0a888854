"""`rollout.py`, in a process for each dtype."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollouts(dtype: str) -> None:
    file = Path(__file__).with_name("rollout.py")
    command = [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"DTYPE": dtype}, capture_output=True, text=True)
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stderr[-2000:]
