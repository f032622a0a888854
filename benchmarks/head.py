"""Measure the language-model head, forward and backward: tiles beside logits in full.

As a program, ``python -m benchmarks.head VARIANT TOKENS VOCAB WIDTH DTYPE`` prints the bytes that one
variant needs on the CPU.  `measure_head` starts it, because a process has one peak for all that it does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.subprocess_bench import BenchRow, resident_bytes, run_in_subprocess
from ovr_megatron.model.heads import BANNED, token_scores

TEMPERATURE = 0.9
NAIVE = "logits in full"
NAIVE_ENTROPY = "logits in full, with entropy"
TILES = "tiles"
VARIANTS = (NAIVE, NAIVE_ENTROPY, TILES)


def run(rounds: int) -> list[BenchRow]:
    """Measure the head at the vocabulary of Qwen2.5-VL-7B; no GPU holds the logits of 65536 tokens in full."""
    if not torch.cuda.is_available():
        return measure_head(2048, 152064, 256, "float32", "cpu", rounds)
    rows = measure_head(8192, 152064, 3584, "bfloat16", "cuda", rounds)
    return rows + measure_head(65536, 152064, 3584, "bfloat16", "cuda", rounds, (TILES,))


def format_table(rows: Sequence[BenchRow]) -> str:
    """Return the rows as a table of text."""
    lines = [f"{'':28}{'tokens':>8}{'vocab':>8}{'width':>7}{'dtype':>10}{'seconds':>9}{'cpu s':>8}{'extra MB':>10}"]
    for row in rows:
        line = f"{row['variant']:28}{row['tokens']:8}{row['vocab']:8}{row['width']:7}"
        line += f"{row['dtype']:>10}{row['seconds']:9.3f}{row['cpu_seconds']:8.3f}{row['extra_bytes'] / 1e6:10,.0f}"
        lines.append(line)
    return "\n".join(lines)


def measure_head(
    tokens: int, vocab: int, width: int, dtype: str, device: str, repeats: int, variants: Sequence[str] = VARIANTS
) -> list[BenchRow]:
    """Measure time and memory of the loss of ``tokens`` rows and its gradients, for each of ``variants``.

    This needs a process group of this process alone: the one that is there, or one that is started here and ended.

    Returns:
        One row a variant: the arguments, ``variant``, ``seconds`` and ``cpu_seconds`` (each the least of ``repeats``
        runs, the variants taking turns; the second does not see what else the machine does), and ``extra_bytes``, the
        peak beyond the head's inputs and the gradient of its weight; the gradient of the hidden states counts.
    """
    inputs = _make_inputs(tokens, vocab, width, dtype, device)
    weight = inputs[1]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    cpu_seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    gpu_bytes = {}
    starts_group = not dist.is_initialized()
    if starts_group:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    if device == "cuda":
        # The first run starts libraries and compiles kernels.
        for variant in variants:
            _run_variant(variant, *inputs)
    # In turns, so that a busy moment of the machine does not hit a single variant.
    for variant in tuple(variants) * repeats:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            bytes_before = torch.cuda.memory_allocated()
        wall_start = time.perf_counter()
        cpu_start = time.process_time()
        _run_variant(variant, *inputs)
        seconds[variant].append(time.perf_counter() - wall_start)
        cpu_seconds[variant].append(time.process_time() - cpu_start)
        if device == "cuda":
            gpu_bytes[variant] = torch.cuda.max_memory_allocated() - bytes_before - weight.nbytes
    if starts_group:
        dist.destroy_process_group()
    case = {"tokens": tokens, "vocab": vocab, "width": width, "dtype": dtype, "device": device}
    rows = []
    for variant in variants:
        row: BenchRow = {"variant": variant, **case}
        row["seconds"] = min(seconds[variant])
        row["cpu_seconds"] = min(cpu_seconds[variant])
        row["extra_bytes"] = gpu_bytes.get(variant) or extra_bytes(variant, tokens, vocab, width, dtype)
        rows.append(row)
    return rows


def extra_bytes(variant: str, tokens: int, vocab: int, width: int, dtype: str = "float32") -> int:
    """Measure ``extra_bytes`` of `measure_head` for one variant on the CPU, in a new process."""
    (row,) = run_in_subprocess(__name__, variant, tokens, vocab, width, dtype)
    return int(row["extra_bytes"])


def _make_inputs(tokens: int, vocab: int, width: int, dtype: str, device: str) -> tuple[Tensor, ...]:
    """Return hidden states [n, D], weight [V, D], labels [n], banned [V] and the loss's derivative by each row [n]."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    hidden = torch.randn(tokens, width, **options)
    weight = torch.empty(vocab, width, **options).normal_(std=0.1)
    labels = torch.randint(0, vocab * 9 // 10, (tokens,), device=device)
    banned = torch.arange(vocab, device=device) >= vocab * 99 // 100
    upstream = torch.rand(tokens, device=device)
    return hidden.requires_grad_(), weight.requires_grad_(), labels, banned, upstream


def _run_variant(
    variant: str, hidden: Tensor, weight: Tensor, labels: Tensor, banned: Tensor, upstream: Tensor
) -> None:
    if variant == TILES:
        logprobs, _ = token_scores(hidden, weight, labels, banned, TEMPERATURE, dist.group.WORLD)
    else:
        scores = (hidden @ weight.t()).float().div_(TEMPERATURE).masked_fill_(banned, BANNED).log_softmax(-1)
        # `log_softmax` and `nll_loss` together are what `F.cross_entropy` is; the entropy needs the former, too.
        logprobs = -F.nll_loss(scores, labels, reduction="none")
        if variant == NAIVE_ENTROPY:
            (scores.detach().exp() * scores.detach()).sum(-1)
        del scores  # the graph holds what the backward pass needs
    (logprobs * upstream).sum().backward()
    hidden.grad = None
    weight.grad = None
    if hidden.is_cuda:
        # Kernels run after the calls have returned: the time ends when the device is done.
        torch.cuda.synchronize()


if __name__ == "__main__":
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    variant = sys.argv[1]
    tokens, vocab, width = map(int, sys.argv[2:5])
    dtype = sys.argv[5]
    # A small run first: memory of the libraries is no part of the measurement.
    _run_variant(variant, *_make_inputs(8, 64, 8, dtype, "cpu"))
    inputs = _make_inputs(tokens, vocab, width, dtype, "cpu")
    resident_before = resident_bytes("VmRSS")
    _run_variant(variant, *inputs)
    # [1] is the weight, whose gradient does not count.
    print(json.dumps({"extra_bytes": resident_bytes("VmHWM") - resident_before - inputs[1].nbytes}))
