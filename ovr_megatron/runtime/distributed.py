"""From ``torchrun`` or ``srun`` to a device, process groups and seeds."""

from __future__ import annotations

import datetime
import os
import random
import socket
import sys
import time
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
from ovr_megatron.runtime.stop import JoinError

HANG_TIMEOUT_S = 1800.0
JOIN_S = 300.0  # ranks begin within minutes of each other, or one has not begun
_RESOLVE_S = 30.0
# Of the limit of a hang.  Where a collective and the watchdog could both end a rank the watchdog does, which says more;
# before it, the wait for ranks that do not come, which says who.
_JOIN_SHARE, _COLLECTIVE_SHARE = 0.8, 1.1
_NO_LIMIT_S = 14 * 86400.0  # in milliseconds it still fits 32 bits

_patient: list[dist.ProcessGroup] = []  # the group of `patient_group`


@dataclass(frozen=True)
class World:
    """This process among all: its rank, its device, and the layouts of the models that live here.

    Attributes:
        layout: the layout by which data are dealt out, the policy's.
        hang_timeout_s: seconds after which a collective of any of its groups fails; 0: never.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    seed: int
    layout: Layout
    _layouts: dict[tuple[int, ...], Layout] = field(default_factory=dict)
    hang_timeout_s: float = HANG_TIMEOUT_S

    def arrange(self, parallel: ParallelConfig) -> Layout:
        """The layout of ``parallel``, made on first use, which is a collective.

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


def start(parallel: ParallelConfig, seed: int, threads: int = 0, hang_timeout_s: float = HANG_TIMEOUT_S) -> World:
    """Join the process group and lay the ranks out.

    Args:
        parallel: layout of the models.
        seed: run seed; each data-parallel rank derives its own.
        threads: CPU threads of this process, 0 leaves torch's choice.
        hang_timeout_s: seconds after which a collective fails, of every group and backend; 0: never.

    Raises:
        ConfigError: the world size is not a multiple of the layout's ranks.
        JoinError: the ranks did not come together.
    """
    cpu.let_megatron_run()
    rank, size, local_rank = _environment()
    parallel.data_parallel(size)
    if threads:
        torch.set_num_threads(threads)
    device = join(hang_timeout_s)
    layout = Layout(parallel, seed, time_limit(hang_timeout_s))
    world = World(rank, size, local_rank, device, seed, layout, {_sizes(parallel): layout}, hang_timeout_s)
    seed_everything(seed * 1009 + world.dp_rank)
    return world


def time_limit(seconds: float) -> datetime.timedelta:
    """Return the time-out of a process group where a hang is bounded by ``seconds``; 0: one that no run reaches."""
    return datetime.timedelta(seconds=_COLLECTIVE_SHARE * seconds or _NO_LIMIT_S)


def join(hang_timeout_s: float, join_timeout_s: float = JOIN_S) -> torch.device:
    """Join the process group of all ranks; returns this rank's device.

    Args:
        hang_timeout_s: seconds after which a collective fails; 0: never.
        join_timeout_s: seconds that ranks wait for each other here, at most four fifths of ``hang_timeout_s``.

    Raises:
        JoinError: the ranks did not come together.
    """
    rank, size, local_rank = _environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "cuda:nccl,cpu:gloo"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if dist.is_initialized():
        return device
    limit_s = min(join_timeout_s, _JOIN_SHARE * hang_timeout_s or join_timeout_s)
    deadline = time.monotonic() + limit_s
    store = _open_store(rank, size, deadline)
    _call_the_roll(store, rank, size, limit_s, deadline)
    store.set_timeout(time_limit(hang_timeout_s))  # what groups exchange there when they are made
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=time_limit(hang_timeout_s))
        _patient[:] = [dist.new_group(backend="gloo", timeout=time_limit(0))]
    except RuntimeError as error:  # gloo's are of no narrower type
        raise JoinError(
            f"rank {rank} on {socket.gethostname()} cannot work with the others over {_address()}: "
            f"{_first_line(error)}; name the network interface of the nodes with OVR_INTERFACE"
        ) from error
    return device


def _address() -> str:
    return f"MASTER_ADDR={os.environ['MASTER_ADDR']}, MASTER_PORT={os.environ.get('MASTER_PORT')}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _left(deadline: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(1.0, deadline - time.monotonic()))


def _open_store(rank: int, size: int, deadline: float) -> dist.Store:
    """The keys and values of all ranks, which the first rank, or ``torchrun``, keeps.

    Raises:
        JoinError: the address cannot be resolved, or nobody answers there.
    """
    host, here = os.environ["MASTER_ADDR"], socket.gethostname()
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
                    f"rank {rank} on {here} cannot resolve MASTER_ADDR={host} ({error.strerror}); set it to a name or "
                    "an address of the first rank's node that all nodes know"
                ) from error
            time.sleep(1.0)
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            host,
            int(port),
            world_size=size,
            is_master=rank == 0 and not agents,
            timeout=_left(deadline),
            wait_for_workers=False,  # `_call_the_roll` knows who is missing
            multi_tenant=not agents,
        )
    except RuntimeError as error:
        what = "cannot listen at" if rank == 0 and not agents else "has no answer from the first rank at"
        raise JoinError(
            f"rank {rank} on {here} {what} {_address()} ({_first_line(error)}); see that the first rank runs on that "
            "node, that the port is free there and that the nodes reach each other"
        ) from error


def _call_the_roll(store: dist.Store, rank: int, size: int, limit_s: float, deadline: float) -> None:
    """Wait until every rank is there.

    Raises:
        JoinError: names those that are missing.
    """
    roll = dist.PrefixStore("roll", store)
    try:
        roll.set(f"{rank}", socket.gethostname())
        if roll.add("present", 1) == size:
            roll.set("complete", "")
        roll.wait(["complete"], _left(deadline))
    except RuntimeError as error:
        try:
            missing = [other for other in range(size) if not roll.check([f"{other}"])]
        except RuntimeError:
            missing = [0]  # it keeps the store, and has left
        if not missing:
            raise
        names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise JoinError(
            f"rank {names} of {size} did not start within {limit_s:g} s, seen from rank {rank} on "
            f"{socket.gethostname()} at {_address()}; see the log and the node of the missing rank, then start the "
            "same command again"
        ) from error


def patient_group() -> dist.ProcessGroup:
    """All ranks on the CPU, without a time-out: see `ovr_megatron.runtime.work_barrier`."""
    return _patient[0] if _patient else dist.group.WORLD


def share_timeout() -> None:
    """Give every process group the time-out of the one of all ranks; vLLM makes groups with torch's own."""
    limit = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not patient_group():
            dist.distributed_c10d._set_pg_timeout(limit, group)


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
