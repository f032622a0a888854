"""Read and write a layout in one line, ``tp=2,cp=4,sp=1,zero=1``: in options, in plans and in a run's heading."""

from __future__ import annotations

import argparse

from ovr_megatron.config.checks import ConfigError
from ovr_megatron.config.model import ParallelConfig

SIZES = ("tp", "pp", "vpp", "cp", "dp")
SWITCHES = ("sp", "zero", "overlap")  # 0 or 1
KEYS = (*SIZES, *SWITCHES)


def parse_layout(text: str) -> tuple[ParallelConfig, int]:
    """Parse ``tp=2,sp=1,dp=2`` as a layout and its data-parallel size.

    ``sp=1`` is sequence parallelism, ``zero=1`` the distributed optimizer, and ``overlap`` hides the traffic of the
    gradients; without a word on it, it goes with ``zero``.

    Raises:
        argparse.ArgumentTypeError: an unknown or repeated key, a size that is no number, or an impossible layout.
    """
    assignments = [part for part in text.split(",") if part]
    values: dict[str, str] = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if sign:
            values[key] = value
    unknown = set(values) - set(KEYS)
    # Fewer values than parts: a key stands twice, or a part has no value.
    if len(values) != len(assignments) or unknown:
        raise argparse.ArgumentTypeError(f"{text!r} is not a layout; write for example tp=2,sp=1 with {KEYS}")
    if not all(value.isdigit() for value in values.values()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a layout: sizes are numbers")
    sizes = {key: int(values.get(key, 1)) for key in SIZES}
    switches = {key: bool(int(values.get(key, 0))) for key in SWITCHES}
    overlap = switches["overlap"] if "overlap" in values else switches["zero"]
    try:
        layout = ParallelConfig(
            tp=sizes["tp"],
            pp=sizes["pp"],
            vpp=sizes["vpp"],
            cp=sizes["cp"],
            sequence_parallel=switches["sp"],
            distributed_optimizer=switches["zero"],
            overlap=overlap,
        )
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return layout, sizes["dp"]


def format_layout(parallel: ParallelConfig) -> str:
    """Return the text from which `parse_layout` reads ``parallel``; it leaves out what is 1 or off, and stage sizes."""
    sizes = [("tp", parallel.tp), ("pp", parallel.pp), ("vpp", parallel.vpp), ("cp", parallel.cp)]
    words = [f"{key}={size}" for key, size in sizes if size > 1]
    if parallel.sequence_parallel:
        words.append("sp=1")
    if parallel.distributed_optimizer:
        words.append("zero=1")
    if parallel.overlap != parallel.distributed_optimizer:
        words.append(f"overlap={int(parallel.overlap)}")
    return ",".join(words) or "tp=1"
