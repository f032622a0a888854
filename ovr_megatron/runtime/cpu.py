"""Patch torch and Megatron-Core to run on a machine without a GPU.

This is the only file of the project that patches torch, torchvision or Megatron.  With a GPU, each function
here does nothing.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from typing import Any

# Modules that name the device "cuda" literally, or pin memory, when they create tensors.
_MODULES_WITH_LITERAL_CUDA = (
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "utils",
    "transformer.utils",
    "models.common.embeddings.rope_utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.exchange_utils",
)
_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "empty_like", "zeros_like")


def silence_megatron() -> None:
    """Drop Megatron's warnings of its defaults and of missing optional libraries (Transformer Engine, Apex)."""
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (are|is) not installed")
    warnings.filterwarnings("ignore", message="full scope is deprecated")  # about a setting that is not used


class _TorchOnCpu(types.ModuleType):
    """Stands in for the name ``torch`` in one Megatron module: tensors requested on "cuda" are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        import torch  # noqa: PLC0415 (the module is free of torch)

        value = getattr(torch, name)
        if name not in _FACTORIES:
            return value

        def make(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            return value(*args, **kwargs)

        return make


def let_megatron_run() -> None:
    """Point Megatron-Core's CUDA calls at the CPU.  Idempotent; does nothing where CUDA is available."""
    import torch  # noqa: PLC0415 (the module is free of torch)

    if torch.cuda.is_available() or getattr(torch.cuda, "_ovr_on_cpu", False):
        return
    torch.cuda._ovr_on_cpu = True
    device = torch.device("cpu")
    torch.cuda.current_device = lambda: device
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = torch.cpu.current_stream  # called from 0.19 on
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed) and None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self

    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    for name in _MODULES_WITH_LITERAL_CUDA:
        importlib.import_module(f"megatron.core.{name}").torch = _TorchOnCpu("torch")  # type: ignore[attr-defined]
    _name_cpu_types_as_cuda(torch)
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    layers.fused_weight_gradient_mlp_cuda = _FusedWeightGradient  # type: ignore[attr-defined]
    layers._grad_accum_fusion_available = True  # type: ignore[attr-defined]


class _FusedWeightGradient:
    """Replaces Apex's extension: adds the gradient of a linear layer's weight to the buffer that accumulates it."""

    @staticmethod
    def wgrad_gemm_accum_fp32(total_input: Any, grad_output: Any, main_grad: Any) -> None:
        """Compute ``main_grad`` [out, in] += ``grad_output`` [T, out]^T ``total_input`` [T, in]."""
        if grad_output.dtype == main_grad.dtype:
            main_grad.addmm_(grad_output.t(), total_input)
        else:
            main_grad.add_(grad_output.t() @ total_input)


def _name_cpu_types_as_cuda(torch: Any) -> None:
    """Make ``Tensor.type()`` answer Megatron's optimizers, and only them, with the CUDA name.

    They compare ``tensor.type()`` with 'torch.cuda.FloatTensor' and refuse any other.
    """
    original = torch.Tensor.type

    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and caller.startswith("megatron.core.optimizer"):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    torch.Tensor.type = type_
