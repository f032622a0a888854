"""The one launch that tests/ppo/test_loops.py, test_reference.py and test_critic.py read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ovr_megatron.families.tiny import TinySizes
from ovr_megatron.model.tiny import make_tiny_model
from tests.ranks import launch

ROOT = Path(__file__).resolve().parents[2]
# Another size in everything that a teacher may have its own of.
TEACHER = TinySizes(hidden=96, ffn=160, layers=6, heads=6, vision_depth=3, vision_hidden=64, vision_ffn=128)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folders of tests/ppo/loops.py.

    For tests/soak/mutants.py ``OVR_TEST_LOOPS`` has further arguments, ``OVR_TEST_RANKS`` the number of processes.
    """
    out = tmp_path_factory.mktemp("loops")
    make_tiny_model(out / "model", tied=True, seed=5)
    make_tiny_model(out / "other", tied=True, seed=6)
    make_tiny_model(out / "small", tied=True, seed=7, sizes=TinySizes(hidden=64, layers=2, ffn=128))
    _make_silent_critic(out / "model", out / "silent")
    make_tiny_model(out / "teacher", tied=False, seed=7, sizes=TEACHER)
    words = os.environ.get("OVR_TEST_LOOPS", "").split()
    launch(ROOT / "tests/ppo/loops.py", out, *words, ranks=int(os.environ.get("OVR_TEST_RANKS", "2")))
    return out


def _make_silent_critic(model: Path, out: Path) -> None:
    """Write ``model`` with a value head of zeros, whose values explain exactly nothing."""
    shutil.copytree(model, out)
    weights = load_file(model / "model.safetensors")
    width = weights["model.embed_tokens.weight"].shape[1]
    save_file(weights | {"value_head.weight": np.zeros((1, width), np.float32)}, out / "model.safetensors")


@pytest.fixture(scope="session")
def one_engine(runs: Path) -> Path:
    """Return the run folders with ``partial_tp2``, for which processes of their own have started."""
    launch(ROOT / "tests/ppo/loops.py", runs, "one_engine", ranks=2)
    return runs
