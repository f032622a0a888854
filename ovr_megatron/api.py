"""The names for programs, each loaded when it is asked for: ``from ovr_megatron import SFT, compose``.

So a program that grades does not wait for torch, and one that trains without sampling not for vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovr_megatron.chat_model import ChatModel as ChatModel
    from ovr_megatron.chat_model import Reply as Reply
    from ovr_megatron.chat_model import load_model as load_model
    from ovr_megatron.checkpoint.conversion import export_model as export_model
    from ovr_megatron.coldstart.training import SFT as SFT
    from ovr_megatron.config.sampling import Sampling as Sampling
    from ovr_megatron.launch import compose as compose
    from ovr_megatron.rewards.pool import GraderPool as GraderPool
    from ovr_megatron.rewards.verdict import GradeRequest as GradeRequest
    from ovr_megatron.rewards.verdict import Verdict as Verdict
    from ovr_megatron.rl.training import RL as RL

MODULES = {
    "compose": "ovr_megatron.launch",
    "SFT": "ovr_megatron.coldstart.training",
    "RL": "ovr_megatron.rl.training",
    "load_model": "ovr_megatron.chat_model",
    "ChatModel": "ovr_megatron.chat_model",
    "Reply": "ovr_megatron.chat_model",
    "Sampling": "ovr_megatron.config.sampling",
    "export_model": "ovr_megatron.checkpoint.conversion",
    "GraderPool": "ovr_megatron.rewards.pool",
    "GradeRequest": "ovr_megatron.rewards.verdict",
    "Verdict": "ovr_megatron.rewards.verdict",
}
"""The module of each name."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"{__name__} has no {name}; it has {', '.join(MODULES)}")
    return getattr(import_module(MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
