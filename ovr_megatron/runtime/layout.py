"""Arrange the ranks for a model. Several layouts exist side by side in the same processes."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from ovr_megatron.config import ParallelConfig

_GLOBALS = [name for name in vars(parallel_state) if re.fullmatch(r"_[A-Z][A-Z_]*", name)]


def _globals() -> Mapping[str, object]:
    return {name: getattr(parallel_state, name) for name in _GLOBALS}


@dataclass(frozen=True)
class _MegatronState:
    """The global state of Megatron: variables of `parallel_state` and states of its tracked generators."""

    variables: Mapping[str, object]
    generators: Mapping[str, object]

    @classmethod
    def capture(cls) -> _MegatronState:
        return cls(_globals(), get_cuda_rng_tracker().get_states())

    def install(self) -> None:
        vars(parallel_state).update(self.variables)
        get_cuda_rng_tracker().set_states(self.generators)


class Layout:
    """Process groups, and the global state that Megatron reads, of one arrangement of the ranks.

    Megatron-Core 0.16 still reads the module `parallel_state` in its schedules, its optimizer and its layers; `active`
    puts this layout's state there while an engine works.  The constructor is a collective of all ranks, and
    ``timeout`` bounds the collectives of the groups.
    """

    _initial: Mapping[str, object] | None = None

    def __init__(self, parallel: ParallelConfig, seed: int, timeout: datetime.timedelta):
        if Layout._initial is None:
            Layout._initial = _globals()
        previous = _MegatronState.capture()
        # Megatron refuses to initialise twice, so it finds the state of a fresh process.
        vars(parallel_state).update(Layout._initial)
        parallel_state.initialize_model_parallel(
            parallel.tp,
            parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout / datetime.timedelta(minutes=1),
        )
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        model_parallel_cuda_manual_seed(seed)
        self._state = _MegatronState.capture()
        previous.install()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the layout that Megatron sees."""
        previous = _MegatronState.capture()
        self._state.install()
        try:
            yield
        finally:
            # Captured anew, as the generators have advanced.
            self._state = _MegatronState.capture()
            previous.install()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's pipeline stage is the last."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    @property
    def leads_replica(self) -> bool:
        """Whether this rank is the first of those that work on the same data."""
        return not (self.groups.tp.rank() or self.groups.pp.rank() or self.groups.cp.rank())
