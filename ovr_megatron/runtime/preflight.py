"""What is looked at on every rank before a run starts: each check returns its problems, one sentence each.

Some checks are collectives: every rank of the process group calls them, in the same order.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist

_PACKAGE = Path(__file__).resolve().parents[1]
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Facts:
    """What must be equal on all nodes.

    Attributes:
        host: name of the node.
        packages: every installed distribution with its version.
        code: digest of the package's own files; ``commit`` is git's name of it, where git is.
        files: size in bytes of each input file, the number of entries of a folder.
    """

    host: str
    packages: dict[str, str]
    code: str
    commit: str
    files: dict[str, int]


def host_name() -> str:
    """Slurm's name of this node, else the system's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gather_facts(inputs: Iterable[Path]) -> Facts:
    """The `Facts` of this rank; ``inputs`` that are absent are left out of them."""
    packages = {item.metadata["Name"]: item.version for item in metadata.distributions()}
    packages["CUDA"] = torch.version.cuda or "none"
    sizes = {str(path): size_of(path) for path in inputs}
    files = {name: size for name, size in sizes.items() if size is not None}
    return Facts(host_name(), packages, code_digest(), commit(), files)


def size_of(path: Path) -> int | None:
    """Bytes of a file, entries of a folder, None where neither can be seen from here."""
    try:
        return sum(1 for _ in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return None  # `check_readable` says why


def code_digest() -> str:
    """SHA-256 over names and contents of the package's files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".yaml", ".jinja"):
            digest.update(f"{path.relative_to(_PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str:
    """Git's short name of the checkout, ``+`` where files were changed; "unknown" without git."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"


def differences(facts: Sequence[Facts]) -> list[str]:
    """Where the nodes differ, each time against the version that most ranks have."""
    problems = []
    names = sorted({name for item in facts for name in item.packages})
    for name in names:
        odd, usual = _odd({item.host: item.packages.get(name, "not installed") for item in facts})
        problems += [f"{host}: {name} is {value}, on the other nodes {usual}" for host, value in odd]
    commits = {item.host: item.commit for item in facts}
    odd, _ = _odd({item.host: item.code for item in facts})
    for host, _value in odd:
        others = next(item.commit for item in facts if item.host not in dict(odd))
        problems.append(f"{host}: the code differs (commit {commits[host]}, on the other nodes {others})")
    for name in sorted({name for item in facts for name in item.files}):
        odd, usual = _odd({item.host: str(item.files[name]) for item in facts if name in item.files})
        problems += [f"{host}: {name} has size {value}, on the other nodes {usual}" for host, value in odd]
    return problems


def _odd(values: dict[str, str]) -> tuple[list[tuple[str, str]], str]:
    """Hosts whose value is not the most frequent one, and that one."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return [(host, value) for host, value in sorted(values.items()) if value != usual], usual


def check_gpus(local_rank: int, local_size: int) -> list[str]:
    """Every rank of the node has a GPU, and nobody else uses this rank's."""
    count = torch.cuda.device_count()
    if count < local_size:
        built = f"torch {torch.__version__} sees {count} GPUs, and {local_size} ranks were started on this node"
        return [f"{built}; start fewer ranks, or set OVR_GPUS=0 for a run without GPUs"]
    free, total = torch.cuda.mem_get_info(local_rank)
    if free < 0.9 * total:
        used = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB"
        return [f"GPU {local_rank} has {used} in use; end the process that holds them or leave the node out"]
    return []


def check_cudnn() -> list[str]:
    """One cuDNN is loaded in this process: with two the first attention fails, at best.

    To be called when torch, and Transformer Engine where it is used, have loaded theirs.
    """
    folders = cudnn_folders(Path("/proc/self/maps").read_text())
    if len(folders) < 2:
        return []
    return [
        f"two cuDNN libraries are loaded, from {' and '.join(sorted(folders))}; unset CUDNN_HOME and set CUDNN_PATH to "
        "the folder `nvidia/cudnn` of Python's packages, or remove the system's"
    ]


def cudnn_folders(maps: str) -> set[str]:
    """Return the folders of the cuDNN libraries in the text of a ``/proc/PID/maps``."""
    paths = (line.split(maxsplit=5)[5] for line in maps.splitlines() if "/libcudnn" in line)
    return {str(Path(path).parent) for path in paths if re.match(r"libcudnn\w*\.so", Path(path).name)}


def bus_bandwidth(device: torch.device, megabytes: int, rounds: int = 5) -> float:
    """GB/s of an all-reduce over all ranks, as NCCL's tests count them: 2 (n - 1) / n x bytes / seconds.  A collective.

    The best of ``rounds``: a slow first one is the connections being made.
    """
    ranks = dist.get_world_size()
    tensor = torch.zeros(megabytes * 1_000_000 // 4, device=device)
    best = float("inf")
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    slowest = torch.tensor(best)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return 2 * (ranks - 1) / ranks * tensor.nbytes / slowest.item() / 1e9


def check_readable(path: Path) -> list[str]:
    """A file whose first and last bytes, or a folder whose entries, can be read from here."""
    try:
        if path.is_dir():
            return [] if any(path.iterdir()) else [f"{path} is an empty folder"]
        with path.open("rb") as file:
            if not file.read(_CHUNK):
                return [f"{path} is empty"]
            file.seek(max(0, path.stat().st_size - _CHUNK))
            file.read()
    except OSError as error:
        return [f"{path} cannot be read ({error.strerror}); copy it to a file system that all nodes mount"]
    return []


def write_rate(folder: Path, megabytes: int) -> float:
    """MB/s at which this rank writes a file to ``folder``, to the disk; the file is removed.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / f".preflight-{host_name()}-{os.getpid()}"
    block = os.urandom(1_000_000)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(megabytes):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return megabytes / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> list[str]:
    """``needed`` bytes are free in ``folder``."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    have, want = f"{free / 1e9:.1f} GB", f"{needed / 1e9:.1f} GB"
    return [f"{folder} has {have} free, and the run's checkpoints take {want}; free some, or lower run.keep_last"]


def check_shared(folder: Path) -> list[str]:
    """What the first rank writes to ``folder``, this rank finds there.  A collective."""
    box = [secrets.token_hex(8)]
    dist.broadcast_object_list(box, src=0)
    path = folder / f".preflight-{box[0]}"
    if dist.get_rank() == 0:
        path.write_text(box[0])
    dist.barrier()
    deadline = time.monotonic() + 2  # a network mount may lag
    while not (found := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    dist.barrier()
    if dist.get_rank() == 0:
        path.unlink()
    return (
        [] if found else [f"{folder} is not the folder that the first node sees; put run.dir on a shared file system"]
    )


def gather(problems: list[str]) -> list[str]:
    """The problems of all ranks, each once, with the nodes that have it.  A collective; all ranks get the answer."""
    everything: list[tuple[str, list[str]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everything, (host_name(), problems))
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for host, found in everything:
        for problem in found:
            if host not in hosts[problem]:
                hosts[problem].append(host)
    return [f"{', '.join(names)}: {problem}" for problem, names in hosts.items()]
