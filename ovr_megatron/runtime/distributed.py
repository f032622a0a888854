"""Join the ranks that ``torchrun`` or ``srun`` has started: device, process groups and seeds."""

from __future__ import annotations

import datetime
import os
import random
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from ovr_megatron.config import ConfigError, ParallelConfig, RunConfig
from ovr_megatron.runtime import cpu, watchdog
from ovr_megatron.runtime.layout import Layout
from ovr_megatron.runtime.split_job import SplitJob
from ovr_megatron.runtime.stop import JoinError

HANG_TIMEOUT_S = 1800.0
JOIN_S = 300.0  # ranks start within minutes of each other, or one of them has failed to start
_RESOLVE_S = 30.0
_NAMED_RANKS = 8  # of those that are missing
# Shares of the limit of a hang.  The wait for absent ranks ends before the watchdog, as its error names them; a
# collective ends after the watchdog, whose message says more.
_JOIN_SHARE = 0.8
_COLLECTIVE_SHARE = 1.1
_NO_LIMIT_S = 14 * 86400.0  # in milliseconds it still fits 32 bits

_patient: list[dist.ProcessGroup] = []  # the group of `patient_group`, once it is made
_split: list[SplitJob] = []  # the job, where its last ranks only generate


@dataclass(frozen=True)
class World:
    """This process: its rank, its device, and the layouts of its models.

    Attributes:
        layout: the policy's layout, over which data are balanced.
        hang_timeout_s: seconds after which a collective of any of its groups fails; 0: never.
        job: all ranks, where the last of them only generate; rank and size are then those within this rank's side.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    seed: int
    layout: Layout
    _layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict)
    hang_timeout_s: float = HANG_TIMEOUT_S
    job: SplitJob | None = None

    def arrange(self, parallel: ParallelConfig) -> Layout:
        """Return the layout of ``parallel``, made on first use, which is a collective.

        Raises:
            ConfigError: the world size is not a multiple of the layout's ranks.
        """
        parallel.data_parallel(self.size)
        sizes = _sizes(parallel)
        if sizes not in self._layouts:
            self._layouts[sizes] = Layout(parallel, self.seed, time_limit(self.hang_timeout_s))
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
    """Return the sizes that process groups depend on."""
    return parallel.tp, parallel.pp, parallel.vpp, parallel.cp


def _environment() -> tuple[int, int, int]:
    """Return rank, world size and local rank from the launcher (see `environment`), else those of a single process."""
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")  # a single process takes any free port
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def start(
    parallel: ParallelConfig,
    seed: int,
    threads: int = 0,
    hang_timeout_s: float = HANG_TIMEOUT_S,
    generators: int = 0,
) -> World:
    """Join the process group and make the layout of the models.

    Args:
        parallel: layout of the models.
        seed: run seed; each data-parallel rank derives its own.
        threads: CPU threads of this process, 0 leaves torch's choice.
        hang_timeout_s: seconds after which a collective fails, of every group and backend; 0: never.
        generators: number of ranks, the last ones, that only generate: ``parallel`` is the layout of the others.

    Raises:
        ConfigError: the number of ranks that train is not a multiple of the layout's ranks.
        JoinError: the ranks did not come together.
    """
    cpu.let_megatron_run()
    _, size, local_rank = _environment()
    _check_sides(parallel, size, generators)
    if threads:
        torch.set_num_threads(threads)
    device = join(hang_timeout_s, generators=generators)
    job = _split[0] if generators else None
    if job and job.generates:
        parallel = ParallelConfig()  # it has no model of Megatron
    layout = Layout(parallel, seed, time_limit(hang_timeout_s))
    world = World(
        dist.get_rank(),
        dist.get_world_size(),
        local_rank,
        device,
        seed,
        layout,
        {_sizes(parallel): layout},
        hang_timeout_s,
        job,
    )
    seed_everything(seed * 1009 + world.dp_rank)
    return world


def _check_sides(parallel: ParallelConfig, size: int, generators: int) -> None:
    """Raise `ConfigError` unless ``parallel`` divides those of ``size`` ranks that do not only generate."""
    if generators >= size:
        raise ConfigError(
            f"rollout.ranks={generators} of {size} processes leaves none to train; start more processes or lower it"
        )
    try:
        parallel.data_parallel(size - generators)
    except ConfigError as error:
        if not generators:
            raise
        raise ConfigError(f"{error} (of {size} processes rollout.ranks={generators} only generate)") from error


@contextmanager
def process_group(run: RunConfig, parallel: ParallelConfig, generators: int = 0) -> Iterator[World]:
    """Join the ranks for the block, watched by a `Watchdog`; leave them where this block has joined them.

    A block within another one shares its process group and its watchdog.  Of the ranks the last ``generators`` only
    generate.

    Raises:
        ConfigError: the world size is not a multiple of the layout's ranks.
        JoinError: the ranks did not come together.
    """
    joins = not dist.is_initialized()
    watch = nullcontext() if watchdog.is_watching() else watchdog.Watchdog(Path(run.dir), run.hang_timeout_s)
    with watch:
        yield start(parallel, run.seed, run.threads, run.hang_timeout_s, generators)
        # Not after an error: other ranks may not come to this barrier.
        if joins:
            finish()


def time_limit(seconds: float) -> datetime.timedelta:
    """Return the time-out of a process group for a hang limit of ``seconds``; for 0 one that no run reaches."""
    return datetime.timedelta(seconds=_COLLECTIVE_SHARE * seconds or _NO_LIMIT_S)


def join(hang_timeout_s: float, join_timeout_s: float = JOIN_S, generators: int = 0) -> torch.device:
    """Join the process group of all ranks, or that of this rank's side, and return this rank's device.

    Args:
        hang_timeout_s: seconds after which a collective fails; 0: never.
        join_timeout_s: seconds that ranks wait for each other here, at most four fifths of ``hang_timeout_s``.
        generators: number of ranks, the last ones, that only generate; each side then has a default group of its own.

    Raises:
        ConfigError: the ranks have joined already, with another number of them that only generate.
        JoinError: the ranks did not come together.
    """
    rank, size, local_rank = _environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "cuda:nccl,cpu:gloo"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if dist.is_initialized():
        joined = _split[0].generators if _split else 0
        if joined != generators:
            raise ConfigError(
                f"rollout.ranks={generators}, and the processes have joined with {joined} that only generate; start "
                "other processes for other sides"
            )
        return device
    limit_s = min(join_timeout_s, _JOIN_SHARE * hang_timeout_s or join_timeout_s)
    deadline = time.monotonic() + limit_s
    store = _open_store(rank, size, deadline)
    # Before the process group, whose own time-out would not say which rank is missing.
    _wait_for_all_ranks(store, rank, size, limit_s, deadline)
    store.set_timeout(time_limit(hang_timeout_s))  # groups that are made later exchange their addresses there
    limit = time_limit(hang_timeout_s)
    job = SplitJob(rank, size, generators, store) if generators else None
    try:
        if job:
            side_store = dist.PrefixStore(job.side, store)
            dist.init_process_group(
                backend, store=side_store, rank=job.side_rank, world_size=job.side_size, timeout=limit
            )
            job.join(backend, limit, time_limit(0))
        else:
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        _split[:] = [job] if job else []
        _patient[:] = [dist.new_group(backend="gloo", timeout=time_limit(0))]
    except RuntimeError as error:  # Gloo raises no narrower type
        raise JoinError(
            f"rank {rank} on {socket.gethostname()} cannot work with the others over {_address()}: "
            f"{_first_line(error)}; name the network interface of the nodes with OVR_INTERFACE"
        ) from error
    return device


def _address() -> str:
    return f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ.get('MASTER_PORT')}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _remaining(deadline: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))


def _open_store(rank: int, size: int, deadline: float) -> dist.Store:
    """Connect to the key-value store of all ranks, which the first rank, or ``torchrun``, serves.

    Raises:
        JoinError: the address cannot be resolved, or nobody answers there.
    """
    host = os.environ["MASTER_ADDR"]
    local_host = socket.gethostname()
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdigit() or int(port) >= 1 << 16:
        raise JoinError(f"MASTER_PORT={port!r} is no port; set it to the same free port on all ranks")
    resolved_by = min(deadline, time.monotonic() + _RESOLVE_S)
    while True:
        try:
            socket.getaddrinfo(host, int(port))
            break
        except OSError as error:
            if time.monotonic() > resolved_by:
                raise JoinError(
                    f"rank {rank} on {local_host} cannot resolve MASTER_ADDR={host} ({error.strerror}); set it to a "
                    "name or an address of the first rank's node that all nodes know"
                ) from error
            time.sleep(1.0)
    served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not served_by_torchrun
    try:
        return dist.TCPStore(
            host,
            int(port),
            world_size=size,
            is_master=serves,
            timeout=_remaining(deadline),
            wait_for_workers=False,  # `_wait_for_all_ranks` knows who is missing
            multi_tenant=not served_by_torchrun,
        )
    except RuntimeError as error:
        failure = "cannot listen at" if serves else "has no answer from the first rank at"
        raise JoinError(
            f"rank {rank} on {local_host} {failure} {_address()} ({_first_line(error)}); see that the first rank "
            "runs on that node, that the port is free there and that the nodes reach each other"
        ) from error


def _wait_for_all_ranks(store: dist.Store, rank: int, size: int, limit_s: float, deadline: float) -> None:
    """Wait until every rank has registered in the store.

    Raises:
        JoinError: names those that are missing.
    """
    registry = dist.PrefixStore("roll", store)
    try:
        registry.set(f"{rank}", socket.gethostname())
        if registry.add("present", 1) == size:
            registry.set("complete", "")
        registry.wait(["complete"], _remaining(deadline))
    except RuntimeError as error:
        try:
            missing = [peer for peer in range(size) if not registry.check([f"{peer}"])]
        except RuntimeError:
            missing = [0]  # it serves the store, and has ended
        if not missing:
            raise
        names = ", ".join(map(str, missing[:_NAMED_RANKS]))
        if len(missing) > _NAMED_RANKS:
            names += ", ..."
        raise JoinError(
            f"rank {names} of {size} did not start within {limit_s:g} s, seen from rank {rank} on "
            f"{socket.gethostname()} at {_address()}; see the log and the node of the missing rank, then start the "
            "same command again"
        ) from error


def patient_group() -> dist.ProcessGroup:
    """Return the CPU group of all ranks without a time-out, see `ovr_megatron.runtime.work_barrier`."""
    return _patient[0] if _patient else dist.group.WORLD


def share_timeout() -> None:
    """Give every process group the time-out of the group of all ranks; vLLM makes its own with torch's default."""
    limit = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    patient = [patient_group(), *(job.messages for job in _split)]
    for group in list(dist.distributed_c10d._world.pg_map):
        if group not in patient:
            dist.distributed_c10d._set_pg_timeout(limit, group)


def default_store(prefix: str) -> dist.Store:
    """Return the key-value store of all ranks of this side, with ``prefix`` before every key."""
    return dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; the loops themselves draw from generators of their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def keep_generators() -> Iterator[None]:
    """Restore the global generators, thread count and default dtype after the block."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.get_rng_state()
    threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    set_num_threads = torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads  # vLLM replaces the function itself
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


def is_main() -> bool:
    """Return whether this process is the first of the process group."""
    return dist.get_rank() == 0


def finish() -> None:
    """Wait for the other ranks and destroy the process group; where vLLM was started, its exit hook does the latter."""
    if dist.is_initialized():
        dist.barrier()
        if "vllm" not in sys.modules:
            dist.destroy_process_group()
