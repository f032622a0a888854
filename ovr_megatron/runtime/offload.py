"""Offload a model's tensors to host memory while another model works, and onload them again.

Storages are emptied in place, so that every view of them, of which Megatron's buffers have many, is valid again once
they are filled.  On a GPU the bytes are in pinned memory, and a stream of their own copies them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_SMALL = 1 << 12  # bytes; counters and scales stay


class OffloadedTensors:
    """Tensors that are either on their device or offloaded to host memory.

    Args:
        keep: False for tensors whose values are not needed again; they come back filled with zeros.
    """

    def __init__(self, keep: bool = True):
        self._keep = keep
        self._offloaded: list[tuple[torch.UntypedStorage, int, Tensor | None]] = []
        self._buffers: dict[int, Tensor] = {}  # pinned memory is expensive to make: kept from one offload to the next
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is offloaded."""
        return not self._offloaded

    def offload(self, tensors: Iterable[Tensor]) -> None:
        """Free the device memory of ``tensors``; a storage that several of them share counts once."""
        if self._offloaded:
            return
        # An onload that is still running writes to these storages.
        self.wait_onloaded()
        stream = self._copy_stream()
        storages = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() > _SMALL:
                storages[storage.data_ptr()] = storage
        for index, storage in enumerate(storages.values()):
            buffer = None
            if self._keep:
                buffer = self._host_buffer(index, storage)
                with torch.cuda.stream(stream):
                    buffer.copy_(_bytes(storage), non_blocking=True)
            self._offloaded.append((storage, storage.nbytes(), buffer))
        # The host waits: memory that is freed may be reused at once, also by another library.
        if stream:
            stream.synchronize()
        for storage in storages.values():
            storage.resize_(0)

    def onload(self) -> None:
        """Allocate the memory again and begin to copy; `wait_onloaded` orders later work after the copies."""
        if not self._offloaded:
            return
        stream = self._copy_stream()
        for storage, size, _ in self._offloaded:
            storage.resize_(size)
        # The allocator may hand out memory that work on the current stream still uses.
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for storage, _, buffer in self._offloaded:
                if buffer is None:
                    _bytes(storage).zero_()
                else:
                    _bytes(storage).copy_(buffer, non_blocking=True)
            if stream:
                self._copied = stream.record_event()
        self._offloaded = []

    def wait_onloaded(self) -> None:
        """Onload, and make the work that follows on the current stream wait for the copies; the host does not wait."""
        self.onload()
        if self._copied:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

    def _copy_stream(self) -> torch.cuda.Stream | None:
        """Return the stream of the copies, ordered after the work of the current one; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return self._stream

    def _host_buffer(self, index: int, storage: torch.UntypedStorage) -> Tensor:
        """Return host memory for the ``index``-th storage, pinned and reused where there is a GPU."""
        if not torch.cuda.is_available():
            return torch.empty(storage.nbytes(), dtype=torch.uint8)
        buffer = self._buffers.get(index)
        if buffer is None or buffer.numel() != storage.nbytes():
            if buffer is not None:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))
            self._buffers[index] = _pinned(storage.nbytes())
        return self._buffers[index]


def _pinned(size: int) -> Tensor:
    """Return ``size`` bytes of pinned memory; torch's own allocator would round them up to a power of two."""
    buffer = torch.empty(size, dtype=torch.uint8)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), size, 0))
    return buffer


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
