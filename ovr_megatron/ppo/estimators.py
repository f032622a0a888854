"""The estimators of the advantage, one row each: how it is computed and what it needs.

A new estimator is a new row here, or `register_estimator` before the settings are built, or an `Estimator` in a module
of the user's that ``algorithm.estimator=package.module:NAME`` names.  Settings and plan read the rows, so nothing here
imports torch or the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ovr_megatron.ppo.advantages import (
    Ragged,
    discounted_sums,
    generalised_advantages,
    group_advantages,
    leave_one_out_advantages,
    length_adaptive_lambda,
    length_weighted_advantages,
    mean_relative_advantages,
    value_targets,
)
from ovr_megatron.runtime.registry import Registry


@dataclass(frozen=True)
class EstimatorInput:
    """This rank's responses, of which n is the number of tokens; all responses to a prompt are on one rank.

    Attributes:
        rewards: float [n] per response, of each token.
        groups: the index of the prompt of each response.
        values: float [n] per response; None unless the estimator needs them.
        gamma: ``algorithm.gamma``.
        lam: lambda of the advantages, ``algorithm.lam_policy`` or else ``algorithm.lam``.
        lam_critic: lambda of the returns, ``algorithm.lam_critic`` or else ``algorithm.lam``; None: as ``lam``.
        lam_alpha: ``algorithm.lam_alpha``; 0 where the advantages take ``lam``.
    """

    rewards: Ragged
    groups: Sequence[int]
    values: Ragged | None
    gamma: float
    lam: float
    lam_critic: float | None = None
    lam_alpha: float = 0.0


class Estimate(NamedTuple):
    """Advantages, and where there is a critic the returns that it learns: each float64 [n] per response."""

    advantages: Ragged
    returns: Ragged | None = None


@dataclass(frozen=True)
class Estimator:
    """An estimator of the advantage.

    Attributes:
        compute: a pure function that communicates with no other rank.
        needs_values: whether there must be a critic; ``compute`` then returns its targets, too.
        needs_groups: whether it compares the responses to a prompt, of which there must be two or more.
        normalises: whether the advantages are normalised over the batch of all ranks afterwards.
    """

    compute: Callable[[EstimatorInput], Estimate]
    needs_values: bool = False
    needs_groups: bool = False
    normalises: bool = False


def _gae(batch: EstimatorInput) -> Estimate:
    """Estimate advantages and returns with a lambda for each (decoupled GAE of VC-PPO, Yuan et al. 2025)."""
    assert batch.values is not None
    lam: float | np.ndarray = batch.lam
    if batch.lam_alpha:
        lam = length_adaptive_lambda([len(r) for r in batch.rewards], batch.lam_alpha)
    advantages = generalised_advantages(batch.rewards, batch.values, batch.gamma, lam)
    lam_critic = batch.lam if batch.lam_critic is None else batch.lam_critic
    critic_advantages = advantages
    if batch.lam_alpha or lam_critic != batch.lam:
        critic_advantages = generalised_advantages(batch.rewards, batch.values, batch.gamma, lam_critic)
    return Estimate(advantages, value_targets(critic_advantages, batch.values))


def _grpo(batch: EstimatorInput) -> Estimate:
    return Estimate(group_advantages(batch.rewards, batch.groups, divide=True))


def _dr_grpo(batch: EstimatorInput) -> Estimate:
    return Estimate(group_advantages(batch.rewards, batch.groups, divide=False))


def _rloo(batch: EstimatorInput) -> Estimate:
    return Estimate(leave_one_out_advantages(batch.rewards, batch.groups))


def _reinforce_pp(batch: EstimatorInput) -> Estimate:
    return Estimate(discounted_sums(batch.rewards, batch.gamma))


def _opo(batch: EstimatorInput) -> Estimate:
    return Estimate(length_weighted_advantages(batch.rewards, batch.groups))


def _maxrl(batch: EstimatorInput) -> Estimate:
    return Estimate(mean_relative_advantages(batch.rewards, batch.groups))


def _none(batch: EstimatorInput) -> Estimate:
    return Estimate([np.zeros(len(r)) for r in batch.rewards])


# docs/algorithms.md has the equation and the source of each.
ESTIMATORS = Registry[Estimator](
    "algorithm.estimator",
    {
        "gae": Estimator(_gae, needs_values=True, normalises=True),
        "grpo": Estimator(_grpo, needs_groups=True),
        "dr_grpo": Estimator(_dr_grpo, needs_groups=True),
        "rloo": Estimator(_rloo, needs_groups=True),
        "reinforce_pp": Estimator(_reinforce_pp, normalises=True),
        # Hu 2025: the mean of the group, then the deviation of the batch, where GRPO takes that of the group.
        "reinforce_pp_baseline": Estimator(_dr_grpo, needs_groups=True, normalises=True),
        "opo": Estimator(_opo, needs_groups=True),
        "maxrl": Estimator(_maxrl, needs_groups=True),
        "none": Estimator(_none),  # the advantages of `algorithm.teacher` alone
    },
    lambda value: value if isinstance(value, Estimator) else None,
    f"an {Estimator.__module__}.{Estimator.__name__}",
)


def register_estimator(name: str, estimator: Estimator) -> None:
    """Let ``algorithm.estimator`` take ``name``.

    Raises:
        RegistryError: the name is taken.
    """
    ESTIMATORS.register(name, estimator)


def find_estimator(name: str) -> Estimator:
    """Return the estimator that ``algorithm.estimator`` names.

    Raises:
        RegistryError: there is none of this name, or the object of this name is no `Estimator`.
    """
    return ESTIMATORS.look_up(name)
