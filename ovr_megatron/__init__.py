"""Open Vision Reasoner on Megatron-Core: linguistic cold start, multimodal PPO, evaluation.

Importing the package is cheap and has no side effects: neither torch, Megatron nor vLLM is loaded
before a room that needs it is.
"""

__version__ = "0.1.0"
