"""The first iterations, in which the critic alone learns: value pretraining with a fixed policy (VC-PPO, VAPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from ovr_megatron.config import RLConfig

LEAST_RISE = 0.01  # of the explained variance: batches differ by about as much


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
    than `LEAST_RISE` more than the best before.  The policy learns in that iteration.

    Attributes:
        iterations: most iterations of the warm-up.
        patience: iterations without a rise that end it; 0: it does not end early.
        alone: whether the run trains the critic alone and ends with the warm-up.
        best: largest explained variance so far, None before the first iteration.
        stale: iterations since then.
        end: first iteration after a warm-up that has ended early, else None.
    """

    iterations: int
    patience: int = 0
    alone: bool = False
    best: float | None = None
    stale: int = 0
    end: int | None = None

    @classmethod
    def of(cls, config: RLConfig) -> CriticWarmup:
        """Return the warm-up at the beginning of a run."""
        alone = config.only == "critic"
        iterations = config.iterations if alone else config.algorithm.critic_warmup_iterations
        return cls(iterations, config.algorithm.critic_warmup_patience, alone)

    @property
    def first_policy_iteration(self) -> int:
        """The first iteration in which the policy learns, or would beside it, as far as it is known."""
        return self.iterations if self.end is None else self.end

    def trains_policy(self, iteration: int) -> bool:
        """Return whether the policy learns in ``iteration``; call `observe` with the iteration first."""
        return not self.alone and iteration >= self.first_policy_iteration

    def observe(self, iteration: int, explained_variance: float) -> None:
        """Count ``iteration`` and end the warm-up where its values have stopped to improve.

        Args:
            iteration: from 0.
            explained_variance: of the values before the update, the same on all ranks.
        """
        if not self.patience or iteration >= self.first_policy_iteration:
            return
        if self.best is None or explained_variance >= self.best + LEAST_RISE:
            self.best = explained_variance
            self.stale = 0
            return
        self.stale += 1
        if self.stale >= self.patience:
            self.end = iteration

    def state(self) -> WarmupState:
        """Return its progress as JSON."""
        state: WarmupState = {"stale": self.stale}
        if self.best is not None:
            state["best"] = self.best
        if self.end is not None:
            state["end"] = self.end
        return state

    def load(self, state: WarmupState) -> None:
        """Go on from the progress that `state` gave."""
        self.best = state.get("best")
        self.stale = state["stale"]
        self.end = state.get("end")


def policy_steps(config: RLConfig, warmup: CriticWarmup) -> int:
    """Return the optimizer steps of the policy in the run: its schedule counts the iterations in which it learns."""
    iterations = max(config.iterations - warmup.first_policy_iteration, 1)
    return iterations * config.algorithm.policy_updates
