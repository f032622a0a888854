"""A model's name on the Hugging Face hub is a folder in Hugging Face's cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.data.hub import is_hub_name
from ovr_megatron.model.tiny import make_tiny_model

REVISION = "0123456789abcdef0123456789abcdef01234567"
ASK = """
import sys
from ovr_megatron.data.hub import HubError, local_folder
for name in sys.argv[1:]:
    try:
        print(local_folder(name))
    except HubError as error:
        print(error)
"""


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds one model, as ``hf download`` leaves it."""
    model = tmp_path / "hub/models--org--tiny"
    make_tiny_model(model / "snapshots" / REVISION, tied=True, seed=1)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(REVISION)
    return tmp_path


def test_a_name_is_found_in_the_cache_or_refused_in_one_sentence(cache: Path) -> None:
    # The library reads its environment when it is imported.
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    names = ["org/tiny", "org/tiny@main", f"org/tiny@{REVISION}", "org/other", "org/tiny@v2"]
    command = [sys.executable, "-c", ASK, *names]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache)
    answers = result.stdout.splitlines()
    assert len(answers) == len(names), result.stderr[-2000:]
    snapshot = cache / "hub/models--org--tiny/snapshots" / REVISION
    assert answers[:3] == [str(snapshot)] * 3
    for name, answer in zip(names[3:], answers[3:], strict=True):
        assert answer.startswith(f"{name} is no folder on this machine, and the Hugging Face hub does not give it (")
        assert "hf download org/" in answer


def test_a_models_folder_is_asked_for_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "snapshot", tied=True, seed=1)
    monkeypatch.setattr("ovr_megatron.data.hub.snapshot_download", lambda name, **options: str(tmp_path / "snapshot"))
    assert weights_of("org/tiny") == tmp_path / "snapshot"


def test_a_path_of_this_machine_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "org/model").mkdir(parents=True)
    assert is_hub_name("Qwen/Qwen2.5-VL-7B-Instruct")
    assert is_hub_name("Qwen/Qwen2.5-VL-7B-Instruct@main")
    # A mistyped run of this machine is not looked for elsewhere.
    for path in ("org/model", "runs/mistyped", "7B", "/data/model", "./model", "a/b/c"):
        assert not is_hub_name(path)
