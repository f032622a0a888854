"""From ``torchrun`` or ``srun`` to a device, process groups and seeds."""

from __future__ import annotations

import datetime
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from ovr_megatron.config import ParallelConfig
from ovr_megatron.runtime import cpu
from ovr_megatron.runtime.layout import Layout


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its device, and the layouts of the models that live here.

    Attributes:
        layout: the layout by which data are dealt out, the policy's.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    seed: int
    layout: Layout
    _layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict)

    def arrange(self, parallel: ParallelConfig) -> Layout:
        """The layout of ``parallel``, made on first use, which is a collective.

        Raises:
            ConfigError: the world size is not a multiple of the layout's ranks.
        """
        parallel.data_parallel(self.size)
        sizes = _sizes(parallel)
        if sizes not in self._layouts:
            self._layouts[sizes] = Layout(parallel, self.seed)
        return self._layouts[sizes]

    @property
    def groups(self) -> ProcessGroupCollection:
        """Process groups of `layout`."""
        return self.layout.groups

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and small files."""
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        """Rank within the data-parallel group."""
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.groups.dp.size()


def _sizes(parallel: ParallelConfig) -> tuple[int, ...]:
    """What process groups depend on."""
    return parallel.tp, parallel.pp, parallel.vpp, parallel.cp


def _environment() -> tuple[int, int, int]:
    """Rank, world size and local rank of what a launcher started (see `environment`), else of one process."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def start(parallel: ParallelConfig, seed: int, threads: int = 0) -> World:
    """Join the process group and lay the ranks out.

    Args:
        parallel: layout of the models.
        seed: run seed; each data-parallel rank derives its own.
        threads: CPU threads of this process, 0 leaves torch's choice.

    Raises:
        ConfigError: the world size is not a multiple of the layout's ranks.
    """
    cpu.let_megatron_run()
    rank, size, local_rank = _environment()
    parallel.data_parallel(size)
    if threads:
        torch.set_num_threads(threads)
    device = join(datetime.timedelta(minutes=30))
    layout = Layout(parallel, seed)
    world = World(rank, size, local_rank, device, seed, layout, {_sizes(parallel): layout})
    seed_everything(seed * 1009 + world.dp_rank)
    return world


def join(timeout: datetime.timedelta) -> torch.device:
    """Join the process group of all ranks, whose collectives fail after ``timeout``; returns this rank's device."""
    rank, size, local_rank = _environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "cuda:nccl,cpu:gloo"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    return device


def default_store(prefix: str) -> dist.Store:
    """Keys and values that all ranks share, below ``prefix``."""
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; the loops themselves draw from generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def keep_generators() -> Iterator[None]:
    """Leave the global generators, thread count and default number format as they were, whatever runs inside."""
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads, dtype, set_threads = torch.get_num_threads(), torch.get_default_dtype(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(state)


def is_main() -> bool:
    """Whether this process is the first of the process group."""
    return dist.get_rank() == 0


def finish() -> None:
    """Wait for the others and leave the process group; where vLLM was started, its own exit hook does the latter."""
    if dist.is_initialized():
        dist.barrier()
        if "vllm" not in sys.modules:
            dist.destroy_process_group()
