"""A conversion that is killed leaves nothing that looks whole, and can be done again."""

import os
import subprocess
import sys
from pathlib import Path

from ovr_megatron.model.tiny import TinySizes, make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
SIZES = TinySizes(hidden=32, layers=1, ffn=48, vision_hidden=32, vision_heads=2, vision_ffn=40)


def test_killed_at_any_write(tmp_path):
    hf = make_tiny_model(tmp_path / "hf", tied=False, sizes=SIZES)
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(ROOT / "tests/weights/kill_points.py"), str(hf), str(tmp_path / "work")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    kills = [int(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("convert_")]
    assert len(kills) == 3 and min(kills) > 15, run.stdout
