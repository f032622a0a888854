"""What is planned: a recipe on so many GPUs of a kind, with the lengths of its samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig
from ovr_megatron.model.qwen25vl import check_layout
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.plan.activations import PackShape
from ovr_megatron.plan.hardware import Gpu
from ovr_megatron.plan.workload import Workload, image_patches, measure, of_tokenised, stated

# Documents of like length make a padded batch where Transformer Engine is not there: at most 1.5 times their rows.
_BATCHED = 1.1
_COLD_START_MEAN = 4  # a sample takes a quarter of a pack where nothing is known
_RL_MEAN = 3


@dataclass(frozen=True)
class Span:
    """Steps or iterations that have samples of the same lengths, and their limit."""

    steps: int
    load: Workload
    limit: int


@dataclass(frozen=True)
class Setting:
    """A recipe, the model's sizes, the GPUs, and the work."""

    config: ColdStartConfig | RLConfig
    shape: ModelShape
    gpu: Gpu
    world: int
    spans: tuple[Span, ...]

    @property
    def of_critic(self) -> Setting:
        """The same with the critic's layout as that of the models."""
        config = self.config
        if isinstance(config, ColdStartConfig) or config.critic.parallel is None:
            return self
        return replace(self, config=replace(config, parallel=config.critic.parallel))

    def check(self) -> None:
        """Refuse what a run would refuse.

        Raises:
            ConfigError: names the setting and the remedy.
        """
        config = self.config
        check_layout(self.shape, config.parallel, config.model.fp8 != "none")
        dp = config.parallel.data_parallel(self.world)
        if isinstance(config, ColdStartConfig):
            if config.packs_per_step % dp:
                raise ConfigError(
                    f"packs_per_step={config.packs_per_step} cannot be shared by {dp} replicas; make it a multiple"
                )
            if config.parallel.vpp > 1 and config.packs_per_step // dp < config.parallel.pp:
                raise ConfigError(
                    f"fewer packs a replica ({config.packs_per_step // dp}) than stages of vpp; use vpp=1"
                )
            return
        critic, algorithm = self.of_critic, config.algorithm
        check_layout(self.shape, critic.config.parallel, config.model.fp8 != "none")
        steps = {algorithm.policy_steps: dp} | ({algorithm.critic_steps: critic.dp} if algorithm.has_critic else {})
        for number, replicas in steps.items():
            if config.prompts < replicas or config.prompts * config.responses < number:
                raise ConfigError(
                    f"prompts={config.prompts} x responses={config.responses} are too few for {replicas} replicas and "
                    f"the {number} steps of an iteration; raise prompts"
                )
        if self.world % config.rollout.tp:
            raise ConfigError(f"rollout.tp={config.rollout.tp} does not divide the {self.world} processes; change one")

    @cached_property
    def dp(self) -> int:
        """Data-parallel replicas."""
        return self.config.parallel.data_parallel(self.world)

    def changed(self, **settings: object) -> Setting:
        """The same work with other settings of the recipe."""
        return replace(self, config=replace(self.config, **settings))  # type: ignore[arg-type]

    def tokens(self, span: Span) -> float:
        """Tokens of all replicas in one step or iteration."""
        if isinstance(self.config, ColdStartConfig):
            return float(self.config.packs_per_step * self.config.data.pack_tokens)
        return self.config.prompts * self.config.responses * span.load.tokens

    def micro_batches(self, span: Span, share: int = 1) -> int:
        """Packs of a replica in a step on one ``share``-th of the iteration's tokens."""
        if isinstance(self.config, ColdStartConfig):
            return max(1, self.config.packs_per_step // self.dp)
        return max(1, -(-int(self.tokens(span)) // (self.config.data.pack_tokens * self.dp * share)))

    def pack(self, span: Span) -> PackShape:
        """A full pack of this span's samples, every token scored."""
        tokens = self.config.data.pack_tokens
        return PackShape(tokens, tokens, round(tokens * span.load.patches / span.load.tokens), _BATCHED)


def _cold_start_span(config: ColdStartConfig, measured: Workload | None) -> Span:
    """All steps of the cold start: those given, or what the epochs take of full packs."""
    data, count = config.data, float(config.data.expected_samples)
    if data.tokenised:
        load, count = of_tokenised(data.tokenised, data.pack_tokens)
    else:
        mean = data.mean_tokens or data.pack_tokens // _COLD_START_MEAN
        load = measured or stated(mean, data.pack_tokens)
    steps = config.steps
    if not steps:
        if not count:
            raise ConfigError("steps=0: give data.tokenised=DIR, data.expected_samples or steps")
        steps = math.ceil(config.epochs * count * load.tokens / (config.packs_per_step * data.pack_tokens))
    return Span(steps, load, data.pack_tokens)


def setting(
    config: ColdStartConfig | RLConfig, shape: ModelShape, gpu: Gpu, world: int, model_dir: str | None
) -> Setting:
    """Know the work: from the sources where there are any and a tokenizer in ``model_dir``, else as stated.

    Raises:
        ConfigError: as `Setting.check`, and of `measure`.
    """
    data = config.data
    prompts = isinstance(config, RLConfig)
    measured = measure(model_dir, data, config.run.seed, prompts) if model_dir and data.sources else None
    if isinstance(config, ColdStartConfig):
        spans = [_cold_start_span(config, measured)]
    else:
        spans, done = [], 0
        for stage in config.curriculum:
            steps = min(stage.until, config.iterations) - done
            if steps > 0:
                patches = measured.patches if measured else image_patches(data, shape)
                mean = stage.mean_tokens or stage.max_tokens // _RL_MEAN
                load = stated(mean, stage.max_tokens, patches)
                told = (
                    f"images measured: {measured.told}" if measured else "an image of a quarter of data.max_pixels each"
                )
                spans.append(Span(steps, replace(load, told=f"{load.told}; {told}"), stage.max_tokens))
                done += steps
    found = Setting(config, shape, gpu, world, tuple(spans))
    found.check()
    return found
