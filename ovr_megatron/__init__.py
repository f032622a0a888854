"""Open Vision Reasoner on Megatron-Core: linguistic cold start, multimodal PPO, evaluation.

Importing the package is cheap: neither torch, Megatron nor vLLM is loaded before a room that needs it is.
Its one side effect lets a machine without a GPU import a torchvision that was built for one.
"""

from ovr_megatron.runtime import cpu

__version__ = "0.1.0"

cpu.let_torchvision_import()
cpu.hush_megatron()
