"""One model under Megatron's data parallelism, with its optimizer and schedule.

Shapes: n scored rows of a pack (those with a label).  Losses are sums over rows; the engine divides gradients
and metrics by the count over the whole step and all data-parallel ranks, so a result does not depend on how
the step was cut into packs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ovr_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.packing import IGNORED, Pack, blank_pack
from ovr_megatron.errors import UserError
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.families.adapters import is_adapter
from ovr_megatron.model.adapters import adapters_disabled
from ovr_megatron.model.attention import PackedDotProductAttention
from ovr_megatron.model.heads import init_value_head
from ovr_megatron.model.layers import choose_layer_classes
from ovr_megatron.model.layout import alignment, check_layout
from ovr_megatron.model.scores import Scores
from ovr_megatron.model.transformer_config import DTYPES, language_config
from ovr_megatron.model.vision_language import VisionLanguageModel
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.device import send
from ovr_megatron.runtime.distributed import World
from ovr_megatron.runtime.offload import OffloadedTensors
from ovr_megatron.runtime.schedule import learning_rate
from ovr_megatron.runtime.steps import ComputeTimer
from ovr_megatron.weights.adapters import (
    AdapterConfig,
    adapter_config,
    adapter_rows,
    check_adapter,
    fingerprint,
    initial_adapter,
)
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.live import MOMENTS, OUTPUT_LAYER, Holding, LiveTensors
from ovr_megatron.weights.slices import LocalShard
from ovr_megatron.weights.table import TensorRow, rows
from ovr_megatron.weights.transfer import VALUE_HEAD, check_weights, require_finite

MEMORY_KINDS: tuple[str, ...] = ("base", "weights", "gradients", "optimizer")
"""What an engine offloads, each by itself; ``base``: the frozen weights that a policy and a critic both have."""


@dataclass(frozen=True)
class LossSum:
    """The loss of a pack summed over its rows, the number of rows, and further sums to log."""

    total: Tensor
    count: int
    sums: dict[str, Tensor]


@dataclass
class _StepSums:
    """Row counts and metric sums of a step, collected over its packs.

    Attributes:
        counts: rows of each pack; empty on all pipeline stages but the last, as ``sums``.
        sums: of each pack, its loss among them.
        row_counts: rows of the packs of each `Engine.add_gradients`, as Megatron counted them.
    """

    counts: list[int] = field(default_factory=list)
    sums: list[dict[str, Tensor]] = field(default_factory=list)
    row_counts: list[Tensor] = field(default_factory=list)


class DivergenceError(UserError, ArithmeticError):
    """Too many steps in a row were skipped for their gradients; says what to do."""


Loss = Callable[[Scores, Pack], LossSum]
ForwardStep = Callable[[Iterator[Pack], torch.nn.Module], tuple[Any, Callable[..., Any]]]


def is_frozen(name: str, model: ModelConfig) -> bool:
    """Whether ``model`` freezes the parameter of this (global) Megatron name."""
    if is_adapter(name) or (model.lora.rank and name == VALUE_HEAD):
        return False
    if name.startswith("vision.merger."):
        return not model.trains_merger
    if name.startswith("vision."):
        return not model.trains_vision
    return not model.trains_language


class Engine:
    """A policy or a critic: forward, log-probabilities or values, backward, step, weights out and in.

    Args:
        shape: the model's sizes.
        model: dtype, recomputation, frozen parts.
        parallel: this model's own layout; engines of different layouts live side by side.
        world: the processes.
        critic: a value head in place of the language-model head.
        base: an engine of the same sizes, dtype and layout whose frozen weights are this one's, too: they are in memory
            once, and offloaded for both together. None: this engine has its own.

    Raises:
        ConfigError: the layout does not fit the model or the number of processes.
    """

    def __init__(
        self,
        shape: ModelShape,
        model: ModelConfig,
        parallel: ParallelConfig,
        world: World,
        critic: bool = False,
        base: Engine | None = None,
    ):
        check_layout(shape, parallel, model.fp8 != "none")
        self.shape = shape
        self.world = world
        self.critic = critic
        self.parallel = parallel
        self.fp8 = model.fp8
        self.lora = model.lora
        self.base = base
        self.base_folder: Path | None = None  # that the weights were loaded from
        self.base_fingerprint = ""  # of them, where adapters stand beside them
        self.layout = world.arrange(parallel)
        self.groups = self.layout.groups
        self.step_count = 0
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.compute_timer = ComputeTimer()  # of the last `reduce_gradients`, until the replicas synchronise
        self._step_sums = _StepSums()
        with self.layout.active():
            self.config = language_config(shape, parallel, model)
            layers = "transformer_engine" if model.fp8 != "none" else model.layers
            classes = choose_layer_classes(layers, DTYPES[model.dtype])
            self.has_own_layers = classes.core_attention is PackedDotProductAttention
            model_class = family_of(shape).load_model_class()
            self.parts: list[VisionLanguageModel] = []
            for index in range(parallel.vpp):
                part = model_class(
                    shape, self.config, parallel, self.groups, classes, critic, part=index, lora=model.lora
                )
                self.parts.append(part.to(world.device))
            table = rows(shape, critic) + adapter_rows(shape, model.lora)
            self.live = LiveTensors(table, self.parts, shape, self.groups)
            names = [row.megatron for row in self.live.rows]
            self.trained = {name for name in names if not is_frozen(name, model)}
            # Before the data parallelism, which makes gradient buffers for what trains.
            for holding in self.live.holdings:
                trains = holding.row.megatron in self.trained
                holding.parameter.requires_grad_(trains)
            if base is not None:
                self._take_base(base)
            self.models = self._data_parallel()
        self._offloaded: dict[str, OffloadedTensors] = {
            "base": OffloadedTensors() if base is None else base._offloaded["base"],
            "weights": OffloadedTensors(),
            "gradients": OffloadedTensors(keep=False),
            "optimizer": OffloadedTensors(),
        }

    def _is_base(self, holding: Holding) -> bool:
        """Whether a weight is frozen and one that a policy and a critic both have: of the heads each has its own."""
        name = holding.row.megatron
        is_head = holding.is_copy or name in (OUTPUT_LAYER, VALUE_HEAD)
        return name not in self.trained and not is_head

    def _take_base(self, base: Engine) -> None:
        """Put the storage of ``base``'s frozen weights in the place of this engine's own, which is freed."""
        assert base.layout is self.layout and base.config.params_dtype == self.config.params_dtype
        holdings = [holding for holding in self.live.holdings if self._is_base(holding)]
        base_holdings = [holding for holding in base.live.holdings if base._is_base(holding)]
        for holding, base_holding in zip(holdings, base_holdings, strict=True):
            assert holding.row == base_holding.row
            holding.parameter.data = base_holding.parameter.data
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM takes its memory from the device, not from torch

    def shares_base(self, other: Engine) -> bool:
        """Whether the frozen weights of this engine and of ``other`` are the same memory."""
        return self._offloaded["base"] is other._offloaded["base"]

    def _data_parallel(self) -> list[DistributedDataParallel]:
        parallel = self.parallel
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap,
            overlap_param_gather=self._gathers_in_forward,
            use_distributed_optimizer=parallel.distributed_optimizer,
        )
        models = []
        for index, part in enumerate(self.parts):
            # As in Megatron's own training, only the buffer of a stage's first part is cut into buckets.
            model = DistributedDataParallel(
                self.config,
                config,
                part,
                disable_bucketing=index > 0,
            )
            models.append(model)
        self.config.finalize_model_grads_func = self._finalize_gradients
        if parallel.overlap:
            # The schedule enters these for every micro-batch but the last, whose backward pass reduces gradients.
            contexts = [model.no_sync for model in models]
            self.config.no_sync_func = contexts if len(contexts) > 1 else contexts[0]
        return models

    def _finalize_gradients(self, models: Sequence[torch.nn.Module], row_count: Tensor, **groups: Any) -> None:
        # What follows waits for the slowest replica, which is no computing time of this rank.
        self.compute_timer.stop()
        for earlier_count in self._step_sums.row_counts:
            row_count += earlier_count
        finalize_model_grads(list(models), row_count, **groups)

    def with_optimizer(self, config: OptimizerConfig, total_steps: int) -> Engine:
        """Attach AdamW and its schedule over ``total_steps`` optimizer steps; norms and biases do not decay."""
        self.optimizer_config = config
        self.total_steps = total_steps
        dtype = self.config.params_dtype
        with self.layout.active():
            self.optimizer = get_megatron_optimizer(
                MegatronOptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.beta1,
                    adam_beta2=config.beta2,
                    adam_eps=config.eps,
                    clip_grad=config.clip_grad,
                    bf16=dtype == torch.bfloat16,
                    params_dtype=dtype,
                    use_distributed_optimizer=self.parallel.distributed_optimizer,
                    overlap_param_gather=self._gathers_in_forward,
                ),
                self.models,
                use_gloo_process_groups=False,
            )
        self.live.attach(self.optimizer)
        self.config.grad_scale_func = self.optimizer.scale_loss
        return self

    def sample_from(self, banned: Sequence[int], temperature: float) -> None:
        """Score by the distribution that a rollout samples from: no ``banned`` ids, logits over ``temperature``."""
        for part in self.parts:
            part.sample_from(banned, temperature)

    # Memory ----------------------------------------------------------------------------------------------

    def offload(self, *kinds: str) -> None:
        """Offload some of `MEMORY_KINDS` (all by default) until their next use.

        Gradients are lost: their memory is freed without a copy.
        """
        if self._offloaded["weights"].is_empty:  # a gather in flight would write into memory that is given away
            self._finish_gathers()
        # Read before the weights are offloaded, which frees these addresses.
        weight_storages = {_storage_address(tensor) for tensor in self._weight_tensors()}
        base = [holding.parameter.data for holding in self.live.holdings if self._is_base(holding)]
        weights = [holding.parameter.data for holding in self.live.holdings if not self._is_base(holding)]
        tensors: dict[str, Iterable[Tensor]] = {
            "base": base,
            "weights": weights,
            "gradients": self._gradient_tensors(),
            "optimizer": self._state_tensors(weight_storages),
        }
        if not kinds or "weights" in kinds:
            self._drop_fp8_copies()
        for kind in kinds or tuple(tensors):
            self._offloaded[kind].offload(tensors[kind])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # vLLM takes its memory from the device, not from torch

    def _drop_fp8_copies(self) -> None:
        """Free the FP8 copies of the weights, which Transformer Engine makes anew in the next forward pass."""
        for part in self.parts:
            for module in part.modules():
                getattr(module, "_fp8_workspaces", {}).clear()

    def onload(self, *kinds: str) -> None:
        """Begin to copy these kinds back to the device; a later use waits for the copies."""
        for kind in kinds:
            self._offloaded[kind].onload()

    def _wait_onloaded(self, *kinds: str) -> None:
        for kind in kinds:
            self._offloaded[kind].wait_onloaded()

    @contextmanager
    def _onloaded(self, *kinds: str) -> Iterator[None]:
        """Onload these kinds for the block, then restore where they were."""
        offloaded = [kind for kind in kinds if not self._offloaded[kind].is_empty]
        self._wait_onloaded(*kinds)
        yield
        if offloaded:
            self.offload(*offloaded)

    def _weight_tensors(self) -> Iterator[Tensor]:
        for part in self.parts:
            for parameter in part.parameters():
                yield parameter.data

    def _gradient_tensors(self) -> Iterator[Tensor]:
        for model in self.models:
            for buffer in model.buffers:
                yield buffer.grad_data

    def _state_tensors(self, weight_storages: set[int]) -> Iterator[Tensor]:
        # The weights that the optimizer updates may be views of the model's: those go with the weights.
        for tensor in self.live.state_tensors():
            if _storage_address(tensor) not in weight_storages:
                yield tensor

    # Weights ---------------------------------------------------------------------------------------------

    def load(
        self,
        folder: WeightFolder,
        head_init: str = "orz",
        seed: int = 0,
    ) -> Engine:
        """Copy the weights of a Hugging Face folder in; a critic whose folder has no value head gets a new one.

        Args:
            folder: in either generation of Hugging Face names.
            head_init: how a missing value head is filled, see `init_value_head`.
            seed: of the missing value head, and of new adapters.
        """
        has_head = VALUE_HEAD in folder
        check_weights(folder, self.shape, critic=self.critic and has_head)
        assert self.base is None or self.base.base_folder == folder.directory, "the base is of another folder"
        with self._onloaded("base", "weights", "optimizer"):
            for holding in self.live.holdings:
                watchdog.touch()
                if self.base is not None and self._is_base(holding):
                    continue  # loaded with the engine that it belongs to
                if holding.row.megatron == VALUE_HEAD and not has_head:
                    # One seed on all ranks: the value head is replicated.
                    generator = torch.Generator().manual_seed(seed)
                    init_value_head(holding.parameter, head_init, generator)
                elif is_adapter(holding.row.megatron):
                    self.live.put(holding, initial_adapter(holding.row, seed), holding.parameter)
                else:
                    self._put(holding, folder)
            self._reload_optimizer()
        self.base_folder = folder.directory
        if self.lora.rank:
            self.base_fingerprint = fingerprint(folder)
        return self

    def load_adapter(self, folder: WeightFolder) -> Engine:
        """Copy in an adapter, and the value head of a critic; the weights stay.

        Args:
            folder: of an adapter, as `weights` gave it.

        Raises:
            WeightError: a tensor is missing, unknown or of another size.
        """
        check_adapter(folder, self.saved_rows)
        with self._onloaded("weights", "optimizer"):
            for holding in self.live.holdings:
                if holding.row.megatron in self.trained:
                    watchdog.touch()
                    self._put(holding, folder)
            self._reload_optimizer()
        return self

    def _put(self, holding: Holding, folder: WeightFolder) -> None:
        """Copy the tensors of a row into this rank's parameter.

        Raises:
            WeightError: a value is not finite.
        """
        tensors = [folder.tensor(name) for name in holding.row.hf]
        self.live.put(holding, tensors, holding.parameter)
        title = " and ".join(holding.row.hf)
        require_finite(holding.parameter.detach(), title, folder.directory)

    def _reload_optimizer(self) -> None:
        """Let the optimizer's float32 copies follow weights that were loaded."""
        if hasattr(self, "optimizer"):
            self.optimizer.reload_model_params()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `saved_rows` as full tensors under Hugging Face names.  A collective: all ranks iterate to the end.

        A tensor may be the model's own memory, which an offloaded model frees at the end: copy what is to stay.
        """
        # With adapters what trains is saved alone, and the base stays where it is.
        kinds = ("weights",) if self.lora.rank else ("base", "weights")
        with self._onloaded(*kinds):
            self._finish_gathers()
            yield from self.live.whole(self.saved_rows, "weight", self.config.params_dtype)

    def held(self) -> list[LocalShard]:
        """Return this rank's shards of the weights, not copied, for `RolloutEngine.update`.  A collective."""
        self._wait_onloaded("base", "weights")
        self._finish_gathers()
        return self.live.held(self.trained)

    @property
    def _gathers_in_forward(self) -> bool:
        """Whether a step's new weights are gathered in the next forward pass."""
        return self.parallel.overlap and self.parallel.distributed_optimizer

    def _finish_gathers(self) -> None:
        """Gather the last step's weights on every rank now.

        Left to forward hooks, a rank gathers in the order of the layers that it runs.  Without gradients a rank that
        has no image skips the tower, and the ranks' collectives would no longer match.
        """
        if self._gathers_in_forward:
            with self.layout.active():
                for model in self.models:
                    model.start_param_sync(force_sync=True)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the gradients of `reduce_gradients` as full tensors under Hugging Face names.  A collective."""
        return self.live.whole(self.trained_rows, "gradient", torch.float32)

    def optimizer_state(self, which: str) -> Iterator[tuple[str, Tensor]]:
        """Yield one of `MOMENTS`, or ``master`` (float32 copies of bfloat16 weights), as full tensors.

        Names are those of Hugging Face.  A collective.
        """
        with self._onloaded("weights", "optimizer"):  # the optimizer's own weights may be views of the model's
            yield from self.live.whole(self.trained_rows, which, torch.float32)

    @property
    def state_kinds(self) -> tuple[str, ...]:
        """Return the kinds of `optimizer_state` that there are: none before the first step."""
        if not self.step_count:
            return ()
        # The optimizer updates float32 weights in place: a copy would be the weights again.
        if self.config.params_dtype == torch.float32:
            return MOMENTS
        return (*MOMENTS, "master")

    @property
    def updates_rewrite_vllm(self) -> bool:
        """Whether an update of vLLM sends all weights anyway, or with adapters most of their bytes."""
        if not self.lora.rank:
            return len(self.trained_rows) == len(self.live.rows)
        adapted = 0
        total = 0
        for holding in self.live.holdings:
            if not is_adapter(holding.row.megatron):
                total += holding.parameter.numel()
                adapted += holding.parameter.numel() if holding.adapter else 0
        return 2 * adapted > total

    @property
    def saved_rows(self) -> list[TensorRow]:
        """Return the rows that a checkpoint holds: all, or with adapters those that train, the rest never changes."""
        return self.trained_rows if self.lora.rank else self.live.rows

    @property
    def trained_rows(self) -> list[TensorRow]:
        """Return the rows of the table that this engine trains."""
        return [row for row in self.live.rows if row.megatron in self.trained]

    def load_optimizer_state(self, folders: dict[str, WeightFolder], step: int) -> None:
        """Copy in what `optimizer_state` gave after ``step`` optimizer steps; ``folders`` by kind."""
        self.step_count = step
        with self._onloaded("weights", "optimizer"):
            self.live.start_state(step)
            for holding in self.live.holdings:
                watchdog.touch()
                if holding.row.megatron not in self.trained:
                    continue
                for kind in self.state_kinds:
                    if kind not in folders:  # no master weights in a float32 checkpoint, for example
                        continue
                    tensors = [folders[kind].tensor(name) for name in holding.row.hf]
                    self.live.put_state(holding, kind, tensors)

    def adapter_config(self) -> AdapterConfig | None:
        """Return PEFT's configuration of the adapters; None without them."""
        if not self.lora.rank:
            return None
        assert self.base_folder is not None, "adapters are saved before the weights beside them were loaded"
        return adapter_config(self.shape, self.lora, self.base_folder)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Compute in the block as the model does without its adapters: the reference policy of a run with LoRA."""
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(adapters_disabled(part))
            yield

    # Steps -----------------------------------------------------------------------------------------------

    def scores(self, packs: Sequence[Pack]) -> list[Scores]:
        """Return log-probabilities or values of each pack's scored rows, in order, without gradients, on every rank."""
        outputs = self._without_gradients(packs, logits=False)
        names = ("values",) if self.critic else ("logprobs", "entropy")
        scored = []
        for index, pack in enumerate(packs):
            aligned = self._aligned(pack)
            local_rows = None
            local = None
            if outputs:
                output = outputs[index]
                local_rows = output.rows
                local = torch.stack([getattr(output, name) for name in names])
            columns = self._collect_columns(
                len(aligned.tokens),
                local_rows,
                local,
                len(names),
            )
            # Alignment adds rows without labels, so the labelled rows of both packs correspond, in order.
            aligned_rows = _labelled_rows(aligned)
            scored_columns = columns[:, send(aligned_rows, columns.device)]
            by_name = dict(zip(names, scored_columns, strict=True))
            pack_scores = Scores(_labelled_rows(pack), **by_name)
            scored.append(pack_scores)
        return scored

    def logits(self, pack: Pack) -> Tensor:
        """Return the logits [T, vocabulary] of every row of a pack, on every rank; for verification."""
        outputs = self._without_gradients([pack], logits=True)
        aligned = self._aligned(pack)
        local_rows = None
        local = None
        if outputs:
            local_rows = self.parts[-1]._rows(aligned)
            local = outputs[0].float().t()
        columns = self._collect_columns(
            len(aligned.tokens),
            local_rows,
            local,
            self.shape.vocab,
        )
        # Leave out the rows that alignment added at the end of each document.
        starts = aligned.bounds.tolist()
        lengths = pack.cu_seqlens.diff().tolist()
        documents = []
        for start, length in zip(starts, lengths, strict=False):  # the last start is the end of the pack
            document_rows = torch.arange(start, start + length)
            documents.append(document_rows)
        rows = torch.cat(documents)
        return columns.t()[send(rows, columns.device)]

    @torch.no_grad()
    def _without_gradients(self, packs: Sequence[Pack], logits: bool) -> list[Any]:
        """Return the last stage's outputs for each pack; on other stages the list is empty."""

        def forward_step(iterator: Iterator[Pack], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
            return model(next(iterator), logits=logits), lambda out, non_loss_data: out

        outputs = self._run(packs, forward_step, training=False)
        return outputs[: len(packs)]  # without the packs that fill the pipeline

    def _collect_columns(
        self,
        total_rows: int,
        rows: Tensor | None,
        local: Tensor | None,
        width: int,
    ) -> Tensor:
        """Collect the context-parallel ranks' columns ``local`` [width, n] into [width, total_rows] on every stage.

        Args:
            total_rows: of the aligned pack.
            rows: int64 [n], the rows of ``local``; None on all stages but the last.
            local: None on all stages but the last.
            width: values of a row.
        """
        columns = torch.zeros(width, total_rows, device=self.world.device)
        if local is not None:
            assert rows is not None
            columns[:, send(rows, columns.device)] = local
            if self.groups.cp.size() > 1:  # ranks hold disjoint rows and zeros elsewhere: the sum puts them together
                dist.all_reduce(columns, group=self.groups.cp)
        if self.groups.pp.size() > 1:
            last_stage = self.groups.pp.size() - 1
            dist.broadcast(columns, group=self.groups.pp, group_src=last_stage)
        return columns

    def backward(self, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Compute gradients of the mean of ``loss`` over all rows of the step; return the means of its sums.

        Under context parallelism ``loss`` sees a rank's rows of the pack, under pipeline parallelism only the
        last stage calls it.
        """
        self.clear_gradients()
        return self.reduce_gradients(packs, loss)

    def clear_gradients(self) -> None:
        """Zero the gradients and the sums of the step.

        Then call `add_gradients` any number of times, and `reduce_gradients` once with the last packs.
        """
        self._wait_onloaded("base", "weights", "gradients")
        self.onload("optimizer")
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._step_sums = _StepSums()

    def add_gradients(self, packs: Sequence[Pack], loss: Loss) -> None:
        """Accumulate the gradients of ``packs`` on this rank without reducing them; more packs of the step must follow.

        Data-parallel replicas are not synchronised, and may have different numbers of packs.
        """
        with self._without_reduction():
            self._run(packs, self._forward_step(loss), training=True)

    def reduce_gradients(self, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Accumulate the gradients of the last ``packs`` of the step, and reduce all over the data-parallel replicas.

        They are divided by the rows of the step, and then those of the mean of ``loss`` over these rows.

        Returns:
            The means of the loss and its sums over these rows, and their number as ``count``.
        """
        self.compute_timer.start()
        self._run(packs, self._forward_step(loss), training=True)
        return self._means(self._step_sums.counts, self._step_sums.sums)

    def scale_gradients(self, factor: float) -> None:
        """Multiply the reduced gradients by ``factor``, before `step`."""
        for model in self.models:
            model.scale_gradients(factor)

    def _forward_step(self, loss: Loss) -> ForwardStep:
        """Return Megatron's `forward_step_func`; it adds the rows and sums of each pack to `_step_sums`."""
        step_sums = self._step_sums

        def forward_step(
            iterator: Iterator[Pack], model: torch.nn.Module
        ) -> tuple[Scores, Callable[[Scores], tuple[Any, ...]]]:
            pack = next(iterator)

            def reduce(scores: Scores) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                result = loss(scores, pack)
                step_sums.counts.append(result.count)
                step_sums.sums.append({"loss": result.total.detach(), **result.sums})
                return result.total, torch.tensor(result.count, dtype=torch.int), {}

            return model(pack), reduce

        return forward_step

    @contextmanager
    def _without_reduction(self) -> Iterator[None]:
        """Have Megatron's schedule only accumulate local gradients in the block.

        They are neither reduced over replicas nor divided by the number of rows.
        """
        config = self.config
        no_sync_func = config.no_sync_func
        # Megatron's contexts would have the last pack reduce the gradients, as they end before it.
        config.no_sync_func = nullcontext
        config.finalize_model_grads_func = self._count_rows
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(model.no_sync())
            try:
                yield
            finally:
                config.no_sync_func = no_sync_func
                config.finalize_model_grads_func = self._finalize_gradients

    def _count_rows(self, models: Sequence[torch.nn.Module], row_count: Tensor, **groups: Any) -> None:
        """Record the number of rows of packs that are not reduced yet, in place of `_finalize_gradients`."""
        self._step_sums.row_counts.append(row_count)

    def _run(self, packs: Sequence[Pack], forward_step: ForwardStep, training: bool) -> list[Any]:
        """Run Megatron's schedule over the packs, aligned and, for an interleaved pipeline, filled up."""
        self._wait_onloaded("base", "weights")
        if not training:
            self._finish_gathers()
        for part in self.parts:
            if part.training != training:  # the walk over a model's modules takes as long as a small step
                part.train(training)
        aligned = [self._aligned(pack) for pack in packs]
        if self.parallel.vpp > 1:
            _, pack_rows = alignment(self.parallel, self.fp8)
            missing = -len(aligned) % self.parallel.pp  # interleaving takes a multiple of ``pp`` micro-batches
            blank = blank_pack(aligned[0].extras, pack_rows)
            aligned += [blank] * missing
        iterators = [iter(aligned) for _ in self.parts]

        def watched_step(iterator: Iterator[Pack], model: torch.nn.Module) -> tuple[Any, Callable[..., Any]]:
            watchdog.touch()
            return forward_step(iterator, model)

        with self.layout.active():
            return get_forward_backward_func()(
                forward_step_func=watched_step,
                data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=self.models,
                num_microbatches=len(aligned),
                seq_length=1,  # shapes travel with the tensors
                micro_batch_size=1,
                forward_only=not training,
                collect_non_loss_data=not training,
            )

    def _aligned(self, pack: Pack) -> Pack:
        return pack.aligned(*alignment(self.parallel, self.fp8))

    def _means(self, counts: list[int], sums: list[dict[str, Tensor]]) -> dict[str, float]:
        """Return means over the rows of the step, on every rank; both lists are empty on all stages but the last."""
        means: dict[str, float] = {}
        if self.layout.is_last_stage:
            names = list(sums[0])
            pack_sums = []
            for entry in sums:
                pack_values = [entry[name].double() for name in names]
                pack_sums.append(torch.stack(pack_values))
            totals = torch.stack(pack_sums).sum(0)
            # The count travels with the sums: one collective, and one wait for the device below.
            local_count = torch.tensor([sum(counts)], dtype=totals.dtype)
            totals = torch.cat((totals, send(local_count, totals.device)))
            dist.all_reduce(totals, group=self.groups.dp_cp)
            *values, count = totals.tolist()
            divisor = max(count, 1)
            for name, value in zip(names, values, strict=True):
                means[name] = value / divisor
            means["count"] = count
        if self.groups.pp.size() > 1:
            last_stage = self.groups.pp.size() - 1
            objects = [means]
            dist.broadcast_object_list(objects, group=self.groups.pp, group_src=last_stage)
            (means,) = objects
        return means

    def step(self) -> dict[str, float]:
        """Take an optimizer step on the gradients of `reduce_gradients`; return its rate and the gradient's norm.

        A step with gradients that are not finite, or over ``optimizer.skip_above``, is skipped on every rank.

        Raises:
            DivergenceError: ``optimizer.stop_after_skipped`` steps in a row were skipped.
        """
        rate = learning_rate(self.step_count, self.total_steps, self.optimizer_config)
        self._wait_onloaded("optimizer")
        for group in self.optimizer.param_groups:  # Megatron leaves both to its own scheduler, which is not used
            group["lr"] = rate
            group["weight_decay"] = self.optimizer_config.weight_decay * group["wd_mult"]  # 0 for norms and biases
        with self.layout.active():
            self.optimizer.prepare_grads()
            norm = float(self.optimizer.get_grad_norm())
            if self._skips(norm):
                return {"lr": rate, "grad_norm": norm, "skipped": 1.0}
            succeeded, norm, _ = self.optimizer.step()
        if self._gathers_in_forward:
            # A forward pass between backward and step has marked the buckets as gathered: the new weights are not.
            for model in self.models:
                for bucket in model.bucket_groups:
                    bucket.param_gather_dispatched = False
        assert succeeded, "only a gradient scaler, which there is none of, refuses a step"
        self.step_count += 1
        self.skipped_in_a_row = 0
        return {"lr": rate, "grad_norm": float(norm), "skipped": 0.0}

    def _skips(self, norm: float) -> bool:
        """Whether any rank finds the gradients unfit for a step; a skipped step is counted.

        Raises:
            DivergenceError: too many of them in a row.
        """
        limit = self.optimizer_config.skip_above or math.inf
        is_unfit = not norm <= limit or math.isinf(norm)  # `not <=`: NaN is unfit, too
        # The ranks decide together: a step is a collective, which all of them take or none.
        flag = torch.tensor(int(is_unfit))
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not flag:
            return False
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.optimizer_config.stop_after_skipped:
            raise DivergenceError(
                f"{self.skipped_in_a_row} steps in a row were skipped after optimizer step {self.step_count} (gradient "
                f"norm {norm:g}, optimizer.skip_above={self.optimizer_config.skip_above:g}); look at spikes.jsonl, "
                "then lower optimizer.lr or take the data out, and go on from an earlier checkpoint"
            )
        return True

    def train(self, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Run `backward` and `step`; return the metrics of both."""
        return self.backward(packs, loss) | self.step()


def _storage_address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _labelled_rows(pack: Pack) -> Tensor:
    """Return the rows of a pack that carry a label, int64 [n]."""
    is_labelled = pack.labels != IGNORED
    (rows,) = is_labelled.nonzero(as_tuple=True)
    return rows
