"""Before any test imports Transformers: let torchvision import on a machine without a GPU."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis

import ovr_megatron  # noqa: F401
from tests import forked

# An example's seconds say how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# The longest first, in the order of their seconds: two workers then end together.
LONGEST = (
    "test_documentation.py",
    "slurm/test_script.py",
    "test_stages.py",
    "test_real_data.py",
    "model/test_layouts.py",
    "curation/test_engines.py",
    "rollout/test_reshard.py",
    "plan/test_memory.py",
    "model/test_lora.py",
    "test_bad_inputs.py",
    "model/test_parity.py",
    "curation/test_prepare.py",
    "model/test_kernels.py",
    "evaluation/test_evaluate.py",
)
_PLACES = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of `LONGEST` before the others, which keep their order."""
    items.sort(key=lambda item: _PLACES.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def loaded_python() -> Path:
    """An interpreter that has imported the libraries: see tests/forked.py."""
    return forked.start()


def pytest_unconfigure() -> None:
    """End the process that is forked; the workers of xdist have no other end."""
    forked.stop()
