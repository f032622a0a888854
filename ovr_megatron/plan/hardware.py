"""The GPUs: memory as the driver reports it, and peak rates from NVIDIA's data sheets (dense, no sparsity)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ovr_megatron.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of ``per_node``.

    ``memory`` in bytes; ``flops`` bfloat16 FLOP/s; ``bandwidth`` of the memory, ``link`` to the GPUs of the node,
    ``network`` beyond it and PCIe to the ``host`` in bytes/s, one direction.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    host: float
    per_node: int = 8


_MIB = 1 << 20
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 81559 * _MIB, 989e12, 3.35e12, 450e9, 50e9, 64e9),
        Gpu("h200", 143771 * _MIB, 989e12, 4.8e12, 450e9, 50e9, 64e9),
        Gpu("h20", 97871 * _MIB, 148e12, 4.0e12, 450e9, 50e9, 64e9),
        Gpu("a100-80", 81920 * _MIB, 312e12, 2.0e12, 300e9, 25e9, 32e9),
        Gpu("a100-40", 40960 * _MIB, 312e12, 1.555e12, 300e9, 25e9, 32e9),
        Gpu("b200", 183359 * _MIB, 2250e12, 8.0e12, 900e9, 50e9, 64e9),
        # Cards without NVLink: the link is PCIe, 4.0 with 16 lanes.
        Gpu("l40s", 46068 * _MIB, 362e12, 0.864e12, 32e9, 25e9, 32e9),
        Gpu("a6000", 49140 * _MIB, 155e12, 0.768e12, 32e9, 25e9, 32e9),
        Gpu("rtx4090", 24564 * _MIB, 165e12, 1.008e12, 32e9, 25e9, 32e9),
        Gpu("a10", 23028 * _MIB, 125e12, 0.6e12, 32e9, 25e9, 32e9),
    )
}


_RATES = GPUS["a10"]  # of a card of which only the memory is known


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name; a number is the memory in GiB of a card whose rates are those of an A10.

    Raises:
        ConfigError: it is neither in the table nor a number above 1.
    """
    if name in GPUS:
        return GPUS[name]
    gib = _positive(name)
    if gib is None:
        raise ConfigError(f"--gpu {name} is not known; choose one of {', '.join(GPUS)}, or give its memory in GiB")
    return replace(_RATES, name=f"{gib:g} GiB", memory=int(gib * (1 << 30)))


def _positive(text: str) -> float | None:
    """Return the number in ``text`` if it is one of GiB that a card may have."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 1 <= number <= 10_000 else None


def gpu_in_name(recipe: str) -> str:
    """Return the GPU that a recipe's name asks for, as ``..._24gb`` does by its memory, or else the H100."""
    for part in recipe.split("_"):
        gib = part.removesuffix("gb")
        if part.endswith("gb") and gib.isdigit():
            # A card of 24 GB has a little less: what the driver leaves of it counts.
            smallest = [gpu for gpu in GPUS.values() if _is_sold_as(gpu, int(gib))]
            return min(smallest, key=lambda gpu: gpu.memory).name if smallest else gib
    return "h100"


def _is_sold_as(gpu: Gpu, gigabytes: int) -> bool:
    """Whether a card of ``gigabytes`` has about this memory: drivers report up to a tenth less."""
    gib = gpu.memory / (1 << 30)
    return 0.9 * gigabytes <= gib <= gigabytes


def gpus_in_name(recipe: str) -> int | None:
    """Return the number of GPUs in a recipe's name, as in ``..._64gpu``, or None without one."""
    counts = [part.removesuffix("gpu") for part in recipe.split("_") if part.endswith("gpu")]
    return int(counts[0]) if counts and counts[0].isdigit() else None
