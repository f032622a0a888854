"""The work of a row under ``data.balance``: the FLOP of its forward and backward pass, those of its images included."""

from __future__ import annotations

from ovr_megatron.config import ColdStartConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Row
from ovr_megatron.data.work import RowWork, attention_work
from ovr_megatron.model.flops import training_flops


def row_work(config: ColdStartConfig, processor: Processor) -> RowWork:
    """Return the work of a row that ``data.balance`` asks for."""
    if config.data.balance == "attention":
        return attention_work
    model = config.model

    def flops(row: Row, length: int) -> float:
        return training_flops(
            processor.shape,
            [length],
            processor.grids(row),
            model.trains_language,
            model.trains_vision,
            model.trains_merger,
            model.adapts_vision,
        )

    return flops
