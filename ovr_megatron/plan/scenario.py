"""The scenario that is planned: a recipe on so many GPUs of a kind, with the lengths of its samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ovr_megatron.config import ColdStartConfig, ConfigError, ModelConfig, RLConfig
from ovr_megatron.data.repetition import epoch_data
from ovr_megatron.families import ModelShape
from ovr_megatron.model.layout import check_layout
from ovr_megatron.plan.activations import PackShape
from ovr_megatron.plan.hardware import Gpu
from ovr_megatron.plan.workload import Workload, assume_workload, image_patches, measure, read_tokenised_workload

# Documents of like length make a padded batch where Transformer Engine is not there: at most 1.5 times their rows.
_BATCHED = 1.1
_SFT_MEAN = 4  # a sample takes a quarter of a pack where no length is measured or stated
_RL_MEAN = 3


@dataclass(frozen=True)
class Span:
    """Steps or iterations that have samples of the same lengths, and their limit."""

    steps: int
    load: Workload
    limit: int


@dataclass(frozen=True)
class Scenario:
    """A recipe, the model's sizes, the GPUs, and the work.

    ``critic_shape`` are the sizes of a critic of another size than the policy, ``teacher_shape`` those of a teacher.
    ``trains`` says whether the model of ``shape`` learns.
    """

    config: ColdStartConfig | RLConfig
    shape: ModelShape
    gpu: Gpu
    world: int
    spans: tuple[Span, ...]
    critic_shape: ModelShape | None = None
    teacher_shape: ModelShape | None = None
    trains: bool = True

    @property
    def model(self) -> ModelConfig:
        """Return the settings of the model, frozen where it does not learn."""
        return self.config.model if self.trains else self.config.model.frozen()

    @property
    def critic_scenario(self) -> Scenario:
        """Return the same scenario with the critic's layout and sizes in the place of the policy's."""
        config = self.config
        if isinstance(config, ColdStartConfig):
            return self
        parallel = config.critic.parallel or config.parallel
        config = replace(config, parallel=parallel)
        return replace(self, shape=self.critic_shape or self.shape, config=config, trains=True)

    @property
    def teacher_scenario(self) -> Scenario | None:
        """Return the same scenario with sizes and layout of the teacher; None without one."""
        config = self.config
        if isinstance(config, ColdStartConfig) or self.teacher_shape is None:
            return None
        parallel = config.algorithm.teacher_parallel or config.parallel
        config = replace(config, parallel=parallel)
        return replace(self, shape=self.teacher_shape, config=config, teacher_shape=None, trains=False)

    def check(self) -> None:
        """Refuse what a run would refuse.

        Raises:
            ConfigError: names the setting and the remedy.
        """
        config = self.config
        uses_fp8 = config.model.fp8 != "none"
        check_layout(self.shape, config.parallel, uses_fp8)
        if self.trainers < 1:
            raise ConfigError(f"rollout.ranks={config.rollout.ranks} of {self.world} processes leaves none to train")
        dp = config.parallel.data_parallel(self.trainers)
        if isinstance(config, ColdStartConfig):
            _check_packs(config, dp)
            return
        algorithm = config.algorithm
        critic = self.critic_scenario
        check_layout(critic.shape, critic.config.parallel, uses_fp8)
        teacher = self.teacher_scenario
        if teacher:
            check_layout(teacher.shape, teacher.config.parallel, uses_fp8)
            teacher.config.parallel.data_parallel(self.trainers)
        replicas_by_steps = {algorithm.policy_steps: dp}
        if algorithm.has_critic:
            replicas_by_steps[algorithm.critic_steps] = critic.dp
        prompts = config.prompts
        responses = config.responses
        for steps, replicas in replicas_by_steps.items():
            # Prompts are shared by the replicas, and responses by the steps.
            if prompts < replicas or prompts * responses < steps:
                raise ConfigError(
                    f"prompts={prompts} x responses={responses} are too few for {replicas} replicas and "
                    f"the {steps} steps of an iteration; raise prompts"
                )
        if not config.generates:
            return
        rollout_tp = config.rollout.tp
        if self.engine_ranks % rollout_tp:
            raise ConfigError(f"rollout.tp={rollout_tp} does not divide the {self.engine_ranks} processes; change one")
        # vLLM cuts the heads of the queries evenly; those of keys and values it may repeat.
        if self.shape.heads % rollout_tp:
            raise ConfigError(
                f"rollout.tp={rollout_tp} does not divide the model's {self.shape.heads} heads; lower rollout.tp"
            )

    @cached_property
    def dp(self) -> int:
        """Return the number of data-parallel replicas."""
        return self.config.parallel.data_parallel(self.trainers)

    @property
    def trainers(self) -> int:
        """Return the number of ranks that train."""
        return self.world - self.config.rollout.ranks

    @property
    def engine_ranks(self) -> int:
        """Return the number of ranks that hold engines: all, or those that only generate."""
        return self.config.rollout.ranks or self.world

    def with_settings(self, **settings: object) -> Scenario:
        """Return the same work with other settings of the recipe."""
        return replace(self, config=replace(self.config, **settings))  # type: ignore[arg-type]

    def tokens(self, span: Span) -> float:
        """Return the tokens of all replicas in one step or iteration."""
        config = self.config
        if isinstance(config, ColdStartConfig):
            return float(config.packs_per_step * config.data.pack_tokens)
        return config.prompts * config.responses * span.load.tokens

    def micro_batches(self, span: Span, share: int = 1) -> int:
        """Return the packs of a replica in a step on one ``share``-th of the iteration's tokens."""
        config = self.config
        if isinstance(config, ColdStartConfig):
            packs = config.packs_per_step // self.dp
        else:
            # A replica of a step gets its part of the `share`-th part of all tokens.
            tokens_per_round = config.data.pack_tokens * self.dp * share
            tokens = int(self.tokens(span))
            packs = -(-tokens // tokens_per_round)
        return max(1, packs)

    def pack(self, span: Span) -> PackShape:
        """Return a full pack of this span's samples, every token scored."""
        tokens = self.config.data.pack_tokens
        load = span.load
        patches = round(tokens * load.patches / load.tokens)
        return PackShape(tokens, tokens, patches, _BATCHED)


def _check_packs(config: ColdStartConfig, dp: int) -> None:
    parallel = config.parallel
    packs_per_step = config.packs_per_step
    if packs_per_step % dp:
        raise ConfigError(f"packs_per_step={packs_per_step} cannot be shared by {dp} replicas; make it a multiple")
    replica_packs = packs_per_step // dp
    # Megatron's interleaved schedule takes micro-batches in groups of as many as there are stages.
    if parallel.vpp > 1 and replica_packs < parallel.pp:
        raise ConfigError(f"fewer packs a replica ({replica_packs}) than stages of vpp; use vpp=1")


def build_scenario(
    config: ColdStartConfig | RLConfig,
    shape: ModelShape,
    gpu: Gpu,
    world: int,
    model_dir: str | None,
    critic_shape: ModelShape | None = None,
    teacher_shape: ModelShape | None = None,
) -> Scenario:
    """Build the scenario; lengths are measured where there are sources and a tokenizer in ``model_dir``, else assumed.

    Raises:
        ConfigError: as `Scenario.check`, and of `measure`.
    """
    data = config.data
    if isinstance(config, ColdStartConfig) and not config.steps:
        data = epoch_data(data, config.validation)
        config = replace(config, data=data)
    measured = None
    if model_dir and data.sources:
        generation = isinstance(config, RLConfig)
        measured = measure(model_dir, data, config.run.seed, generation)
    if isinstance(config, ColdStartConfig):
        spans = [_sft_span(config, measured)]
    else:
        spans = _rl_spans(config, shape, measured)
    trains = isinstance(config, ColdStartConfig) or config.trains_policy
    scenario = Scenario(config, shape, gpu, world, tuple(spans), critic_shape, teacher_shape, trains)
    scenario.check()
    return scenario


def _sft_span(config: ColdStartConfig, measured: Workload | None) -> Span:
    """Return the steps of supervised training and the lengths of its samples.

    ``config.steps`` counts where it is set; 0 derives the steps from epochs and samples, as if every pack were full.  A
    tokenised set comes before ``measured`` lengths, and the sources, whose weights are then those of `epoch_data`,
    before ``data.expected_samples``.
    """
    data = config.data
    samples = float(data.expected_samples)
    if data.tokenised:
        load, samples = read_tokenised_workload(data.tokenised, data.pack_tokens)
    else:
        mean_tokens = data.mean_tokens or data.pack_tokens // _SFT_MEAN
        load = measured or assume_workload(mean_tokens, data.pack_tokens)
    steps = config.steps
    if not steps:
        if data.sources:
            samples = sum(source.weight for source in data.sources)
        if not samples:
            raise ConfigError("steps=0: give data.sources, data.tokenised=DIR, data.expected_samples or steps")
        total_tokens = config.epochs * samples * load.tokens
        step_tokens = config.packs_per_step * data.pack_tokens
        steps = math.ceil(total_tokens / step_tokens)
    return Span(steps, load, data.pack_tokens)


def _rl_spans(config: RLConfig, shape: ModelShape, measured: Workload | None) -> list[Span]:
    """Return a span for each stage of the curriculum that begins before the last iteration.

    Of ``measured`` only the images count: it measures prompts, and the responses do not exist yet.
    """
    if measured:
        patches = measured.patches
        images = f"images measured: {measured.basis}"
    else:
        patches = image_patches(config.data, shape)
        images = "an image of a quarter of data.max_pixels each"
    spans: list[Span] = []
    first_iteration = 0
    for stage in config.curriculum:
        steps = min(stage.until, config.iterations) - first_iteration
        # A stage that begins after the last iteration is never reached.
        if steps <= 0:
            continue
        limit = stage.max_tokens
        mean_tokens = stage.mean_tokens or limit // _RL_MEAN
        load = assume_workload(mean_tokens, limit, patches)
        basis = f"{load.basis}; {images}"
        spans.append(Span(steps, replace(load, basis=basis), limit))
        first_iteration += steps
    return spans
