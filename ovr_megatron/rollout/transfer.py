"""Live weights into vLLM without a copy in between: a backend for vLLM's weight-transfer API.

The trainer and the engine share a process, so an update carries the tensors themselves.  vLLM shards and
repacks them as it does when it loads a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

BACKEND = "same-process"


class TransferError(ValueError):
    """An update that does not hold every weight of the model; names the missing ones."""


@dataclass
class SameProcessInit(WeightTransferInitInfo):
    """Nothing to agree on."""


@dataclass
class SameProcessUpdate(WeightTransferUpdateInfo):
    """All weights of the model, (hub name, full tensor).

    vLLM keeps references until the last tensor of a layer has come: a yielded tensor must not be overwritten
    before the update has finished.
    """

    weights: Iterable[tuple[str, Tensor]] = ()


class SameProcessTransfer(WeightTransferEngine[SameProcessInit, SameProcessUpdate]):
    """Loads weights from an iterable of this process; one update is the whole model."""

    init_info_cls = SameProcessInit
    update_info_cls = SameProcessUpdate

    def init_transfer_engine(self, init_info: SameProcessInit) -> None:
        """Remember which parameters an update must fill."""
        self.expected = {name for name, _ in self.model.named_parameters()}

    def start_weight_update(self) -> None:
        """Give the layers back the shapes that checkpoints have."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SameProcessUpdate, load_weights: Callable[..., Any] | None = None) -> None:
        """Load every weight (vLLM 0.23 hands over the model's loader as ``load_weights``).

        Raises:
            TransferError: parameters are left without a new value.
        """
        load = load_weights or self.model.load_weights
        loaded = load((name, tensor.detach()) for name, tensor in update_info.weights)
        if missing := sorted(self.expected - loaded):
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise TransferError(f"an update leaves {len(missing)} of vLLM's parameters as they are ({shown}); send all")

    def finish_weight_update(self) -> None:
        """Repack what kernels want packed, the tied output layer included."""
        finalize_layerwise_reload(self.model, self.model_config)
        if current_platform.is_cpu():
            repack_output_layers(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Abstract in vLLM 0.23; there is nobody to send to."""
        raise NotImplementedError("the trainer hands its weights over in the same process")


@torch.no_grad()
def repack_output_layers(model: nn.Module) -> None:
    """Pack the output layer again from its weight.

    On a CPU the layer multiplies with a packed copy.  A layer that is tied to the embedding is not reloaded on
    its own, and without this its copy would stay that of the old weights.
    """
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and module.weight.numel():
            module.quant_method.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine(BACKEND, SameProcessTransfer)
