"""Environment settings of a rank: one table, applied in one place, and never over what the user has set.

`apply` runs when the package is imported, before torch, NCCL, Triton or vLLM read anything, in a process that
``torchrun`` or ``srun`` has started; any other process is left alone.  docs/slurm.md shows the table.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

Environment = MutableMapping[str, str]

# The step's own numbers before the allocation's: in a shell inside an allocation the step is that shell alone.
_SLURM = {
    "RANK": ("SLURM_PROCID",),
    "WORLD_SIZE": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "LOCAL_RANK": ("SLURM_LOCALID",),
    "LOCAL_WORLD_SIZE": ("SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
}


@dataclass(frozen=True)
class Place:
    """Where a rank stands, and what the user says of the cluster."""

    local_rank: int
    local_size: int
    nodes: int
    cores: int
    environment: Environment

    def given(self, name: str) -> str | None:
        """The user's ``name``, or None where it is not set or empty."""
        return self.environment.get(name) or None


@dataclass(frozen=True)
class Setting:
    """One variable: its value at a `Place` (None: it stays unset), how the documentation puts it, and why."""

    name: str
    shown: str
    why: str
    value: Callable[[Place], str | None]


def _fixed(name: str, value: str, why: str) -> Setting:
    return Setting(name, f"`{value}`", why, lambda place: value)


def _from_user(name: str, source: str, why: str) -> Setting:
    return Setting(name, f"`${source}`, where set", why, lambda place: place.given(source))


def _cache(name: str, folder: str, why: str) -> Setting:
    def value(place: Place) -> str:
        return str(cache_root(place.environment) / f"rank_{place.local_rank}" / folder)

    return Setting(name, f"`$OVR_CACHE/rank_N/{folder}`", why, value)


_CUDNN = Path(sysconfig.get_path("purelib")) / "nvidia" / "cudnn"
_CACHE_WHY = "compiled kernels: on the node's own disk, and no two ranks write the same file"
SETTINGS = (
    _fixed("CUDA_DEVICE_MAX_CONNECTIONS", "1", "tensor and context parallelism overlap traffic in launch order"),
    Setting(
        "PYTORCH_CUDA_ALLOC_CONF",
        "`expandable_segments:True` where `OVR_STAGE=coldstart`",
        "packs of changing shape fragment less; in RL vLLM's own all-reduce cannot share such memory between ranks",
        lambda place: "expandable_segments:True" if place.given("OVR_STAGE") == "coldstart" else None,
    ),
    _from_user("NCCL_SOCKET_IFNAME", "OVR_INTERFACE", "the interface for NCCL's bootstrap, as `ib0` or `=eth0`"),
    Setting(
        "GLOO_SOCKET_IFNAME",
        "`$OVR_INTERFACE` without a leading `=`, where set",
        "the same for traffic between CPUs",
        lambda place: (place.given("OVR_INTERFACE") or "").lstrip("=^") or None,
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
    Setting(
        "CUDNN_PATH",
        "the folder `nvidia/cudnn` of Python's packages, where it is",
        "Transformer Engine loads the cuDNN that torch loads, not one of the system",
        lambda place: str(_CUDNN) if _CUDNN.is_dir() else None,
    ),
    Setting(
        "OMP_NUM_THREADS",
        "cores / ranks of the node, 1 to 8",
        "ranks do not fight for cores; `torchrun` sets 1 by itself",
        lambda place: str(max(1, min(8, place.cores // place.local_size))),
    ),
    _fixed("TOKENIZERS_PARALLELISM", "false", "tokenizer threads do not survive the fork of a data worker"),
    Setting(
        "HF_HUB_OFFLINE",
        "`1` on several nodes",
        "compute nodes seldom reach the hub, and dozens of ranks would ask it the same",
        lambda place: "1" if place.nodes > 1 else None,
    ),
)


def cache_root(environment: Environment) -> Path:
    """``$OVR_CACHE``, else a folder of this user below the temporary one; made, private, if it is not there.

    Raises:
        PermissionError: the folder belongs to somebody else, whose compiled code would run here.
    """
    given = environment.get("OVR_CACHE")
    root = Path(given) if given else Path(tempfile.gettempdir()) / f"ovr_megatron-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user; name a folder of your own with OVR_CACHE")
    return root


def name_rank(environment: Environment) -> None:
    """Give ``torchrun``'s names to what ``srun`` says of this rank; what is set stays."""
    if "SLURM_STEP_ID" not in environment:
        return
    for ours, theirs in _SLURM.items():
        value = next((environment[name] for name in theirs if name in environment), None)
        if value is not None:
            environment.setdefault(ours, _of_this_node(value, int(environment.get("SLURM_NODEID", "0"))))


def _of_this_node(value: str, node: int) -> str:
    """Return the entry of the ``node``-th node in Slurm's list of a number a node: ``8(x2),4`` is 8, 8, 4."""
    counts: list[str] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", value):
        counts += [count] * int(times or 1)
    return counts[min(node, len(counts) - 1)]


def find_place(environment: Environment) -> Place | None:
    """Where this process stands, or None if neither ``torchrun`` nor ``srun`` has started it."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    world = int(environment["WORLD_SIZE"])
    local_size = int(environment.get("LOCAL_WORLD_SIZE", world))
    cores = len(os.sched_getaffinity(0))
    return Place(int(environment.get("LOCAL_RANK", "0")), local_size, -(-world // local_size), cores, environment)


def apply(environment: Environment) -> dict[str, str]:
    """Set each variable of `SETTINGS` that has a value here and is not set; returns those."""
    name_rank(environment)
    place = find_place(environment)
    added: dict[str, str] = {}
    for setting in SETTINGS if place else ():
        assert place is not None
        if setting.name not in environment and (value := setting.value(place)) is not None:
            environment[setting.name] = added[setting.name] = value
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
    libraries = [path for name in ("lib", "lib64") for path in sorted(Path(folder, name).glob("libcudnn*.so.*"))]
    for library in libraries:
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


def table() -> str:
    """`SETTINGS` as a Markdown table."""
    lines = ["| variable | value | why |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{item.name}` | {item.shown} | {item.why} |" for item in SETTINGS)])
