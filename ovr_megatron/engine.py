"""One model under Megatron's data parallelism, with its optimizer and schedule.

Shapes: n scored rows of a pack (those with a label).  Losses are sums over rows; the engine divides gradients
and metrics by the count over the whole step and all data-parallel ranks, so a result does not depend on how
the step was cut into packs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn import Parameter

from ovr_megatron.config import ConfigError, ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.packing import Pack
from ovr_megatron.model.heads import init_value_head
from ovr_megatron.model.qwen25vl import DTYPES, Qwen25VL, Scores
from ovr_megatron.model.shape import ModelShape
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.table import Row, cut_dim, from_hf, join, rows, split, to_hf
from ovr_megatron.weights.transfer import check_weights

VALUE_HEAD = "value_head.weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LossSum:
    """A pack's loss summed over its rows, the number of rows, and further sums to log."""

    total: Tensor
    count: int
    sums: dict[str, Tensor]


Loss = Callable[[Scores, Pack], LossSum]


def learning_rate(step: int, total: int, config: OptimizerConfig) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then constant, cosine or linear decay."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    left = {"constant": 1.0, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


class Engine:
    """A policy or a critic: forward, log-probabilities or values, backward, step, weights out and in."""

    def __init__(
        self,
        shape: ModelShape,
        model: ModelConfig,
        parallel: ParallelConfig,
        world: World,
        critic: bool = False,
    ):
        if parallel.pp > 1 or parallel.cp > 1 or parallel.distributed_optimizer:
            raise ConfigError(
                f"parallel.pp={parallel.pp}, parallel.cp={parallel.cp}, "
                f"parallel.distributed_optimizer={parallel.distributed_optimizer}: this release trains with tensor, "
                "sequence and data parallelism only; set pp=1, cp=1, distributed_optimizer=false"
            )
        self.shape, self.world, self.critic = shape, world, critic
        self.rows: list[Row] = rows(shape, critic)
        self.module = Qwen25VL(
            shape, parallel, DTYPES[model.dtype], world.groups, critic=critic, recompute=model.recompute
        ).to(world.device)
        self._freeze(model)
        self.parameters: dict[str, Parameter] = dict(self.module.named_parameters())
        for row in self.rows:
            # Megatron marks shards only where it fills them with random numbers; the gradient norm needs the mark.
            self.parameters[row.megatron].tensor_model_parallel = cut_dim(row) is not None  # type: ignore[attr-defined]
        self.model = DistributedDataParallel(
            self.module.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False),
            self.module,
        )
        self.module.config.finalize_model_grads_func = finalize_model_grads
        self.step_count = 0

    def _freeze(self, model: ModelConfig) -> None:
        for name, parameter in self.module.named_parameters():
            merger = name.startswith("vision.merger.")
            vision = name.startswith("vision.") and not merger
            frozen = (
                (merger and model.freeze_merger)
                or (vision and model.freeze_vision)
                or (not merger and not vision and model.freeze_language)
            )
            parameter.requires_grad_(not frozen)

    def with_optimizer(self, config: OptimizerConfig, total_steps: int) -> Engine:
        """Attach AdamW and its schedule over ``total_steps`` optimizer steps."""
        self.optimizer_config, self.total_steps = config, total_steps
        dtype = self.module.config.params_dtype
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
            ),
            [self.model],
        )
        self.module.config.grad_scale_func = self.optimizer.scale_loss
        return self

    # Weights ---------------------------------------------------------------------------------------------

    def load(self, folder: WeightFolder, head_init: str = "orz", seed: int = 0) -> Engine:
        """Copy the weights of a Hugging Face folder in; a critic whose folder has no value head gets a fresh one.

        Args:
            folder: either generation of names.
            head_init: how a missing value head is filled, see `init_value_head`.
            seed: of the missing value head.
        """
        has_head = VALUE_HEAD in folder
        check_weights(folder, self.shape, critic=self.critic and has_head)
        for row in self.rows:
            parameter = self.parameters[row.megatron]
            if row.megatron == VALUE_HEAD and not has_head:
                init_value_head(parameter, head_init, torch.Generator().manual_seed(seed))
                continue
            self._put(row, [folder.tensor(name) for name in row.hf], parameter)
        self._sync_masters()
        return self

    def _put(self, row: Row, tensors: Sequence[Tensor], into: Tensor) -> None:
        tp = self.world.groups.tp
        mine = split(row, from_hf(row, tensors, self.shape), tp.size(), tp.rank(), self.shape)
        with torch.no_grad():
            into.copy_(mine)

    def _sync_masters(self) -> None:
        if hasattr(self, "optimizer"):
            self.optimizer.reload_model_params()

    def full(self, pick: Callable[[Parameter], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """Whatever ``pick`` finds at each parameter (weights, gradients, moments), whole, under the hub's names.

        A collective: every rank iterates to the end.  Parameters for which ``pick`` gives None are left out.
        """
        group = self.world.groups.tp
        for row in self.rows:
            mine = pick(self.parameters[row.megatron])
            if mine is None:
                continue
            shards = [mine.detach()]
            if group.size() > 1:
                shards = [torch.empty_like(mine) for _ in range(group.size())]
                dist.all_gather(shards, mine.detach().contiguous(), group=group)
            yield from zip(row.hf, to_hf(row, join(row, shards, self.shape), self.shape), strict=True)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight, whole, under the hub's names."""
        return self.full(lambda parameter: parameter)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the last `backward`, whole, under the hub's names."""
        return self.full(lambda parameter: getattr(parameter, "main_grad", None))

    # Optimizer state -------------------------------------------------------------------------------------

    def _adam_state(self, parameter: Parameter) -> dict[str, Tensor]:
        key = getattr(parameter, "main_param", None)
        key = parameter if key is None else key
        for chained in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            if key in chained.optimizer.state:
                return chained.optimizer.state[key]
        return {}

    def optimizer_state(self, which: str) -> Iterator[tuple[str, Tensor]]:
        """One of `MOMENTS`, or ``master`` (float32 copies of bfloat16 weights), whole, under the hub's names."""
        if which == "master":
            return self.full(lambda parameter: getattr(parameter, "main_param", None))
        return self.full(lambda parameter: self._adam_state(parameter).get(which))

    def load_optimizer_state(self, folders: dict[str, WeightFolder], step: int) -> None:
        """Inverse of `optimizer_state` for every entry, after ``step`` optimizer steps."""
        self.step_count = step
        for chained in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            adam = chained.optimizer
            for group in adam.param_groups:
                for key in group["params"]:
                    adam.state[key] = {
                        "step": torch.tensor(float(step)),
                        **{which: torch.zeros_like(key) for which in MOMENTS},
                    }
        for row in self.rows:
            parameter = self.parameters[row.megatron]
            if not parameter.requires_grad:
                continue
            targets = {which: self._adam_state(parameter)[which] for which in MOMENTS}
            if "master" in folders:
                targets["master"] = parameter.main_param  # type: ignore[attr-defined]
            for which, target in targets.items():
                self._put(row, [folders[which].tensor(name) for name in row.hf], target)

    # Steps -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, packs: Sequence[Pack]) -> list[Scores]:
        """Log-probabilities or values of each pack's scored rows, without gradients."""
        self.module.eval()
        return [self.module(pack.to(self.world.device)) for pack in packs]

    def backward(self, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """Gradients of the mean of ``loss`` over all rows of the step; returns the means of its sums."""
        sums: list[dict[str, Tensor]] = []

        def forward_step(iterator: Iterator[Pack], model: torch.nn.Module) -> tuple[Scores, Callable[[Scores], tuple]]:
            pack = next(iterator).to(self.world.device)

            def reduce(scores: Scores) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
                result = loss(scores, pack)
                sums.append({"loss": result.total.detach(), **result.sums})
                count = torch.tensor(result.count, dtype=torch.int, device=self.world.device)
                sums[-1]["count"] = count
                return result.total, count.clone(), {}

            return model(pack), reduce

        self.module.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(packs),
            model=self.model,
            num_microbatches=len(packs),
            seq_length=0,
            micro_batch_size=1,
            forward_only=False,
        )
        return self._means(sums)

    def _means(self, sums: list[dict[str, Tensor]]) -> dict[str, float]:
        names = list(sums[0])
        total = torch.stack([torch.stack([entry[name].double() for name in names]) for entry in sums]).sum(0)
        dist.all_reduce(total, group=self.world.groups.dp)
        values = dict(zip(names, total.tolist(), strict=True))
        count = values.pop("count")
        return {name: value / count for name, value in values.items()} | {"count": count}

    def step(self) -> dict[str, float]:
        """One optimizer step on the gradients of the last `backward`; returns its rate and the gradient's norm."""
        rate = learning_rate(self.step_count, self.total_steps, self.optimizer_config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        done, norm, _ = self.optimizer.step()
        if not done:
            raise FloatingPointError(f"optimizer step {self.step_count}: a gradient is not finite")
        self.step_count += 1
        return {"lr": rate, "grad_norm": float(norm)}

    def train(self, packs: Sequence[Pack], loss: Loss) -> dict[str, float]:
        """`backward` and `step`."""
        return self.backward(packs, loss) | self.step()
