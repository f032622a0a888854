"""Open Vision Reasoner on Megatron-Core: linguistic cold start, multimodal PPO, evaluation.

Importing the package is cheap: torch, Megatron and vLLM are loaded only with a room that needs them.
The import has side effects: a machine without a GPU can import a torchvision that was built for one, a rank that
``torchrun`` or ``srun`` started gets the settings of `ovr_megatron.runtime.environment`, and where Transformer Engine
is installed, the cuDNN that it needs is loaded.

The names for programs are those of `ovr_megatron.api`: ``from ovr_megatron import SFT, compose``.
"""

import os
from importlib import import_module
from typing import Any

from ovr_megatron.runtime import cpu, environment, torchvision_on_cpu

__version__ = "0.1.0"

# First of all: torch, NCCL, Triton and vLLM read these variables when they are imported.
environment.apply(os.environ)
environment.load_cudnn(os.environ)
torchvision_on_cpu.let_torchvision_import()
cpu.silence_megatron()


def __getattr__(name: str) -> Any:
    """Return a name of `ovr_megatron.api`, which is loaded now."""
    api = import_module(f"{__name__}.api")
    if name not in api.MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(api, name)
