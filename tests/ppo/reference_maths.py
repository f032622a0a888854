"""The equations and the optimizer of tests/ppo/reference.py, as the papers and torch have them.

Shapes: n response tokens; tensors are [n] of one response.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from ovr_megatron.config import OptimizerConfig

PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))


class Steps:
    """Torch's AdamW with a schedule, going on from the moments of a checkpoint; norms and biases do not decay."""

    def __init__(
        self,
        named: dict[str, Parameter],
        settings: OptimizerConfig,
        before: Path | None,
        name: str,
        taken: int,
        total: int,
    ):
        self.settings, self.taken, self.total = settings, taken, total
        self.parameters = list(named.values())
        groups = [
            {"params": [p for p in self.parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self.parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        self.adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, foreach=False)
        if taken:
            assert before is not None
            moments = {
                kind: load_file(before / f"{name}-{kind}/model.safetensors") for kind in ("exp_avg", "exp_avg_sq")
            }
            for key, parameter in named.items():
                state = {kind: tensors[key].clone() for kind, tensors in moments.items()}
                self.adamw.state[parameter] = {"step": torch.tensor(float(taken)), **state}

    def rate(self) -> float:
        """Return the rate of the next step: linear warm-up, then constant, linear or cosine down to the least."""
        s, done = self.settings, self.taken
        if done < s.warmup_steps:
            return s.lr * (done + 1) / s.warmup_steps
        share = (done - s.warmup_steps) / (self.total - s.warmup_steps)
        left = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[s.schedule]
        return s.lr * s.min_lr_ratio + s.lr * (1 - s.min_lr_ratio) * left

    def take(self) -> float:
        """Take a step on the gradients there are and forget them; return their norm before it was clipped."""
        for parameter in self.parameters:
            if parameter.grad is None:  # of the tower in a step of texts: torch would leave its moments as they are
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad)
        for group in self.adamw.param_groups:
            group["lr"] = self.rate()
        self.adamw.step()
        self.adamw.zero_grad()
        self.taken += 1
        return float(norm)


def literal_advantages(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Return A_t, the sum over k of (gamma lam)^k delta_{t+k}, with delta_t = r_t + gamma V_{t+1} - V_t.

    The state after the last token has the value 0.
    """
    n = len(rewards)
    following = torch.cat([values[1:], torch.zeros(1, dtype=values.dtype)])
    delta = rewards + gamma * following - values
    sums = [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
    return torch.stack([torch.as_tensor(x) for x in sums])


def mismatch(differences: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    """Return mean, maximum and the value that a hundredth of all tokens reach, of all and of each modality."""
    kinds = {kind for kind, _ in differences}
    metrics = {}
    for kind in (None, *(kinds if len(kinds) > 1 else ())):
        tokens = torch.cat([values for name, values in differences if kind in (None, name)])
        ending = f"/{kind}" if kind else ""
        metrics[f"rollout/mismatch_mean{ending}"] = float(tokens.mean())
        metrics[f"rollout/mismatch_p99{ending}"] = float(tokens.quantile(0.99, interpolation="higher"))
        metrics[f"rollout/mismatch_max{ending}"] = float(tokens.max())
    return metrics


def divergence(logprobs: Tensor, reference: Tensor, form: str) -> Tensor:
    """Return the estimate of KL(policy || reference) at each token."""
    ratio = (reference - logprobs).exp()
    return {"k1": -(reference - logprobs), "k2": 0.5 * (reference - logprobs) ** 2, "k3": ratio - 1 - ratio.log()}[form]


def hub(name: str) -> str:
    """Return the Hugging Face name of one of Transformers' parameters."""
    for module, prefix in PREFIXES:
        if name.startswith(module):
            return prefix + name.removeprefix(module)
    return name
