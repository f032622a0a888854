"""Memory that a model gives back while another one works, and takes again.

Storages are emptied in place, so every view of them, and there are many in Megatron's buffers, is whole again once they
are filled.  On a GPU what is kept waits in pinned memory and travels on a stream of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_SMALL = 1 << 12  # bytes; counters and scales stay


class Parking:
    """Tensors that are either in place or waiting in host memory.

    Args:
        keep: False for tensors whose values nobody wants again; they come back filled with zeros.
    """

    def __init__(self, keep: bool = True):
        self._keep = keep
        self._waiting: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        self._hosts: dict[int, Tensor] = {}  # pinned memory is dear to make: kept from time to time
        self._stream: torch.cuda.Stream | None = None
        self._arrived: torch.cuda.Event | None = None

    @property
    def is_empty(self) -> bool:
        """Whether everything is in place."""
        return not self._waiting

    def park(self, tensors: Iterable[Tensor]) -> None:
        """Free the memory of ``tensors``; storages that several share count once."""
        if self._waiting:
            return
        self.ready()
        stream = self._own_stream()
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors}
        chosen = [storage for storage in storages.values() if storage.nbytes() > _SMALL]
        for place, storage in enumerate(chosen):
            host = None
            if self._keep:
                host = self._host(place, storage)
                with torch.cuda.stream(stream):
                    host.copy_(_bytes(storage), non_blocking=True)
            self._waiting.append((storage, storage.nbytes(), host))
        if stream:
            stream.synchronize()
        for storage in chosen:
            storage.resize_(0)

    def bring(self) -> None:
        """Begin to take the memory again; `ready` says when what was in it is there."""
        if not self._waiting:
            return
        stream = self._own_stream()
        for storage, size, _ in self._waiting:
            storage.resize_(size)
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for storage, _, host in self._waiting:
                if host is None:
                    _bytes(storage).zero_()
                else:
                    _bytes(storage).copy_(host, non_blocking=True)
            if stream:
                self._arrived = stream.record_event()
        self._waiting = []

    def ready(self) -> None:
        """Bring what is away, and have the work that follows wait until it is there."""
        self.bring()
        if self._arrived:
            torch.cuda.current_stream().wait_event(self._arrived)
            self._arrived = None

    def _own_stream(self) -> torch.cuda.Stream | None:
        """A stream that begins where the current one is; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream

    def _host(self, place: int, storage: torch.UntypedStorage) -> Tensor:
        """Host memory for the ``place``-th storage; on a CPU it is given back with `bring`."""
        if not torch.cuda.is_available():
            return torch.empty(storage.nbytes(), dtype=torch.uint8)
        known = self._hosts.get(place)
        if known is None or known.numel() != storage.nbytes():
            if known is not None:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(known.data_ptr()))
            self._hosts[place] = _pinned(storage.nbytes())
        return self._hosts[place]


def _pinned(size: int) -> Tensor:
    """So many bytes of pinned memory; torch's own allocator would round them up to a power of two."""
    host = torch.empty(size, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), size, 0))
    return host


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
