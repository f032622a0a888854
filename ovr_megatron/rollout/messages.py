"""Send and receive the rows of one step of a weight update."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ovr_megatron.weights.slices import Transfer, TransferStep


class Messages:
    """The messages of a step, one to and one from each other rank; all sends come first in the bucket.

    Attributes:
        outgoing: Transfers to pack, each with its part of the bucket.
        incoming: Transfers to unpack, each with its part of the bucket.
        nbytes: Bytes sent and received, without padding.
    """

    def __init__(self, step: TransferStep, bucket: Tensor, group: dist.ProcessGroup):
        self._group = group
        self._bucket = bucket
        self._end = 0
        self._operations: list[tuple[object, Tensor, int]] = []
        self._running: list[dist.Work] = []
        targets = [transfer.target for transfer in step.sends]
        sources = [transfer.source for transfer in step.receives]
        self.outgoing = self._add_messages(dist.isend, step.sends, targets)
        self.incoming = self._add_messages(dist.irecv, step.receives, sources)
        self.nbytes = message_bytes(step.sends + step.receives)

    def _add_messages(
        self,
        operation: object,
        transfers: Sequence[Transfer],
        peers: Sequence[int],
    ) -> list[tuple[Transfer, Tensor]]:
        """Lay the transfers out in the bucket, those of one peer side by side, and add a message for each peer."""
        buffers: list[tuple[Transfer, Tensor]] = []
        # Both ends keep the order of the plan within a message: it carries no description of its rows.
        for peer in sorted(set(peers)):
            first = self._end
            for transfer, transfer_peer in zip(transfers, peers, strict=True):
                if transfer_peer == peer:
                    end = self._end + transfer.nbytes
                    rows = self._bucket[self._end : end]
                    buffers.append((transfer, rows.view(transfer.dtype)))
                    self._end += transfer.padded_bytes
            message = self._bucket[first : self._end]
            self._operations.append((operation, message, peer))
        return buffers

    def start(self) -> Messages:
        """Start all sends and receives of the step."""
        if self._operations:
            # One batch: NCCL then runs them as one group, where single ones in unlike orders could wait for each other.
            operations = []
            for kind, message, peer in self._operations:
                operation = dist.P2POp(kind, message, peer, self._group)
                operations.append(operation)
            self._running = dist.batch_isend_irecv(operations)
        return self

    def wait(self) -> None:
        """Wait until all messages have been sent and received."""
        for work in self._running:
            work.wait()


def message_bytes(transfers: Sequence[Transfer]) -> int:
    """Return the bytes of the rows of ``transfers``, without padding."""
    return sum(transfer.nbytes for transfer in transfers)


def padded_bytes(step: TransferStep) -> int:
    """Return the bytes of a step's bucket."""
    return sum(transfer.padded_bytes for transfer in step.sends + step.receives)
