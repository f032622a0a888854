"""Transformer layer specifications: the class that implements each part, with Transformer Engine or without.

Parameter names are Transformer Engine's in both cases, so checkpoints of both have the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from ovr_megatron.config import ConfigError, ModelConfig
from ovr_megatron.model import kernels
from ovr_megatron.model.attention import PackedDotProductAttention, PackedSelfAttention
from ovr_megatron.model.segments import Segments


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise by the root mean square of the last dimension, statistics in float32 (as Transformers does)."""
    if x.is_cuda:  # torch has a fused kernel there
        return weight * torch.nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms(x): d x = (g w - n mean(g w n)) / rms(x), d w = sum(g n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_float = x.float()
        # mean(x^2) = |x|^2 / D, without a tensor of the squares.
        scale = torch.linalg.vector_norm(x_float, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x_float * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_float = grad.float()
        weight_float = weight.float()
        product = grad_float * normed
        d_weight = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = (product @ weight_float).unsqueeze(-1).div_(x.size(-1))
        d_x = torch.mul(grad_float, weight_float, out=product).addcmul_(normed, mean, value=-1.0).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension: LayerNorm where there is a ``bias``, else `rms_norm`."""
    if bias is None:
        return rms_norm(x, weight, eps)
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _norm_parameters(config: TransformerConfig, size: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """Return the weight of a norm, and the bias where ``config`` asks for LayerNorm."""
    device = torch.cuda.current_device()
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device))
    # Megatron sums the gradients of marked parameters over the tensor-parallel ranks.
    weight.sequence_parallel = config.sequence_parallel
    if config.normalization == "RMSNorm":
        return weight, None
    bias = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype, device=device))
    bias.sequence_parallel = config.sequence_parallel
    return weight, bias


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, as the configuration says; its gradients are those of all rows of a pack.

    Under sequence parallelism they are summed over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = _norm_parameters(config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., hidden_size]."""
        return norm(x, self.weight, self.bias, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """Norm and column-parallel linear in one module, parameters named as in Transformer Engine's fused layer."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight, self.layer_norm_bias = _norm_parameters(config, input_size)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Normalise, then multiply; see `ColumnParallelLinear`."""
        normed = norm(input_, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(normed, *args, **kwargs)


class SwiGLU(torch.nn.Module):
    """The MLP's gate silu(a) * b, whose backward writes the gradient of (a, b) over them.

    On a GPU nothing else is stored; on a CPU silu(a) is, since an exponential costs more there than its memory.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()

    def forward(self, gate_up: Tensor) -> Tensor:
        """Return [..., F] of ``gate_up`` [..., 2F], a before b."""
        return _SwiGLU.apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    """The function of `SwiGLU`; on a CPU it is torch, on a GPU one kernel a pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        if gate_up.is_cuda:
            ctx.save_for_backward(gate_up)
            return kernels.swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # The gradient is written over the stored tensor: backward reads it once.
        gate_up, *activations = ctx.saved_tensors
        if gate_up.is_cuda:
            return kernels.swiglu_backward(gate_up, grad)
        gate, up = gate_up.chunk(2, dim=-1)
        (activated,) = activations
        up.mul_(grad)
        torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=gate)
        torch.mul(activated, grad, out=up)
        return gate_up


def _unchanged(name: str, linear: Any) -> Any:
    return linear


@dataclass(frozen=True)
class LayerClasses:
    """The classes of a transformer layer's modules.

    ``adapt`` returns the class of one linear layer, of its name in the layer (``mlp.linear_fc1``) and the class without
    an adapter.
    """

    norm: Any
    norm_linear: Any
    row_linear: Any
    core_attention: Any
    adapt: Callable[[str, Any], Any] = _unchanged


def choose_layer_classes(layers: str, dtype: torch.dtype) -> LayerClasses:
    """Return Transformer Engine's classes or ours.

    In float32 ours are taken: Transformer Engine has cuBLAS multiply float32 in TF32, with 10 bits of mantissa and
    whatever torch's settings are (``common/gemm/cublaslt_gemm.cu``), and its attention over packs takes bfloat16 or
    float16 only.

    Args:
        layers: ``auto`` (Transformer Engine where it is installed and there is a GPU), ``local`` or
            ``transformer_engine``.
        dtype: of the parameters.

    Raises:
        ConfigError: Transformer Engine is asked for and cannot be had, or in float32.
    """
    ours = LayerClasses(Norm, NormColumnParallelLinear, RowParallelLinear, PackedDotProductAttention)
    if layers == "local" or (layers == "auto" and not torch.cuda.is_available()):
        return ours
    if dtype == torch.float32:
        if layers == "auto":
            return ours
        raise ConfigError(
            "model.layers=transformer_engine with model.dtype=float32: Transformer Engine multiplies float32 in TF32; "
            "set model.layers=auto, or model.dtype=bfloat16"
        )
    try:
        # An optional package, which breaks at its import where it does not fit the machine.
        from megatron.core.extensions import transformer_engine as te  # noqa: PLC0415, TID251
    except ImportError as error:
        te = None
        reason = str(error)
    else:
        reason = "it is not installed" if not getattr(te, "HAVE_TE", False) else ""
    if reason:
        if layers == "auto":
            return ours
        raise ConfigError(
            f"model.layers=transformer_engine: Transformer Engine cannot be used here ({reason}); "
            "install the extra `te` or set model.layers=auto"
        )
    if not torch.cuda.is_available():
        raise ConfigError("model.layers=transformer_engine needs a GPU; set model.layers=auto")
    attention = _packed_attention(te.TEDotProductAttention)
    return LayerClasses(te.TENorm, te.TELayerNormColumnParallelLinear, te.TERowParallelLinear, attention)


def layers_in_use(model: ModelConfig) -> str:
    """Return in words whose layers an engine of ``model`` has on this machine, and why if not Transformer Engine's.

    Raises:
        ConfigError: as `choose_layer_classes`.
    """
    layers = "transformer_engine" if model.fp8 != "none" else model.layers
    if choose_layer_classes(layers, getattr(torch, model.dtype)).norm is not Norm:
        return f"Transformer Engine {metadata.version('transformer_engine')}"
    if not torch.cuda.is_available() or layers == "local":
        return "this project's own"
    if model.dtype == "float32":
        return "this project's own, since Transformer Engine multiplies float32 in TF32"
    return "this project's own, several times slower than Transformer Engine's, which is not installed here"


def cautions(model: ModelConfig, rollout: bool) -> list[str]:
    """List what is not exact with the FP8 settings of ``model``; ``rollout``: its policy generates in vLLM."""
    sentences = []
    if model.fp8 == "delayed":
        sentences.append(
            "model.fp8=delayed: no checkpoint holds the scaling history, so that a resumed run begins a new one and "
            "differs from an undisturbed run; model.fp8=current and block have no such state"
        )
    if model.fp8 != "none" and rollout:
        sentences.append(
            f"model.fp8={model.fp8}: vLLM generates in {model.dtype}, so that its log-probabilities and the trainer's "
            "differ more than rounding; watch rollout/mismatch_mean"
        )
    return sentences


class BottomRightMask(Enum):
    """Transformer Engine's name of a causal mask under which a document's last query sees all of its keys.

    Megatron's `AttnMaskType` has no name for it over packs; its wrapper passes the name on.
    """

    padding_causal_bottom_right = 1


def _packed_attention(attention: Any) -> Any:
    """Return Transformer Engine's attention with ``pad_between_seqs`` and ``key_rows`` from `Segments`.

    Without the former the attention would ask the device, and wait for the answer, in every layer.
    """

    class PackedTEAttention(attention):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.kept_packed_seq_params.add("pad_between_seqs")

        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Any,
            *,
            packed_seq_params: Segments,
            attn_mask_type: Any,
            **kwargs: Any,
        ) -> Any:
            if packed_seq_params.key_rows is not None:
                # A document's keys are those of the prompt that it shares, and its own.
                key = key[packed_seq_params.key_rows]
                value = value[packed_seq_params.key_rows]
                attn_mask_type = BottomRightMask.padding_causal_bottom_right
            return super().forward(
                query,
                key,
                value,
                attention_mask,
                packed_seq_params=packed_seq_params,
                attn_mask_type=attn_mask_type,
                **kwargs,
            )

    return PackedTEAttention


def layer_spec(
    config: TransformerConfig,
    causal: bool,
    classes: LayerClasses,
    layer: type[TransformerLayer] = TransformerLayer,
) -> ModuleSpec:
    """Return the specification of a transformer layer: causal for language, bidirectional for the vision tower.

    Args:
        config: of the layers; queries and keys are normed by head where it says so.
        causal: whether a row sees the rows before it alone.
        classes: of the layer's modules.
        layer: class of the layer itself.
    """
    head_norm = classes.norm if config.qk_layernorm else IdentityOp
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.padding_causal if causal else AttnMaskType.padding},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=classes.adapt("self_attention.linear_qkv", classes.norm_linear),
                    core_attention=classes.core_attention,
                    linear_proj=classes.adapt("self_attention.linear_proj", classes.row_linear),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=classes.adapt("mlp.linear_fc1", classes.norm_linear),
                    linear_fc2=classes.adapt("mlp.linear_fc2", classes.row_linear),
                    activation_func=SwiGLU,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
