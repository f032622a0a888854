"""Settings of reinforcement learning: objective, critic, rewards, and the length curriculum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ovr_megatron.config.checks import choice, require
from ovr_megatron.config.model import OptimizerConfig, ParallelConfig
from ovr_megatron.ppo.estimators import find_estimator


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """The policy's objective.  The defaults are the paper's PPO (section 3.2); docs/algorithms.md has the rest.

    ``estimator``: of the advantage, a row of `ovr_megatron.ppo.estimators` or ``package.module:NAME``.
    ``loss``: of the policy, a row of `ovr_megatron.ppo.losses` or ``package.module:NAME``; checked when a run starts.
    ``clip_high`` (0: as ``clip``) is the upper bound of the ratio alone.
    ``reduction``: every ``token`` weighs the same, or every response (``sequence``), or
    every token by a ``constant`` divisor, or every ``pack``.  ``reduction_tokens`` is that divisor (0: the longest
    limit of the curriculum), the same in the entire run.  With ``policy_epochs`` or ``policy_steps`` (per epoch) over
    1 the log-probabilities before the update are stored.  ``kl_coefficient`` holds the policy to the weights in
    ``reference`` (none: its initial weights) by the estimate ``kl_form``, in the ``loss`` or taken from the ``reward``
    (``kl_in``).  ``importance_cap`` (0: off) weighs each token by the trainer's probability over the rollout engine's,
    up to this cap.  ``dynamic_sampling`` (0: off) is how many times prompts are drawn until enough have responses that
    differ in reward.  ``overlong_buffer``: the last tokens before the limit, which cost up to 1.  ``wrong_reward``: the
    estimator's reward of a wrong response; that of a right response is 1, and verdicts in between are mapped linearly.
    The metrics keep the verdicts of 0 to 1.
    """

    estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 1.0
    loss: str = "clip"
    clip: float = 0.2
    clip_high: float = 0.0
    value_clip: float = 0.0
    reduction: str = "token"
    reduction_tokens: int = 0
    wrong_reward: float = 0.0
    critic_steps: int = 4
    critic_warmup_iterations: int = 0
    policy_epochs: int = 1
    policy_steps: int = 1
    kl_coefficient: float = 0.0
    kl_form: str = "k3"
    kl_in: str = "loss"
    reference: str | None = None
    entropy_bonus: float = 0.0
    importance_cap: float = 0.0
    dynamic_sampling: int = 0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        find_estimator(self.estimator)
        choice("algorithm.reduction", self.reduction, ("token", "sequence", "constant", "pack"))
        choice("algorithm.kl_form", self.kl_form, ("k1", "k2", "k3"))
        choice("algorithm.kl_in", self.kl_in, ("loss", "reward"))
        require(0 < self.clip < 1, f"algorithm.clip={self.clip} must lie between 0 and 1")
        require(0 < self.gamma <= 1 and 0 <= self.lam <= 1, "algorithm.gamma and algorithm.lam must lie in 0..1")
        for key in ("critic_steps", "policy_epochs", "policy_steps"):
            require(getattr(self, key) >= 1, f"algorithm.{key}={getattr(self, key)} must be at least 1")
        for key in ("clip_high", "kl_coefficient", "importance_cap", "dynamic_sampling", "overlong_buffer"):
            require(getattr(self, key) >= 0, f"algorithm.{key}={getattr(self, key)} must be 0 (off) or more")
        require(
            self.reduction_tokens >= 0,
            f"algorithm.reduction_tokens={self.reduction_tokens} must be 0 (the curriculum's longest limit) or more",
        )
        require(
            not self.reduction_tokens or self.reduction == "constant",
            f"algorithm.reduction_tokens={self.reduction_tokens} needs algorithm.reduction=constant, which is "
            f"{self.reduction}; change one of them",
        )
        require(
            math.isfinite(self.wrong_reward) and self.wrong_reward < 1,
            f"algorithm.wrong_reward={self.wrong_reward} must be below 1, which a right response earns",
        )
        require(
            self.has_critic or not self.critic_warmup_iterations,
            f"algorithm.critic_warmup_iterations={self.critic_warmup_iterations}: {self.estimator} has no critic",
        )
        require(
            self.kl_form != "k1" or self.kl_in == "reward" or not self.kl_coefficient,
            "algorithm.kl_form=k1 in the loss has the gradient of the policy's own log-probability, which is none of "
            "the divergence; use k2 or k3, or algorithm.kl_in=reward",
        )

    @property
    def has_critic(self) -> bool:
        """Return whether the estimator needs values."""
        return find_estimator(self.estimator).needs_values

    @property
    def in_groups(self) -> bool:
        """Return whether the estimator compares the responses to one prompt."""
        return find_estimator(self.estimator).needs_groups

    @property
    def most_steps(self) -> int:
        """Return the largest number of optimizer steps that a batch is cut into."""
        return max(self.policy_steps, self.critic_steps if self.has_critic else 1)

    @property
    def scoring_passes(self) -> int:
        """Return the forward passes over the responses beside the updates.

        One is for the log-probabilities before the update, one for those of the reference.
        """
        in_reward = bool(self.kl_coefficient) and self.kl_in == "reward"
        return int(self.policy_updates > 1 or in_reward) + bool(self.kl_coefficient)

    @property
    def policy_updates(self) -> int:
        """Return the optimizer steps of the policy in an iteration."""
        return self.policy_epochs * self.policy_steps


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The separate value network: same class, another head, its own optimizer; ``parallel`` is its own layout."""

    path: str | None = None
    parallel: ParallelConfig | None = None
    head_init: str = "orz"
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))

    def __post_init__(self) -> None:
        choice("critic.head_init", self.head_init, ("orz", "kaiming", "paper"))


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Graders: the number of workers, CPU time and memory of one verdict, and the number of cached verdicts.

    ``rules``: by source, the rule that makes a response right (`ovr_megatron.rewards.rules.rule`); default ``auto``.
    """

    workers: int = 2
    timeout_s: float = 5.0
    memory_mib: int = 1024
    cache: int = 65536
    rules: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"reward.workers={self.workers} must be at least 1")
        require(self.timeout_s > 0, f"reward.timeout_s={self.timeout_s} must be positive")
        require(self.memory_mib >= 256, f"reward.memory_mib={self.memory_mib} must be at least 256, for SymPy's sake")
        require(self.cache >= 0, f"reward.cache={self.cache} must be 0 (off) or a number of verdicts")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of the length curriculum: up to iteration ``until``, ``max_tokens`` of prompt and response together.

    ``mean_tokens`` is the mean that `tools/plan.py` expects; 0: a third of the limit.
    """

    until: int
    max_tokens: int
    mean_tokens: int = 0

    def __post_init__(self) -> None:
        require(self.until > 0 and self.max_tokens > 0, "curriculum[].until and .max_tokens must be positive")
