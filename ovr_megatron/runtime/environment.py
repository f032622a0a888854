"""Set the environment variables of a rank: one table, applied in one place, and never over what the user has set.

`apply` runs when the package is imported, before torch, NCCL, Triton or vLLM read anything, in a process that
``torchrun`` or ``srun`` has started; any other process is left alone.  docs/slurm.md shows the table.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

Environment = MutableMapping[str, str]

# Variables of the job step come before those of the allocation: in a shell inside an allocation the step is that
# shell alone.
_SLURM = {
    "RANK": ("SLURM_PROCID",),
    "WORLD_SIZE": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "LOCAL_RANK": ("SLURM_LOCALID",),
    "LOCAL_WORLD_SIZE": ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
}

# Of a core that both need, a process with it gets a tenth of the time of one with 0.
_NICENESS = 10


@dataclass(frozen=True)
class RankContext:
    """The position of a rank, and the user's environment, which describes the cluster."""

    local_rank: int
    local_size: int
    nodes: int
    cores: int
    environment: Environment

    def user_value(self, name: str) -> str | None:
        """Return the user's variable ``name``, or None where it is not set or empty."""
        return self.environment.get(name) or None


@dataclass(frozen=True)
class EnvVariable:
    """One environment variable.

    Attributes:
        name: of the variable.
        description: its value in words, for the documentation.
        why: the reason for the value.
        value: computes the value for a rank; None: the variable stays unset.
    """

    name: str
    description: str
    why: str
    value: Callable[[RankContext], str | None]


def _fixed(name: str, value: str, why: str) -> EnvVariable:
    return EnvVariable(name, f"`{value}`", why, lambda rank: value)


def _from_user(name: str, source: str, why: str) -> EnvVariable:
    return EnvVariable(name, f"`${source}`, where set", why, lambda rank: rank.user_value(source))


def _cache(name: str, folder: str, why: str) -> EnvVariable:
    def value(rank: RankContext) -> str:
        return str(cache_root(rank.environment) / f"rank_{rank.local_rank}" / folder)

    return EnvVariable(name, f"`$OVR_CACHE/rank_N/{folder}`", why, value)


_CUDNN = Path(sysconfig.get_path("purelib")) / "nvidia" / "cudnn"
_CACHE_WHY = "compiled kernels: on the node's own disk, and no two ranks write the same file"
SETTINGS = (
    _fixed("CUDA_DEVICE_MAX_CONNECTIONS", "1", "tensor and context parallelism overlap traffic in launch order"),
    EnvVariable(
        "PYTORCH_CUDA_ALLOC_CONF",
        "`expandable_segments:True` where `OVR_STAGE=coldstart`",
        "packs of changing shape fragment less; in RL vLLM's own all-reduce cannot share such memory between ranks",
        lambda rank: "expandable_segments:True" if rank.user_value("OVR_STAGE") == "coldstart" else None,
    ),
    _from_user("NCCL_SOCKET_IFNAME", "OVR_INTERFACE", "the interface for NCCL's bootstrap, as `ib0` or `=eth0`"),
    EnvVariable(
        "GLOO_SOCKET_IFNAME",
        "`$OVR_INTERFACE` without a leading `=`, where set",
        "the same for traffic between CPUs",
        lambda rank: (rank.user_value("OVR_INTERFACE") or "").lstrip("=^") or None,
    ),
    _from_user("NCCL_IB_HCA", "OVR_HCA", "the InfiniBand adapters, as `mlx5_0,mlx5_1`; unset, NCCL takes all"),
    _fixed("NCCL_IB_TIMEOUT", "22", "17 s until a lost InfiniBand packet is sent again: a switch may restart"),
    _fixed("NCCL_NVLS_ENABLE", "0", "NVLink SHARP takes device memory for every communicator, and there are many"),
    _fixed("NCCL_DEBUG", "WARN", "errors of the network in the rank's log, and no more"),
    _fixed("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a collective that fails or runs out of time ends the process"),
    _fixed("TORCH_FR_BUFFER_SIZE", "2000", "the last collectives of each rank are kept"),
    _fixed("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "and written when one runs out of time"),
    _cache("TRITON_CACHE_DIR", "triton", _CACHE_WHY),
    _cache("TORCHINDUCTOR_CACHE_DIR", "inductor", _CACHE_WHY),
    _cache("VLLM_CACHE_ROOT", "vllm", _CACHE_WHY),
    _cache("FLASHINFER_WORKSPACE_BASE", "flashinfer", _CACHE_WHY),
    EnvVariable(
        "CUDNN_PATH",
        "the folder `nvidia/cudnn` of Python's packages, where it is",
        "Transformer Engine loads the cuDNN that torch loads, not one of the system",
        lambda rank: str(_CUDNN) if _CUDNN.is_dir() else None,
    ),
    EnvVariable(
        "OMP_NUM_THREADS",
        "cores / ranks of the node, 1 to 8",
        "ranks do not fight for cores; `torchrun` sets 1 by itself",
        lambda rank: str(max(1, min(8, rank.cores // rank.local_size))),
    ),
    _fixed("TOKENIZERS_PARALLELISM", "false", "tokenizer threads do not survive the fork of a data worker"),
    EnvVariable(
        "HF_HUB_OFFLINE",
        "`1` on several nodes",
        "compute nodes seldom reach Hugging Face, and dozens of ranks would ask it the same",
        lambda rank: "1" if rank.nodes > 1 else None,
    ),
)


def cache_root(environment: Environment) -> Path:
    """Return ``$OVR_CACHE``, else a folder of this user below the temporary one; it is made, private, if absent.

    Raises:
        PermissionError: the folder belongs to somebody else, whose compiled code would run here.
    """
    user_cache = environment.get("OVR_CACHE")
    root = Path(user_cache) if user_cache else Path(tempfile.gettempdir()) / f"ovr_megatron-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user; name a folder of your own with OVR_CACHE")
    return root


def name_rank(environment: Environment) -> None:
    """Set ``torchrun``'s variables from those of ``srun``; a variable that is set stays."""
    if "SLURM_STEP_ID" not in environment:
        return
    node = int(environment.get("SLURM_NODEID", "0"))
    for name, slurm_names in _SLURM.items():
        value = next((environment[slurm_name] for slurm_name in slurm_names if slurm_name in environment), None)
        if value is not None:
            environment.setdefault(name, _entry_of_node(value, node))


def _entry_of_node(value: str, node: int) -> str:
    """Return the entry of the ``node``-th node in a list of Slurm with one count a node: ``8(x2),4`` is 8, 8, 4."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", value):
        counts += [count] * int(times or 1)
    return counts[min(node, len(counts) - 1)]


def read_rank(environment: Environment) -> RankContext | None:
    """Return the position of this rank, or None if neither ``torchrun`` nor ``srun`` has started this process."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    world_size = int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    local_size = int(environment.get("LOCAL_WORLD_SIZE", world_size))
    nodes = math.ceil(world_size / local_size)
    # Slurm may give the job fewer cores than the node has.
    cores = len(os.sched_getaffinity(0))
    return RankContext(local_rank, local_size, nodes, cores, environment)


def apply(environment: Environment) -> dict[str, str]:
    """Set each variable of `SETTINGS` that has a value for this rank and is not set yet, and return those."""
    name_rank(environment)
    rank = read_rank(environment)
    added: dict[str, str] = {}
    if rank is None:
        return added
    for variable in SETTINGS:
        # The value of a variable that is set is not computed: that of a cache would make its folder.
        if variable.name in environment:
            continue
        value = variable.value(rank)
        if value is not None:
            environment[variable.name] = value
            added[variable.name] = value
    return added


def load_cudnn(environment: Mapping[str, str]) -> list[Path]:
    """Load every cuDNN library below ``$CUDNN_PATH``, where Transformer Engine is installed, and return their paths.

    The compiled part of Transformer Engine's wheel asks for seven of them by name and does not say where they are.  Its
    loader (``transformer_engine/common/__init__.py``, 2.20.2) finds all of them in Python's packages, but with
    CUDNN_PATH set it loads ``libcudnn.so`` alone, and the import ends with "libcudnn_graph.so.9: cannot open shared
    object file".  Libraries that the process has loaded before are taken.

    Raises:
        OSError: a library is there and cannot be loaded.
    """
    folder = environment.get("CUDNN_PATH")
    if not folder or importlib.util.find_spec("transformer_engine") is None:
        return []
    libraries: list[Path] = []
    for name in ("lib", "lib64"):
        libraries += sorted(Path(folder, name).glob("libcudnn*.so.*"))
    for library in libraries:
        # Global, so that the dynamic linker takes these when Transformer Engine's library asks for them by name.
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return libraries


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process of ours that runs this package and imports nothing from the current folder.

    A user's ``random.py`` there would take the place of the library's, in graders and engines alone.  What PYTHONPATH
    names stays, but its empty entries, which mean the current folder, too.
    """
    root = str(Path(__file__).resolve().parents[2])
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**environment, "PYTHONPATH": os.pathsep.join([root, *entries]), "PYTHONSAFEPATH": "1"}


def lower_priority() -> None:
    """Have the kernel prefer the other processes of this node to this one.

    A reply that wakes this process would else interrupt the thread that generates, though another core is idle.
    """
    os.nice(_NICENESS)


def table() -> str:
    """Return `SETTINGS` as a Markdown table."""
    lines = ["| variable | value | why |", "| --- | --- | --- |"]
    for variable in SETTINGS:
        lines.append(f"| `{variable.name}` | {variable.description} | {variable.why} |")
    return "\n".join(lines)
