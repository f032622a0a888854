"""Before any test imports Transformers: let torchvision import on a machine without a GPU."""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis

import ovr_megatron  # noqa: F401
from tests.forked import serve

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
def loaded_python() -> Iterator[Path]:
    """An interpreter that has imported the libraries: see tests/forked.py."""
    # In a folder of its own: the path of a socket has at most 107 characters.
    with TemporaryDirectory() as folder, serve(Path(folder)) as python:
        yield python
