"""What the language-model head costs, forward and backward: tiles against logits in full.

As a program, ``python -m ovr_megatron.analysis.bench_head VARIANT TOKENS VOCAB WIDTH DTYPE`` prints the bytes that one
variant needs on the CPU; `measure_head` starts it, because a process's peak cannot be told apart from the next one's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ovr_megatron.model.heads import BANNED, token_scores

TEMPERATURE = 0.9
NAIVE, NAIVE_ENTROPY, TILES = "logits in full", "logits in full, with entropy", "tiles"
VARIANTS = (NAIVE, NAIVE_ENTROPY, TILES)


def rows(rounds: int) -> list[dict[str, Any]]:
    """Rows of `measure_head` at the vocabulary of Qwen2.5-VL-7B; no GPU holds the logits of 65536 tokens in full."""
    if not torch.cuda.is_available():
        return measure_head(2048, 152064, 256, "float32", "cpu", rounds)
    found = measure_head(8192, 152064, 3584, "bfloat16", "cuda", rounds)
    return found + measure_head(65536, 152064, 3584, "bfloat16", "cuda", rounds, (TILES,))


def show(found: Sequence[dict[str, Any]]) -> str:
    """The rows as a table of text."""
    lines = [f"{'':28}{'tokens':>8}{'vocab':>8}{'width':>7}{'dtype':>10}{'seconds':>9}{'cpu s':>8}{'extra MB':>10}"]
    for row in found:
        line = f"{row['variant']:28}{row['tokens']:8}{row['vocab']:8}{row['width']:7}{row['dtype']:>10}"
        lines.append(line + f"{row['seconds']:9.3f}{row['cpu_seconds']:8.3f}{row['extra_bytes'] / 1e6:10,.0f}")
    return "\n".join(lines)


def measure_head(
    tokens: int, vocab: int, width: int, dtype: str, device: str, repeats: int, variants: Sequence[str] = VARIANTS
) -> list[dict[str, Any]]:
    """Time and memory of the loss of ``tokens`` rows and its gradients, for each of ``variants``.

    It needs a process group of this process alone: the one that is there, or one that it starts and ends.

    Returns:
        One row a variant: the arguments, ``variant``, ``seconds`` and ``cpu_seconds`` (each the least of ``repeats``
        runs, the variants taking turns; the second does not see what else the machine does), and ``extra_bytes``, the
        peak beyond the head's inputs and the gradient of its weight; the gradient of the hidden states counts.
    """
    inputs = _inputs(tokens, vocab, width, dtype, device)
    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    extra = {}
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    for variant in variants if device == "cuda" else ():  # libraries start, kernels are compiled
        _run(variant, *inputs)
    for variant in tuple(variants) * repeats:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        wall, cpu = time.perf_counter(), time.process_time()
        _run(variant, *inputs)
        times[variant].append((time.perf_counter() - wall, time.process_time() - cpu))
        if device == "cuda":
            extra[variant] = torch.cuda.max_memory_allocated() - before - inputs[1].nbytes
    if alone:
        dist.destroy_process_group()
    found = []
    for variant in variants:
        row = {"variant": variant, "tokens": tokens, "vocab": vocab, "width": width, "dtype": dtype, "device": device}
        row["seconds"], row["cpu_seconds"] = (min(column) for column in zip(*times[variant], strict=True))
        row["extra_bytes"] = extra.get(variant) or extra_bytes(variant, tokens, vocab, width, dtype)
        found.append(row)
    return found


def extra_bytes(variant: str, tokens: int, vocab: int, width: int, dtype: str = "float32") -> int:
    """``extra_bytes`` of `measure_head` for one variant on the CPU, in a process of its own."""
    command = [sys.executable, "-m", __spec__.name, variant, *map(str, (tokens, vocab, width)), dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _inputs(tokens: int, vocab: int, width: int, dtype: str, device: str) -> tuple[Tensor, ...]:
    """Hidden states [n, D], weight [V, D], labels [n], banned [V] and the loss's derivative by each row [n]."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    hidden, weight = torch.randn(tokens, width, **options), torch.empty(vocab, width, **options).normal_(std=0.1)
    labels = torch.randint(0, vocab * 9 // 10, (tokens,), device=device)
    banned = torch.arange(vocab, device=device) >= vocab * 99 // 100
    return hidden.requires_grad_(), weight.requires_grad_(), labels, banned, torch.rand(tokens, device=device)


def _run(variant: str, hidden: Tensor, weight: Tensor, labels: Tensor, banned: Tensor, upstream: Tensor) -> None:
    if variant == TILES:
        logprobs, _ = token_scores(hidden, weight, labels, banned, TEMPERATURE, dist.group.WORLD)
    else:
        scores = (hidden @ weight.t()).float().div_(TEMPERATURE).masked_fill_(banned, BANNED).log_softmax(-1)
        logprobs = -F.nll_loss(scores, labels, reduction="none")  # together what F.cross_entropy is
        if variant == NAIVE_ENTROPY:
            (scores.detach().exp() * scores.detach()).sum(-1)
        del scores
    (logprobs * upstream).sum().backward()
    hidden.grad = weight.grad = None
    if hidden.is_cuda:
        torch.cuda.synchronize()


def _status(field: str) -> int:
    """Bytes that the kernel tells of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    _run(sys.argv[1], *_inputs(8, 64, 8, sys.argv[5], "cpu"))
    tokens, vocab, width = map(int, sys.argv[2:5])
    inputs = _inputs(tokens, vocab, width, sys.argv[5], "cpu")
    resident = _status("VmRSS")
    _run(sys.argv[1], *inputs)
    print(_status("VmHWM") - resident - inputs[1].nbytes)
