"""The GPUs: memory as the driver reports it, and peak rates from NVIDIA's data sheets (dense, no sparsity)."""

from __future__ import annotations

from dataclasses import dataclass

from ovr_megatron.config import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of ``per_node``.

    ``memory`` in bytes; ``flops`` bfloat16 FLOP/s; ``bandwidth`` of the memory, ``link`` to the GPUs of the node and
    ``network`` beyond it in bytes/s, one direction.
    """

    name: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8


_MIB = 1 << 20
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 81559 * _MIB, 989e12, 3.35e12, 450e9, 50e9),
        Gpu("h200", 143771 * _MIB, 989e12, 4.8e12, 450e9, 50e9),
        Gpu("h20", 97871 * _MIB, 148e12, 4.0e12, 450e9, 50e9),
        Gpu("a100-80", 81920 * _MIB, 312e12, 2.0e12, 300e9, 25e9),
        Gpu("a100-40", 40960 * _MIB, 312e12, 1.555e12, 300e9, 25e9),
        Gpu("b200", 183359 * _MIB, 2250e12, 8.0e12, 900e9, 50e9),
    )
}


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name.

    Raises:
        ConfigError: it is not in the table.
    """
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known; choose one of {', '.join(GPUS)}")
    return GPUS[name]
