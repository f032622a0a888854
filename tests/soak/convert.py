"""Both converters at the size of a published model: memory, time against ``cp``, and a kill in the middle.

    python tests/soak/convert.py --preset 7B --workers 2 --folder /big/disk

It makes a random bfloat16 model tensor by tensor, copies it with ``cp``, makes a checkpoint of it and exports that
with ``--verify``.  Every command starts with its input out of the page cache and is timed until the disk has what it
wrote.  Memory is the anonymous memory of a process (mapped pages of the weights apart), the highest of all processes.
The folder needs room for the model three times (7B: 50 GB) and is empty again at the end.  Exit 1: a bound is broken.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil
import torch

from ovr_megatron.families import ModelShape
from ovr_megatron.families.presets import presets, write_config
from ovr_megatron.model.tiny_tokenizer import CORPUS, write_tokenizer
from ovr_megatron.weights import table
from ovr_megatron.weights.folder import write_folder
from ovr_megatron.weights.shard import Pending

TOOLS = Path(__file__).resolve().parents[2] / "tools"
HIGHEST_MEMORY = 3e9
LONGEST = 4.0  # times cp
HUB_SHARD = 4_000_000_000


def random_model(preset: str, out: Path, seed: int = 0) -> int:
    """Write a bfloat16 model of random numbers as the hub lays it out; memory holds a tensor.  Returns its bytes."""
    path = write_config(preset, out)
    ids = write_tokenizer(out, CORPUS, 512, 32768)
    special = {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    special |= {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    path.write_text(json.dumps(json.loads(path.read_text()) | special, indent=2) + "\n")
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        Pending(name, torch.bfloat16, size, partial(random_tensor, size, generator))
        for row in table.rows(ModelShape.from_hf(out))
        for name, size in zip(row.hf, row.sizes, strict=True)
    ]
    write_folder(out, tensors, f"random {preset}", shard_bytes=HUB_SHARD)
    return sum(tensor.nbytes for tensor in tensors)


def random_tensor(size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Bits at random of either sign, but for the exponents of NaN and infinity."""
    integers = torch.empty(size, dtype=torch.int16)
    positive = integers.random_(0, 0x7F80, generator=generator).view(torch.bfloat16)
    return positive.mul_(1 - 2 * torch.randint(0, 2, size, generator=generator, dtype=torch.int8))


def files(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def forget(*folders: Path) -> None:
    """Take the files of the folders out of the page cache."""
    for path in (path for folder in folders for path in files(folder)):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def anonymous_memory(process: psutil.Process) -> int:
    """Bytes of anonymous memory of one process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def watch(command: Sequence[str], until: Callable[[], bool] | None = None) -> tuple[float, int]:
    """Run a command to its end, or kill it when ``until`` says so; seconds, and the highest memory of a process."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            root = psutil.Process(process.pid)
            peak = max(peak, *map(anonymous_memory, [root, *root.children(recursive=True)]))
        except psutil.NoSuchProcess:
            pass
        if until is not None and until():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    if until is None and process.returncode:
        sys.exit(f"exit {process.returncode}: {' '.join(command)}")
    return time.monotonic() - began, peak


def convert(tool: str, *arguments: object) -> list[str]:
    """The command line of one of the converters."""
    return [sys.executable, str(TOOLS / f"{tool}.py"), *map(str, arguments)]


def main() -> None:
    """Run the steps, print a table and leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(presets()), default="7B")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("soak_convert"), help="new folder to work in")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        sys.exit(0 if run(args.preset, args.workers, args.folder.resolve()) else 1)
    finally:
        shutil.rmtree(args.folder)


def copy(source: Path, out: Path) -> float:
    """Seconds that ``cp`` takes for the folder, until the disk has the copy."""
    forget(source)
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", str(source), str(out)], check=True)
    subprocess.run(["sync", *map(str, files(out))], check=True)
    seconds = time.monotonic() - began
    shutil.rmtree(out)
    return seconds


def run(preset: str, workers: int, folder: Path) -> bool:
    """All steps; whether the bounds hold."""
    hf, copied, checkpoint, back = (folder / name for name in ("hf", "cp", "checkpoint", "back"))
    began = time.monotonic()
    size = random_model(preset, hf)
    print(f"{preset}: {size / 1e9:.1f} GB bfloat16, made in {time.monotonic() - began:.0f} s; {workers} workers")
    copies = [copy(hf, copied)]

    importing = convert("convert_from_hf", "--hf", hf, "--out", checkpoint, "--workers", workers)
    watch(importing, until=lambda: len(list(folder.glob(".checkpoint.partial/policy/*.partial"))) > 2)
    assert not checkpoint.exists() and (folder / ".checkpoint.partial").exists(), "not killed in the middle"
    print("convert_from_hf killed at its third shard: no checkpoint", flush=True)

    exporting = convert("convert_to_hf", "--checkpoint", checkpoint, "--out", back, "--workers", workers)
    measured: dict[str, tuple[float, int]] = {}
    for name, command in (
        ("convert_from_hf", importing),
        ("convert_to_hf", exporting),
        ("convert_to_hf --verify", [*exporting, "--verify", str(hf)]),
    ):
        shutil.rmtree(back, ignore_errors=True)
        forget(folder)
        measured[name] = watch(command)
        print(f"{name}: {measured[name][0]:.1f} s", flush=True)
    shutil.rmtree(back)
    copies.append(copy(hf, copied))
    return report(copies, measured)


def report(copies: Sequence[float], measured: dict[str, tuple[float, int]]) -> bool:
    """Print the table, in units of the faster copy; whether the bounds hold."""
    print(f"{'command':<24} {'seconds':>8} {'x cp':>6} {'GB anonymous':>13}")
    for which, seconds in zip(("before", "after"), copies, strict=True):
        print(f"{f'cp and sync ({which})':<24} {seconds:8.1f}")
    sound = True
    for name, (seconds, peak) in measured.items():
        print(f"{name:<24} {seconds:8.1f} {seconds / min(copies):6.2f} {peak / 1e9:13.2f}")
        sound &= seconds <= LONGEST * min(copies) and peak <= HIGHEST_MEMORY
    print(f"{'within' if sound else 'OUT OF'} the bounds: {LONGEST} x cp, {HIGHEST_MEMORY / 1e9} GB")
    return sound


if __name__ == "__main__":
    main()
