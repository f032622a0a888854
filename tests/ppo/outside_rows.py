"""An estimator, a loss and a correction as a user writes them: in a module of their own, which settings name."""

from torch import Tensor

from ovr_megatron.config import AlgorithmConfig
from ovr_megatron.ppo.advantages import leave_one_out_advantages
from ovr_megatron.ppo.corrections import Correction, CorrectionInput
from ovr_megatron.ppo.estimators import Estimate, Estimator, EstimatorInput
from ovr_megatron.ppo.losses import ResponseSegments


def blend(batch: EstimatorInput) -> Estimate:
    """The mean of two baselines, the other responses and the critic; the critic learns the sum of the rewards."""
    others = leave_one_out_advantages(batch.rewards, batch.groups)
    advantages, returns = [], []
    for reward, value, other in zip(batch.rewards, batch.values, others, strict=True):
        target = reward.sum() + 0.0 * value
        advantages.append((target - value + other) / 2)
        returns.append(target)
    return Estimate(advantages, returns)


BLEND = Estimator(blend, needs_values=True, needs_groups=True, normalises=True)


def sequence_weighted(
    logprobs: Tensor, old: Tensor, advantages: Tensor, segments: ResponseSegments, settings: AlgorithmConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy gradient, each response weighed by its own ratio, at most 1 + ``clip``."""
    weight = segments.mean(logprobs - old).exp().clamp(max=1 + settings.clip)
    return -weight * advantages * logprobs, {"response_weight": weight.sum()}


def halve(batch: CorrectionInput) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the weight for every iteration that a token is old."""
    return 0.5**batch.staleness, {"halved": (batch.staleness > 0).float().sum()}


HALVED = Correction(halve)
