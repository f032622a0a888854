"""Check every rank before a run starts: each check returns its problems, one sentence each.

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
    """Facts that must be equal on all nodes.

    Attributes:
        host: name of the node.
        packages: every installed distribution with its version.
        code: digest of the package's own files.
        commit: git's name of the checkout, see `commit`.
        files: size in bytes of each input file, the number of entries of a folder.
    """

    host: str
    packages: dict[str, str]
    code: str
    commit: str
    files: dict[str, int]


def host_name() -> str:
    """Return Slurm's name of this node, else the system's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def gather_facts(inputs: Iterable[Path]) -> Facts:
    """Return the `Facts` of this rank, without the ``inputs`` that are absent."""
    packages = {package.metadata["Name"]: package.version for package in metadata.distributions()}
    packages["CUDA"] = torch.version.cuda or "none"
    files = {}
    for path in inputs:
        size = size_of(path)
        if size is not None:
            files[str(path)] = size
    return Facts(host_name(), packages, code_digest(), commit(), files)


def size_of(path: Path) -> int | None:
    """Return the bytes of a file or the entries of a folder, None where neither can be seen from here."""
    try:
        return sum(1 for _ in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return None  # `check_readable` says why


def code_digest() -> str:
    """Return the SHA-256 over names and contents of the package's files."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*")):
        if path.suffix in (".py", ".yaml", ".jinja"):
            digest.update(f"{path.relative_to(_PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str:
    """Return git's short name of the checkout, with ``+`` where files were changed; "unknown" without git."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return answer.stdout.strip() or "unknown"


def differences(facts: Sequence[Facts]) -> list[str]:
    """Return a sentence for each difference of a node, against the value that most nodes have."""
    problems = []
    for name in sorted(set().union(*(rank.packages for rank in facts))):
        versions = {rank.host: rank.packages.get(name, "not installed") for rank in facts}
        outliers, usual = _outliers(versions)
        problems += [f"{host}: {name} is {value}, on the other nodes {usual}" for host, value in outliers]

    commits = {rank.host: rank.commit for rank in facts}
    outliers, _ = _outliers({rank.host: rank.code for rank in facts})
    outlier_hosts = {host for host, _ in outliers}
    for host, _ in outliers:
        usual_commit = next(rank.commit for rank in facts if rank.host not in outlier_hosts)
        problems.append(f"{host}: the code differs (commit {commits[host]}, on the other nodes {usual_commit})")

    for name in sorted(set().union(*(rank.files for rank in facts))):
        sizes = {rank.host: str(rank.files[name]) for rank in facts if name in rank.files}
        outliers, usual = _outliers(sizes)
        problems += [f"{host}: {name} has size {value}, on the other nodes {usual}" for host, value in outliers]
    return problems


def _outliers(values: dict[str, str]) -> tuple[list[tuple[str, str]], str]:
    """Return the hosts that differ from the most frequent value, each with its own, and the most frequent value."""
    usual = Counter(values.values()).most_common(1)[0][0]
    outliers = [(host, value) for host, value in sorted(values.items()) if value != usual]
    return outliers, usual


def check_gpus(local_rank: int, local_size: int) -> list[str]:
    """Check that every rank of the node has a GPU, and that no other process uses this rank's."""
    if torch.version.cuda is None:
        return [
            f"torch {torch.__version__} is a CPU build; install the GPU build with `bash examples/install.sh --gpu`, "
            "or with the wheel's extra `gpu`, or set OVR_GPUS=0 for a run without GPUs"
        ]
    count = torch.cuda.device_count()
    if count < local_size:
        counts = f"torch {torch.__version__} sees {count} GPUs, and {local_size} ranks were started on this node"
        return [f"{counts}; start fewer ranks, or set OVR_GPUS=0 for a run without GPUs"]
    free, total = torch.cuda.mem_get_info(local_rank)
    if free < 0.9 * total:
        used = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB"
        return [f"GPU {local_rank} has {used} in use; end the process that holds them or leave the node out"]
    return []


def check_cudnn() -> list[str]:
    """Check that one cuDNN is loaded in this process: with two the first attention fails, at best.

    Call it once torch, and Transformer Engine where it is used, have loaded theirs.
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
    """Measure the GB/s of an all-reduce over all ranks as NCCL's tests do: 2 (n - 1) / n x bytes / s.  A collective.

    The best of ``rounds`` counts: the first is slow, as it makes the connections.
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
    # The all-reduce is done when its last rank is.
    slowest = torch.tensor(best)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return 2 * (ranks - 1) / ranks * tensor.nbytes / slowest.item() / 1e9


def check_readable(path: Path) -> list[str]:
    """Check that the first and last bytes of a file, or the entries of a folder, can be read from here."""
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
    """Measure the MB/s at which this rank writes a file to the disk of ``folder``; the file is removed.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / f".preflight-{host_name()}-{os.getpid()}"
    block = os.urandom(1_000_000)  # random, as some file systems compress
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
    """Check that ``needed`` bytes are free in ``folder``."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [
        f"{folder} has {free / 1e9:.1f} GB free, and the run's checkpoints take {needed / 1e9:.1f} GB; free some, or "
        "lower run.keep_last"
    ]


def check_shared(folder: Path) -> list[str]:
    """Check that this rank sees a file that the first rank writes to ``folder``.  A collective."""
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0)
    path = folder / f".preflight-{token[0]}"
    if dist.get_rank() == 0:
        path.write_text(token[0])
    dist.barrier()  # the file is written before any rank looks
    deadline = time.monotonic() + 2  # a network mount may lag
    while not (is_visible := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    dist.barrier()  # every rank has looked before the file is removed
    if dist.get_rank() == 0:
        path.unlink()
    if is_visible:
        return []
    return [f"{folder} is not the folder that the first node sees; put run.dir on a shared file system"]


def gather(problems: list[str]) -> list[str]:
    """Return the problems of all ranks on all ranks, each once, with the nodes that have it.  A collective."""
    gathered: list[tuple[str, list[str]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(gathered, (host_name(), problems))
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for host, rank_problems in gathered:
        for problem in rank_problems:
            if host not in hosts[problem]:
                hosts[problem].append(host)
    return [f"{', '.join(names)}: {problem}" for problem, names in hosts.items()]
