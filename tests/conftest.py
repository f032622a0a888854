"""Before any test imports Transformers: let torchvision import on a machine without a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ovr_megatron  # noqa: F401
