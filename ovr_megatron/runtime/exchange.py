"""Python objects from rank to rank, straight to where they are wanted."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist


def exchange(outgoing: Mapping[int, Any]) -> list[Any]:
    """Send ``outgoing[rank]`` to each rank that it names; returns what was sent to this one, by rank of the sender.

    A collective of all ranks.  It goes through the host, and no rank holds what is not its own: a gather of a large
    batch on every rank would not fit into a node.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    payloads = {peer: pickle.dumps(thing) for peer, thing in outgoing.items()}
    lengths = torch.tensor([len(payloads.get(peer, b"")) for peer in range(size)])
    table = [torch.empty_like(lengths) for _ in range(size)]
    dist.all_gather(table, lengths)
    wanted = {peer: int(table[peer][rank]) for peer in range(size) if table[peer][rank] and peer != rank}
    arriving = {peer: torch.empty(length, dtype=torch.uint8) for peer, length in wanted.items()}
    leaving = {peer: torch.frombuffer(bytearray(data), dtype=torch.uint8) for peer, data in payloads.items()}
    works = [dist.isend(data, peer) for peer, data in leaving.items() if peer != rank]
    works += [dist.irecv(buffer, peer) for peer, buffer in arriving.items()]
    for work in works:
        assert work is not None
        work.wait()
    arriving |= {rank: leaving[rank]} if rank in leaving else {}
    return [pickle.loads(arriving[peer].numpy().tobytes()) for peer in sorted(arriving)]
