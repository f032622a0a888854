"""The arithmetic of the Triton kernels, on a GPU, or interpreted on the CPU: ``TRITON_INTERPRET=1 pytest`` this file.

Triton reads that variable when it is imported, so `test_kernels.py` runs this in a process of its own.
"""

import os
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ovr_megatron.model import heads, kernels
from ovr_megatron.model.attention import rotary_table, rotate
from tests.model.test_heads import case, computed, errors, expected

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop has several turns and a rest."""
    monkeypatch.setattr(kernels, "_BLOCK", 16)


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3 if INTERPRETED else 4e-3  # it cuts bfloat16 off
    assert torch.allclose(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ffn", [16, 37])
def test_swiglu(dtype: torch.dtype, ffn: int) -> None:
    torch.manual_seed(1)
    gate_up, grad = (3 * torch.randn(5, 1, n, device=DEVICE).to(dtype) for n in (2 * ffn, ffn))
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    expected_ = F.silu(gate) * up
    expected_.backward(grad.double())
    close(kernels.swiglu(gate_up), expected_.detach(), dtype)
    assert wide.grad is not None
    found = kernels.swiglu_backward(gate_up, grad)
    assert found.data_ptr() == gate_up.data_ptr()
    close(found, wide.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads_", "size"), [(1, 8), (6, 20)])
def test_rotation(dtype: torch.dtype, heads_: int, size: int) -> None:
    torch.manual_seed(1)
    fused = torch.randn(7, 1, heads_, 3 * size, device=DEVICE).to(dtype)  # rows and heads are no neighbours in memory
    table = rotary_table(10 * torch.randn(7, size // 2, device=DEVICE))
    for x, sign in product(fused.chunk(3, -1), (1, -1)):
        ours = kernels.rotate(x, table, sign)
        mirrored = torch.cat((table[..., :size], sign * table[..., size:]), -1)
        theirs, _ = rotate(*(tensor.float().cpu() for tensor in (x, x, mirrored)))
        assert ours.is_contiguous()
        close(ours.cpu(), theirs, dtype)


@pytest.mark.parametrize("tile", [10 * 45, 1 << 20], ids="tile of {} numbers".format)
@pytest.mark.parametrize("kept", [False, True], ids=["computed again", "kept"])
@pytest.mark.parametrize(("upstream", "size"), [("logprob", 1.0), ("logprob", 300.0), ("logprob and entropy", 1.0)])
def test_the_head(tile: int, kept: bool, upstream: str, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def add_tile(*arguments: Any) -> None:
        kernels.add_tile(*arguments[:-1])

    monkeypatch.setitem(heads._TILE_BYTES, DEVICE, 4 * tile)
    monkeypatch.setitem(heads._KEPT_BYTES, DEVICE, 1 << 20 if kept else 0)
    monkeypatch.setattr(heads, "_add_tile", add_tile)
    monkeypatch.setattr(heads, "_tile_gradient", kernels.tile_gradient)
    torch.backends.cuda.matmul.allow_tf32 = False
    given = {name: tensor.to(DEVICE) for name, tensor in case(size=size).items()}
    theirs = expected(given, 0.7, upstream)
    if size > 1.0:  # there is no entropy left
        del theirs["entropy"]
    found = errors(computed(given, 0.7, upstream), theirs)
    assert max(found.values()) < 3e-6, found


def test_the_head_with_bfloat16_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 logits, and their gradient in the weight's dtype."""

    def add_tile(*arguments: Any) -> None:
        kernels.add_tile(*arguments[:-1])

    monkeypatch.setitem(heads._TILE_BYTES, DEVICE, 4 * 10 * 45)
    monkeypatch.setitem(heads._KEPT_BYTES, DEVICE, 0)
    monkeypatch.setattr(heads, "_add_tile", add_tile)
    monkeypatch.setattr(heads, "_tile_gradient", kernels.tile_gradient)
    given = {name: tensor.to(DEVICE) for name, tensor in case(torch.bfloat16, size=2.5).items()}
    found = errors(computed(given, 0.7, "logprob and entropy"), expected(given, 0.7, "logprob and entropy"))
    assert max(found[name] for name in ("logprob", "entropy")) < 1e-5, found
    assert max(found[name] for name in ("hidden", "weight")) < 2**-7, found
