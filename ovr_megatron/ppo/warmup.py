"""The first iterations, in which the critic alone learns: value pretraining with a fixed policy (VC-PPO, VAPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from ovr_megatron.config import RLConfig

MIN_IMPROVEMENT = 0.01  # of the explained variance: batches differ by about as much


class WarmupState(TypedDict):
    """What a checkpoint has of a warm-up that may end early.

    Attributes:
        best: largest explained variance so far; absent before the first iteration.
        stale: iterations since then.
        end: first iteration in which the policy learns; absent while that is open.
    """

    best: NotRequired[float]
    stale: int
    end: NotRequired[int]


@dataclass
class CriticWarmup:
    """Whether the policy learns in an iteration.

    With ``patience`` the warm-up ends before ``iterations`` where the explained variance of the values stops to rise:
    in the first iteration whose values, those before its update, are the ``patience``-th in a row that explain less
    than `MIN_IMPROVEMENT` more than the best before.  The policy learns in that iteration.

    Attributes:
        iterations: most iterations of the warm-up.
        patience: iterations without a rise that end it; 0: it does not end early.
        critic_only: whether the run trains the critic alone and ends with the warm-up.
        best: largest explained variance so far, None before the first iteration.
        iterations_without_rise: iterations since then.
        end: first iteration after a warm-up that has ended early, else None.
    """

    iterations: int
    patience: int = 0
    critic_only: bool = False
    best: float | None = None
    iterations_without_rise: int = 0
    end: int | None = None

    @classmethod
    def from_config(cls, config: RLConfig) -> CriticWarmup:
        """Return the warm-up at the beginning of a run."""
        critic_only = config.only == "critic"
        iterations = config.iterations if critic_only else config.algorithm.critic_warmup_iterations
        return cls(iterations, config.algorithm.critic_warmup_patience, critic_only)

    @property
    def first_policy_iteration(self) -> int:
        """The first iteration in which the policy learns, or would beside it, as far as it is known."""
        return self.iterations if self.end is None else self.end

    def trains_policy(self, iteration: int) -> bool:
        """Return whether the policy learns in ``iteration``; call `observe` with the iteration first."""
        return not self.critic_only and iteration >= self.first_policy_iteration

    def may_train_policy(self, iteration: int) -> bool:
        """Return whether the policy can still learn in ``iteration``, whatever `observe` is called with."""
        return not self.critic_only and (self.patience > 0 or iteration >= self.first_policy_iteration)

    def observe(self, iteration: int, explained_variance: float) -> bool:
        """Count ``iteration`` and end the warm-up where its values have stopped to improve.

        Args:
            iteration: from 0.
            explained_variance: of the values before the update, the same on all ranks.

        Returns:
            Whether the warm-up ends early with this iteration.
        """
        if not self.patience or iteration >= self.first_policy_iteration:
            return False
        if self.best is None or explained_variance >= self.best + MIN_IMPROVEMENT:
            self.best = explained_variance
            self.iterations_without_rise = 0
            return False
        self.iterations_without_rise += 1
        if self.iterations_without_rise < self.patience:
            return False
        self.end = iteration
        return True

    def state(self) -> WarmupState:
        """Return its progress as JSON."""
        state: WarmupState = {"stale": self.iterations_without_rise}
        if self.best is not None:
            state["best"] = self.best
        if self.end is not None:
            state["end"] = self.end
        return state

    def load(self, state: WarmupState) -> None:
        """Go on from the progress that `state` gave.

        A run of the critic alone that has ended early goes on where ``patience`` is longer now, or 0.
        """
        self.best = state.get("best")
        self.iterations_without_rise = state["stale"]
        self.end = state.get("end")
        is_patient = not self.patience or self.iterations_without_rise < self.patience
        if self.critic_only and is_patient:
            self.end = None


def policy_steps(config: RLConfig, warmup: CriticWarmup) -> int:
    """Return the optimizer steps of the policy in the run: its schedule counts the iterations in which it learns."""
    iterations = max(config.iterations - warmup.first_policy_iteration, 1)
    return iterations * config.algorithm.policy_updates
