"""Settings of reinforcement learning: objective, critic, rewards, and the length curriculum."""

from __future__ import annotations

import math
import re
from dataclasses import field, fields
from typing import Annotated, Literal

from pydantic import Field

from ovr_megatron.config.checks import LARGEST, ZeroMeans, require
from ovr_megatron.config.endpoint import Attempts, Concurrency, EndpointConfig, Timeout, Wait, check_url
from ovr_megatron.config.fields import (
    Count,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveUnitFloat,
    UnitFloat,
    section,
)
from ovr_megatron.config.model import OptimizerConfig, ParallelConfig
from ovr_megatron.config.sampling import ResponseTokens
from ovr_megatron.ppo.estimators import find_estimator

OptionalUnit = Annotated[float | None, Field(ge=0, le=1)]
_WEIGHT_ERROR = 1e-6  # of the sum of weights: thirds are written with some digits


@section("algorithm.")
class AlgorithmConfig:
    """The policy's objective.  The defaults are the paper's PPO (section 3.2); docs/algorithms.md has the rest."""

    estimator: str = "gae"
    """Estimator of the advantage: a row of `ovr_megatron.ppo.estimators`, or package.module:NAME.  All but gae go
    without a critic."""
    # Not 0: only the token that carries the reward would have a return.
    gamma: PositiveUnitFloat = 1.0
    """Discount of later rewards."""
    lam: UnitFloat = 1.0
    """Lambda of generalised advantage estimation: 0 trusts the values, 1 the returns."""
    lam_policy: OptionalUnit = None
    """Lambda of the policy's advantages alone; none: lam."""
    lam_critic: OptionalUnit = None
    """Lambda of the returns that the critic learns alone; none: lam."""
    lam_alpha: Annotated[NonNegativeFloat, ZeroMeans("off")] = 0.0
    """Gives the policy's advantages of each response the lambda 1 - 1 / (lam_alpha x its tokens), at least 0 (VAPO)."""
    loss: str = "clip"
    """Loss of the policy, a row of `ovr_megatron.ppo.losses` or package.module:NAME; checked when a run starts."""
    # Below 1: the ratio is never negative, so that from 1 on it would have no lower bound.
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Largest distance of the policy's ratio from 1 that changes the loss; other losses take it for their own bound,
    see docs/algorithms.md."""
    clip_high: Annotated[NonNegativeFloat, ZeroMeans("as clip")] = 0.0
    """Upper bound of the ratio alone."""
    dual_clip: Annotated[NonNegativeFloat, ZeroMeans("off")] = 0.0
    """Ratio above which the loss of a token with a negative advantage does not grow, with loss=clip and gspo; above
    1."""
    sapo_positive: PositiveFloat = 1.0
    """Temperature of the gate of loss=sapo for tokens with a positive advantage."""
    sapo_negative: PositiveFloat = 1.05
    """Temperature of the gate of loss=sapo for all other tokens."""
    value_clip: Annotated[NonNegativeFloat, ZeroMeans("off")] = 0.0
    """Largest distance of a value from the one before the update that the value loss follows (Open-Reasoner-Zero)."""
    reduction: Literal["token", "sequence", "constant", "pack"] = "token"
    """What weighs the same in the loss: every token, every response (sequence), every token by a constant divisor, or
    every pack."""
    reduction_tokens: Annotated[Count, ZeroMeans("the curriculum's longest limit")] = 0
    """Divisor of the constant reduction in tokens, the same in the entire run."""
    # Below 1, which is the reward of a right response.
    wrong_reward: Annotated[float, Field(lt=1)] = 0.0
    """The estimator's reward of a wrong response; that of a right response is 1, and verdicts in between are mapped
    linearly.  The metrics keep the verdicts of 0 to 1."""
    critic_steps: PositiveInt = 4
    """Optimizer steps of the critic in an iteration."""
    # Neither the paper nor Open-Reasoner-Zero has a warm-up: docs/algorithms.md, "The critic's start".
    critic_warmup_iterations: Count = 0
    """Iterations at the start in which only the critic learns; critic_warmup_patience may end them earlier. Without
    effect with only=critic."""
    critic_warmup_patience: Annotated[Count, ZeroMeans("off")] = 0
    """End the warm-up, or with only=critic the run, after so many iterations in a row whose explained variance is not
    0.01 above the best before."""
    policy_epochs: PositiveInt = 1
    """Times that the policy learns from a batch; with more than one, here or in policy_steps, the log-probabilities
    before the update are stored."""
    policy_steps: PositiveInt = 1
    """Optimizer steps of the policy in an epoch."""
    kl_coefficient: Annotated[NonNegativeFloat, ZeroMeans("off")] = 0.0
    """Weight of the divergence that holds the policy to the weights in reference."""
    kl_form: Literal["k1", "k2", "k3"] = "k3"
    """Estimate of the divergence."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Whether the divergence is added to the loss or taken from the reward."""
    reference: str | None = None
    """Folder of the weights that the divergence is measured from; none: the policy's initial weights."""
    teacher: str | None = None
    """Folder of a larger or trained model of the same tokenizer, from whose log-probabilities of the sampled tokens the
    policy learns (on-policy distillation), alone with estimator=none or beside the rewards."""
    teacher_coefficient: PositiveFloat = 1.0
    """Weight of the teacher's part in the advantage of a token."""
    teacher_parallel: ParallelConfig | None = None
    """The teacher's own layout; none: the policy's."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Weight of the policy's entropy in its objective."""
    positive_nll: Annotated[NonNegativeFloat, ZeroMeans("off")] = 0.0
    """Weight of the mean negative log-likelihood of the tokens of right responses, those with the verdict 1, in the
    policy's loss (VAPO)."""
    correction: str | None = None
    """Weight of a token by the trainer's probability over that of the distribution that drew it, a row of
    `ovr_megatron.ppo.corrections` or package.module:NAME, checked when a run starts; none: every token weighs the
    same."""
    correction_low: Annotated[NonNegativeFloat, ZeroMeans("that of the correction")] = 0.0
    """Lower bound of the correction."""
    correction_high: Annotated[NonNegativeFloat, ZeroMeans("that of the correction")] = 0.0
    """Upper bound of the correction."""
    dynamic_sampling: Annotated[Count, ZeroMeans("off")] = 0
    """Times that prompts are drawn until enough have responses that differ in reward."""
    # Below 1, here and in prompt_exploration: 1 would repeat a prompt without end, and skip nothing.
    prompt_replay: Annotated[float, Field(ge=0, lt=1), ZeroMeans("off")] = 0.0
    """Probability with which a prompt whose responses differ in reward comes again before the next epoch of its source;
    for the r-th repeat its r-th power. Prompts of middling difficulty are then trained on more often than others."""
    prompt_cooldown: PositiveInt = 5
    """Iterations from a prompt to its next repeat by prompt_replay, at least."""
    prompt_exploration: Annotated[float, Field(ge=0, lt=1), ZeroMeans("off")] = 0.0
    """Probability with which a prompt is drawn at its turn in an epoch after responses that were all rewarded alike;
    after z such times in a row its z-th power, at least 0.01. Prompts that are always or never solved are then trained
    on less often than others."""
    overlong_buffer: Annotated[Count, ZeroMeans("off")] = 0
    """Last tokens before the limit, which cost up to 1."""
    length_reward: Literal["none", "cosine"] = "none"
    """Whether the estimator's reward depends on the length of the response by a cosine (Yeo et al. 2025)."""
    cosine_right: float = 2.0
    """Cosine reward of a right response without tokens; these five are the paper's by default."""
    cosine_right_limit: float = 1.0
    """Cosine reward of a right response as long as the limit."""
    cosine_wrong: float = -10.0
    """Cosine reward of a wrong response without tokens."""
    cosine_wrong_limit: float = 0.0
    """Cosine reward of a wrong response as long as the limit."""
    cosine_exceeded: float = -10.0
    """Cosine reward of a response that did not end before the limit."""

    def __post_init__(self) -> None:
        find_estimator(self.estimator)
        require(
            not self.reduction_tokens or self.reduction == "constant",
            f"algorithm.reduction_tokens={self.reduction_tokens} needs algorithm.reduction=constant, which is "
            f"{self.reduction}; change one of them",
        )
        require(
            self.length_reward == "none" or not (self.wrong_reward or self.overlong_buffer),
            f"algorithm.length_reward={self.length_reward} takes the place of algorithm.wrong_reward="
            f"{self.wrong_reward:g} and algorithm.overlong_buffer={self.overlong_buffer}; set both to 0",
        )
        # In the warm-up the critic alone learns: without one nothing would.
        require(
            self.has_critic or not self.critic_warmup_iterations,
            f"algorithm.critic_warmup_iterations={self.critic_warmup_iterations}: {self.estimator} has no critic",
        )
        self._check_lambdas()
        self._check_effects()
        require(
            not self.dual_clip or self.dual_clip > 1,
            f"algorithm.dual_clip={self.dual_clip:g} must be above 1, or 0 (off): below 1 it would bound tokens whose "
            "probability has not changed",
        )
        require(
            self.kl_form != "k1" or self.kl_in == "reward" or not self.kl_coefficient,
            "algorithm.kl_form=k1 in the loss has the gradient of the policy's own log-probability, which is none of "
            "the divergence; use k2 or k3, or algorithm.kl_in=reward",
        )
        self._check_estimator()
        for name, bound in (("low", self.correction_low), ("high", self.correction_high)):
            require(
                not bound or self.correction is not None,
                f"algorithm.correction_{name}={bound:g} needs algorithm.correction, which is null; name one, or leave "
                "the bound out",
            )

    def _check_estimator(self) -> None:
        """Raise `ConfigError` where the estimator cannot take the rewards, or has nothing to learn from."""
        require(
            self.estimator != "none" or self.teacher is not None,
            "algorithm.estimator=none takes nothing from the rewards, and there is no teacher to learn from; give "
            "algorithm.teacher, or another estimator",
        )
        require(
            self.estimator != "none" or not (self.kl_coefficient and self.kl_in == "reward"),
            "algorithm.kl_in=reward takes the divergence from rewards, of which algorithm.estimator=none takes "
            "nothing; set algorithm.kl_in=loss, or another estimator",
        )
        require(
            self.estimator != "none" or not self._shapes_rewards,
            "algorithm.estimator=none takes nothing from the rewards; leave algorithm.wrong_reward, overlong_buffer "
            "and length_reward out, or choose another estimator",
        )
        require(
            self.estimator != "maxrl" or not (self._shapes_rewards or (self.kl_coefficient and self.kl_in == "reward")),
            "algorithm.estimator=maxrl divides by a group's success rate, for which rewards must lie in 0..1; set "
            "algorithm.wrong_reward and algorithm.overlong_buffer to 0, algorithm.length_reward to none and "
            "algorithm.kl_in to loss",
        )
        require(
            self.teacher is not None or self.teacher_parallel is None,
            "algorithm.teacher_parallel is the layout of a teacher, and there is none; give algorithm.teacher, or "
            "leave the layout out",
        )

    def _check_effects(self) -> None:
        """Raise `ConfigError` where a number is changed that nothing reads."""
        # A loss from outside may read the temperatures of the gate.
        gated = self.loss == "sapo" or ":" in self.loss
        readers = {
            "cosine_": (self.length_reward == "cosine", "algorithm.length_reward=cosine"),
            "sapo_": (gated, "algorithm.loss=sapo"),
            "prompt_cooldown": (self.prompt_replay > 0, "algorithm.prompt_replay"),
        }
        for setting in fields(self):
            for prefix, (is_read, reader) in readers.items():
                value = getattr(self, setting.name)
                require(
                    is_read or not setting.name.startswith(prefix) or value == setting.default,
                    f"algorithm.{setting.name}={value} has no effect without {reader}; set that, or leave it out",
                )

    @property
    def _shapes_rewards(self) -> bool:
        """Return whether the estimator gets anything else than verdicts of 0 to 1, a divergence apart."""
        return self.wrong_reward < 0 or self.overlong_buffer > 0 or self.length_reward != "none"

    def _check_lambdas(self) -> None:
        """Raise `ConfigError` where a lambda has no effect."""
        for name in ("lam_policy", "lam_critic", "lam_alpha"):
            value = getattr(self, name)
            is_default = value is None or (name == "lam_alpha" and value == 0)
            require(
                self.has_critic or is_default,
                f"algorithm.{name}={value}: {self.estimator} has no critic, and so no lambda; leave it out",
            )
        require(
            not self.lam_alpha or self.lam_policy is None,
            f"algorithm.lam_alpha={self.lam_alpha:g} takes the place of algorithm.lam_policy={self.lam_policy}; leave "
            "one of them out",
        )

    @property
    def has_critic(self) -> bool:
        """Return whether the estimator needs values."""
        return find_estimator(self.estimator).needs_values

    @property
    def learns_from_rewards(self) -> bool:
        """Return whether anything is taken from the rewards; else chats without answers are prompts."""
        return self.estimator != "none" or self.positive_nll > 0 or self.dynamic_sampling > 0 or self.chooses_prompts

    @property
    def chooses_prompts(self) -> bool:
        """Return whether the rewards of earlier responses decide which prompts are drawn."""
        return self.prompt_replay > 0 or self.prompt_exploration > 0

    @property
    def in_groups(self) -> bool:
        """Return whether the estimator compares the responses to one prompt."""
        return find_estimator(self.estimator).needs_groups

    @property
    def normalises(self) -> bool:
        """Return whether the advantages are normalised over the batch."""
        return find_estimator(self.estimator).normalises

    @property
    def most_steps(self) -> int:
        """Return the largest number of optimizer steps that a batch is cut into."""
        return max(self.policy_steps, self.critic_steps if self.has_critic else 1)

    @property
    def scoring_passes(self) -> int:
        """Return the forward passes over the responses beside the updates.

        One is for the log-probabilities before the update, one for those of the reference.
        """
        has_reference = bool(self.kl_coefficient)
        in_reward = has_reference and self.kl_in == "reward"
        # With a single update the policy is still the one before it: the update's own pass has its log-probabilities.
        passes = 0
        if self.policy_updates > 1 or in_reward:
            passes += 1
        if has_reference:
            passes += 1
        return passes

    @property
    def policy_updates(self) -> int:
        """Return the optimizer steps of the policy in an iteration."""
        return self.policy_epochs * self.policy_steps


@section("critic.")
class CriticConfig:
    """The separate value network: same class, another head, its own optimizer."""

    path: str | None = None
    """Folder of its initial weights, a checkpoint with a critic or a model of any size with the policy's tokenizer;
    none: the weights of the policy."""
    parallel: ParallelConfig | None = None
    """Its own layout; none: the policy's."""
    # The first values of the two others are not small beside rewards of 0 and 1.
    head_init: Literal["orz", "kaiming", "paper"] = "orz"
    """Initial weights of the value head, see docs/algorithms.md."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-6))
    """Its optimizer."""


@section("reward.judges.NAME.")
class RewardJudgeConfig(EndpointConfig):
    """A judge of responses: an OpenAI-compatible endpoint, or a server of vLLM's, and what it is asked."""

    base_url: str | None = None
    """Address of the endpoint, as https://HOST/v1."""
    model: str | None = None
    """Name of its model."""
    max_tokens: ResponseTokens = 512
    """Longest reply of the judge, in tokens."""
    concurrency: Concurrency = 256
    """Requests at the same time, of all engines together."""
    attempts: Attempts = 4
    max_backoff_s: Wait = 10.0
    timeout_s: Timeout = 60.0
    template: str = "facts"
    """What the judge is asked: facts (which of the row's metadata.facts the response states), answer (whether the final
    answer means the row's), or the path of a text file, see docs/own_reward.md."""
    response_characters: PositiveInt = 16384
    """Last characters of a response that it is shown."""
    no_verdict: Annotated[float | None, Field(ge=0, le=1)] = None
    """Reward where it gives no verdict; none: the response has no reward, and its prompt is not learned from."""

    def check(self, name: str) -> None:
        """Refuse settings of the judge called ``name`` that cannot work together.

        Raises:
            ConfigError: it has no address or no model, or its key would be sent unencrypted.
        """
        require(bool(self.base_url and self.model), f"{name} needs base_url=https://HOST/v1 and model=NAME")
        assert self.base_url is not None
        require(
            re.fullmatch(r"[\w.-]+", name.removeprefix("reward.judges.")) is not None,
            f"{name}: the name becomes a file name; use letters, digits, - _ or .",
        )
        check_url(self.base_url, f"{name}.base_url", bool(self.key_env), self.allow_http, f"{name}.allow_http=true")


@section("reward.")
class RewardConfig:
    """Graders of responses."""

    workers: PositiveInt = 2
    """Processes that grade."""
    timeout_s: PositiveFloat = 5.0
    """CPU seconds of one verdict."""
    memory_mib: Annotated[int, Field(ge=256, le=LARGEST)] = 1024
    """Memory of one grader in MiB; SymPy needs 256."""
    cache: Annotated[Count, ZeroMeans("off")] = 65536
    """Verdicts in the cache."""
    rules: dict[str, str | dict[str, float]] = field(default_factory=dict)
    """By source, the rule that makes a response right (`ovr_megatron.rewards.rules.rule`), or several with weights that
    add up to 1, as {math: 0.9, format: 0.1}; auto by default."""

    judges: dict[str, RewardJudgeConfig] = field(default_factory=dict)
    """By name, the models that the rules judge:NAME ask."""

    def __post_init__(self) -> None:
        for name, judge in self.judges.items():
            judge.check(f"reward.judges.{name}")
        for source, rule in self.rules.items():
            if not isinstance(rule, str):
                total = math.fsum(rule.values())
                require(
                    abs(total - 1.0) < _WEIGHT_ERROR and min(rule.values()) > 0.0,
                    f"reward.rules.{source}: the weights {dict(rule)} add up to {total:g}; give positive ones that "
                    "add up to 1",
                )


@section("curriculum[].")
class StageConfig:
    """One stage of the length curriculum."""

    until: PositiveInt
    """Last iteration of the stage."""
    max_tokens: PositiveInt
    """Limit of prompt and response together."""
    mean_tokens: Annotated[Count, ZeroMeans("a third of the limit")] = 0
    """Mean tokens of prompt and response that `ovr plan` expects."""
