"""Layouts: how the ranks are arranged for one model, several of them side by side in the same processes."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from ovr_megatron.config import ParallelConfig

_GLOBALS = [name for name in vars(parallel_state) if re.fullmatch(r"_[A-Z][A-Z_]*", name)]


def _globals() -> dict[str, Any]:
    return {name: getattr(parallel_state, name) for name in _GLOBALS}


class Layout:
    """Process groups, and the global state that Megatron reads, of one arrangement of the ranks.

    Megatron-Core 0.16 still reads `parallel_state` in its schedules, its optimizer and its layers; `active` puts
    this layout's there for as long as an engine works.  Making one is a collective of all ranks, and ``timeout`` bounds
    the collectives of its groups.
    """

    _untouched: dict[str, Any] | None = None

    def __init__(self, parallel: ParallelConfig, seed: int, timeout: datetime.timedelta):
        if Layout._untouched is None:
            Layout._untouched = _globals()
        before, tracked = _globals(), get_cuda_rng_tracker().get_states()
        vars(parallel_state).update(Layout._untouched)
        parallel_state.initialize_model_parallel(
            parallel.tp,
            parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout / datetime.timedelta(minutes=1),  # type: ignore[arg-type]
        )
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        model_parallel_cuda_manual_seed(seed)
        self._state, self._tracked = _globals(), get_cuda_rng_tracker().get_states()
        vars(parallel_state).update(before)
        get_cuda_rng_tracker().set_states(tracked)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the layout that Megatron sees."""
        before, tracked = _globals(), get_cuda_rng_tracker().get_states()
        vars(parallel_state).update(self._state)
        get_cuda_rng_tracker().set_states(self._tracked)
        try:
            yield
        finally:
            self._state, self._tracked = _globals(), get_cuda_rng_tracker().get_states()
            vars(parallel_state).update(before)
            get_cuda_rng_tracker().set_states(tracked)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's pipeline stage is the last."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of those that work on the same data."""
        return not (self.groups.tp.rank() or self.groups.pp.rank() or self.groups.cp.rank())
