"""Keep the shared memory of vLLM's tensor-parallel ranks on a CPU apart from that of other jobs of the machine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from vllm.distributed.device_communicators import cpu_communicator

_SEGMENTS = Path("/dev/shm")


@contextmanager
def private_segments(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Give the segments of an engine that is started in the block a name of its own, and remove it behind the block.

    vLLM names them after the port of the launch, which an external launcher does not tell, and after the ranks: the
    same for all jobs of a machine.  Two could not start, nor one after a job that was killed and left its segments.
    A collective of the engine's ranks; None where it has one rank and no segments.
    """
    if group is None:
        yield
        return
    names = [f"ovr-{uuid.uuid4().hex}" if group.rank() == 0 else ""]
    dist.broadcast_object_list(names, group=group, group_src=0)
    (name,) = names

    def name_group(communicator: cpu_communicator.CpuCommunicator) -> str:
        ranks = "-".join(map(str, communicator.ranks))
        return f"{name}-{communicator.unique_name}-{ranks}"

    cpu_communicator._CPUSHMDistributed.make_group_name = staticmethod(name_group)
    yield
    # Every rank has mapped them now, and memory that is mapped needs no name: a job that is killed leaves nothing.
    dist.barrier(group)
    for segment in _SEGMENTS.glob(f"{name}-*"):
        segment.unlink(missing_ok=True)  # another rank may be faster
