"""Exchange Python objects between ranks, point to point, or gather small ones of all."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ovr_megatron.errors import UserError

Item = TypeVar("Item")


def gather_objects(item: Item) -> list[Item]:
    """Return the object of every rank, by rank.  A collective of all ranks; `exchange` is for large objects."""
    items = [item] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def call_on_all(work: Callable[[], Item]) -> Item:
    """Return ``work()``; where it raises a `UserError` on any rank, raise the first one on all ranks.  A collective."""
    try:
        item = work()
    except UserError as error:
        raise_first(error)
        raise
    raise_first(None)
    return item


def raise_first(problem: UserError | None) -> None:
    """Raise the first problem of any rank on all ranks, where there is one.  A collective of all ranks.

    A rank that raised alone would leave the others waiting in their next collective.
    """
    for rank_problem in gather_objects(problem):
        if rank_problem is not None:
            raise rank_problem


def exchange(outgoing: Mapping[int, Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Send ``outgoing[rank]`` to each rank that it names and return the objects for this one, by rank of the sender.

    A collective of all ranks of ``group`` (None: all ranks), through the host. No rank holds objects of others: a
    gather of a large batch on every rank would not fit into a node.
    """
    group = group or dist.group.WORLD
    assert group is not None
    rank = group.rank()
    buffers = {peer: _to_bytes(payload) for peer, payload in outgoing.items()}
    # The lengths go first: a receiver must allocate its buffer before the message comes.
    expected = _incoming_lengths({peer: len(buffer) for peer, buffer in buffers.items()}, group)
    received: dict[int, Tensor] = {}
    for peer, length in expected.items():
        if peer != rank:
            received[peer] = torch.empty(length, dtype=torch.uint8)

    # All are posted before any is waited for: waiting for one transfer before posting the next could deadlock.
    requests = []
    for peer, buffer in buffers.items():
        if peer != rank:
            requests.append(dist.isend(buffer, group=group, group_dst=peer))
    for peer, buffer in received.items():
        requests.append(dist.irecv(buffer, group=group, group_src=peer))
    for request in requests:
        assert request is not None
        request.wait()

    if rank in buffers:
        received[rank] = buffers[rank]
    # In the order of ranks, so that the result does not depend on which message came first.
    payloads = []
    for peer in sorted(received):
        pickled = received[peer].numpy().tobytes()
        payloads.append(pickle.loads(pickled))
    return payloads


def _to_bytes(payload: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(payload)), dtype=torch.uint8)


def _incoming_lengths(lengths: Mapping[int, int], group: dist.ProcessGroup) -> dict[int, int]:
    """Return the bytes that each peer sends to this rank, without the peers that send nothing.  A collective.

    ``lengths`` has the bytes that this rank sends to each peer of ``group``.
    """
    size = group.size()
    row = torch.tensor([lengths.get(peer, 0) for peer in range(size)])
    table = [torch.empty_like(row) for _ in range(size)]
    dist.all_gather(table, row, group=group)
    column = [int(peer_row[group.rank()]) for peer_row in table]
    return {peer: length for peer, length in enumerate(column) if length}
