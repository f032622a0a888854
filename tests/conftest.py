"""Before any test imports Transformers: let torchvision import on a machine without a GPU."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis

import ovr_megatron  # noqa: F401

# An example's seconds say how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
