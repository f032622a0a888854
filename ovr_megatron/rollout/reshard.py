"""Re-shard the trainer's weights into vLLM's parameters.

Trainer and engine share the processes, or a rank has one of them alone.  A plan, made once from the shards of every
rank's trainer and the parameters of its engine, lists the transfers; an update follows it in steps of at most
``bucket_bytes``: while the messages of one step travel, the rows of the step before are copied into the parameters.
Rows that a rank holds itself are copied straight into vLLM's parameter.

On a CPU vLLM multiplies with packed copies of its weights, and most weights exist only in that form.  Such a weight is
assembled in a temporary buffer, or borrowed from the trainer where both have the same layout, and packed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ovr_megatron.rollout.messages import Messages, message_bytes, padded_bytes
from ovr_megatron.rollout.sampling import RolloutError
from ovr_megatron.rollout.target_params import TargetParam, target_params
from ovr_megatron.weights.slices import (
    LocalShard,
    ShardLayout,
    SliceError,
    Transfer,
    TransferStep,
    plan,
    rows_of,
)


class TransferError(RolloutError):
    """An update that cannot reach all of the engine's parameters, or that arrived changed."""


@dataclass(frozen=True)
class Traffic:
    """Bytes and seconds of one update on this rank.

    Attributes:
        copied: Bytes copied from this rank's own shards.
        received: Bytes from other ranks.
        seconds: Wall time.
        floor: Seconds that the same bytes take as plain copies and messages, at the rates measured with the plan.
    """

    copied: int
    received: int
    seconds: float
    floor: float

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log."""
        total_bytes = self.copied + self.received
        rate = total_bytes / max(self.seconds, 1e-9)
        return {
            "sync/copied_mb": self.copied / 1e6,
            "sync/received_mb": self.received / 1e6,
            "perf/sync_gb_per_second": rate / 1e9,
            "timing/sync_floor": self.floor,
        }


class Reshard:
    """Copies the trainer's weights into the parameters of this rank's vLLM.

    Args:
        model: vLLM's model; None on a rank that only sends.
        bucket_bytes: most bytes of a step; two steps are in memory at once.
        check: compare checksums of every slice at both ends.
        group: of all ranks that send or receive; None: a new one of all ranks.
    """

    def __init__(
        self,
        model: nn.Module | None,
        bucket_bytes: int,
        check: bool = False,
        group: dist.ProcessGroup | None = None,
    ):
        self._targets = list(target_params(model)) if model else []
        self._bucket_bytes = bucket_bytes
        self._check = check
        self._device = torch.device("cpu")
        if torch.cuda.is_available():
            self._device = torch.device("cuda", torch.cuda.current_device())
        self._group = group or dist.new_group()
        self._planned_layouts: list[ShardLayout] | None = None
        self._plans: list[list[TransferStep]] = []  # of all parameters, of those that are trained
        self._is_filled = False
        self._copy_rate = float("inf")  # bytes a second
        self._link_rate = float("inf")

    @torch.no_grad()
    def update(self, shards: Sequence[LocalShard], everything: bool = False) -> Traffic:
        """Fill every parameter the first time or with ``everything``, later only those that are trained.  A collective.

        Raises:
            TransferError: no rank holds rows that a parameter needs; a slice arrived changed.
        """
        began = time.perf_counter()
        layouts = [shard.layout() for shard in shards]
        changed, sends_all = self._agree(layouts != self._planned_layouts, everything)
        if changed:
            self._make_plans(layouts)
            self._measure()
            began = time.perf_counter()
        trained_only = self._is_filled and not sends_all
        steps = self._plans[trained_only]
        _Update(self, steps, shards).run()
        self._is_filled = True
        copied = 0
        received = 0
        for step in steps:
            copied += message_bytes(step.copies)
            received += message_bytes(step.receives)
        # The copies into the parameters may still run: their time belongs to the update.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        floor = copied / self._copy_rate + received / self._link_rate
        return Traffic(copied, received, seconds, floor)

    def _agree(self, differs: bool, sends_all: bool) -> tuple[bool, bool]:
        """Return whether layouts differ from the planned ones, and whether all parameters are sent, on any rank.

        A collective.  All ranks must plan together: one rank that planned alone would wait for the others in
        `_make_plans`.  And a rank that only sends does not know what the engines have lost.
        """
        flags = torch.tensor([int(differs), int(sends_all)], device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        any_differs, any_sends_all = flags.tolist()
        return bool(any_differs), bool(any_sends_all)

    def _make_plans(self, layouts: list[ShardLayout]) -> None:
        """Plan the update of all parameters and that of the trained ones.  A collective."""
        by_rank: list[tuple[list[ShardLayout], list[ShardLayout]]] = [([], [])] * self._group.size()
        target_layouts = [target.layout() for target in self._targets]
        dist.all_gather_object(by_rank, (layouts, target_layouts), group=self._group)
        sources, targets = zip(*by_rank, strict=True)
        plans = []
        try:
            for trained_only in (False, True):
                steps = plan(
                    sources,
                    targets,
                    self._group.rank(),
                    self._bucket_bytes,
                    trained_only,
                )
                plans.append(steps)
        except SliceError as error:
            raise TransferError(f"the engine's weights cannot be updated: {error}") from error
        self._plans = plans
        self._planned_layouts = layouts
        self._is_filled = False

    def _measure(self) -> None:
        """Measure the bytes a second of a plain copy and, on the slowest rank, of the largest step's messages."""
        steps = self._plans[0]
        volumes = []
        for step in steps:
            volume = message_bytes(step.receives + step.sends)
            volumes.append(volume)
        total_volumes = torch.tensor(volumes, dtype=torch.int64, device=self._device)
        # The sum is the same on all ranks, so that all of them choose the same step and exchange its messages.
        dist.all_reduce(total_volumes, group=self._group)
        largest = int(total_volumes.argmax())
        size = min(self._bucket_bytes, 64 << 20)
        size = max(size, 1 << 20)
        source = torch.zeros(size, dtype=torch.uint8, device=self._device)
        target = torch.zeros(size, dtype=torch.uint8, device=self._device)
        copy_seconds = self._fastest(lambda: target.copy_(source))
        link_rate = float("inf")
        if total_volumes.any():
            step = steps[largest]
            bucket = torch.empty(padded_bytes(step), dtype=torch.uint8, device=self._device)
            messages = Messages(step, bucket, self._group)
            link_seconds = self._fastest(lambda: messages.start().wait())
            if messages.nbytes:  # a rank without messages must not count as the slowest
                link_rate = messages.nbytes / link_seconds
            rate = torch.tensor(link_rate, device=self._device)
            dist.all_reduce(rate, op=dist.ReduceOp.MIN, group=self._group)
            link_rate = float(rate)
        self._copy_rate = size / copy_seconds
        self._link_rate = link_rate

    def _fastest(self, act: Callable[[], object]) -> float:
        """Return the seconds of the fastest of three calls."""
        durations = []
        for _ in range(3):
            began = time.perf_counter()
            act()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            duration = time.perf_counter() - began
            durations.append(duration)
        shortest = min(durations)
        return max(shortest, 1e-9)  # rates divide by it


class _Update:
    """One run through the steps of a plan."""

    def __init__(
        self,
        reshard: Reshard,
        steps: list[TransferStep],
        shards: Sequence[LocalShard],
    ):
        self._steps = steps
        self._shards = shards
        self._targets = reshard._targets
        self._group = reshard._group
        self._device = reshard._device
        self._check = reshard._check
        self._last_merged: tuple[int, Tensor] | None = None  # index of a shard with an adapter, and its sum
        self._assembling: dict[int, Tensor] = {}  # weights that are packed once all of their rows are there
        self._free_buffers: list[Tensor] = []
        self._sent_checksums: dict[tuple[int, ...], int] = {}
        self._stored_checksums: dict[tuple[int, ...], int] = {}

    def run(self) -> None:
        """Send step n + 1 while the rows of step n are copied into the parameters."""
        # Two buckets in turn: a bucket is packed again only after the step that used it last has been waited for.
        buckets = []
        for parity in (0, 1):
            sizes = [padded_bytes(step) for step in self._steps[parity::2]]
            size = max(sizes, default=0)
            bucket = torch.empty(size, dtype=torch.uint8, device=self._device)
            buckets.append(bucket)
        in_flight: tuple[TransferStep, Messages] | None = None
        for index, step in enumerate(self._steps):
            bucket = buckets[index % 2]
            messages = Messages(step, bucket, self._group)
            for transfer, buffer in messages.outgoing:
                rows = self._source_rows(transfer)
                target = buffer.view(rows.shape)
                target.copy_(rows)
                self._record_checksum(self._sent_checksums, transfer, rows)
            messages.start()
            if in_flight:
                self._copy_into_params(*in_flight)
            in_flight = step, messages
        if in_flight:
            self._copy_into_params(*in_flight)
        if self._check:
            self._compare_checksums()

    def _source_rows(self, transfer: Transfer) -> Tensor:
        """Return the rows that a transfer reads from this rank's shard."""
        shard = self._shards[transfer.source_index]
        return rows_of(
            self._merged(transfer.source_index),
            shard.dim,
            transfer.source_offset,
            transfer.length,
        )

    def _merged(self, index: int) -> Tensor:
        """Return this rank's shard with its adapter added.

        The transfers of a weight follow one another: the last merged weight is the only one in memory.
        """
        shard = self._shards[index]
        if shard.adapter is None:
            return shard.parameter
        if self._last_merged is None or self._last_merged[0] != index:
            self._last_merged = None  # frees it before the next one is made
            self._last_merged = index, shard.merged()
        return self._last_merged[1]

    def _copy_into_params(self, step: TransferStep, messages: Messages) -> None:
        """Copy local and received rows into vLLM's parameters, and pack those that are complete."""
        borrowed = self._borrowed_params(step)
        # Local rows come before the wait: they are copied while the messages are still under way.
        for transfer in step.copies:
            if transfer.target_index not in borrowed:
                source = self._source_rows(transfer)
                target = self._target_rows(transfer)
                target.copy_(source.view(target.shape))
                self._record_checksum(self._sent_checksums, transfer, source)
                self._record_checksum(self._stored_checksums, transfer, target)
        messages.wait()
        for transfer, buffer in messages.incoming:
            target = self._target_rows(transfer)
            target.copy_(buffer.view(target.shape))
            self._record_checksum(self._stored_checksums, transfer, target)
        for index in step.complete:
            assembled = self._assembling.get(index)
            weight = self._merged(borrowed[index]) if index in borrowed else assembled
            self._pack(self._targets[index], weight)
            if assembled is not None:
                del self._assembling[index]
                self._free_buffers.append(assembled)

    def _borrowed_params(self, step: TransferStep) -> dict[int, int]:
        """Return, by target, the index of the trainer's shard that vLLM can pack as it is, without a copy."""
        borrowed: dict[int, int] = {}
        for transfer in step.copies:
            target = self._targets[transfer.target_index]
            parameter = self._shards[transfer.source_index].parameter
            if _fills_packed_param(transfer, parameter, target):
                borrowed[transfer.target_index] = transfer.source_index
        return borrowed

    def _target_rows(self, transfer: Transfer) -> Tensor:
        """Return a view of the rows that a transfer fills: of the parameter, or of the buffer it is assembled in."""
        index = transfer.target_index
        target = self._targets[index]
        tensor: Tensor = target.parameter.data
        if not tensor.numel():
            if index not in self._assembling:
                self._assembling[index] = self._assembly_buffer(target)
            tensor = self._assembling[index]
        return rows_of(
            tensor,
            target.dim,
            transfer.target_offset,
            transfer.length,
        )

    def _assembly_buffer(self, target: TargetParam) -> Tensor:
        """Return memory for a weight until it is packed; the storage of an earlier weight if that is large enough."""
        element_count = torch.Size(target.shape).numel()
        dtype = target.parameter.dtype
        needed_bytes = element_count * dtype.itemsize
        for i, free_buffer in enumerate(self._free_buffers):
            storage = free_buffer.untyped_storage()
            if storage.nbytes() >= needed_bytes:
                del self._free_buffers[i]
                # From the storage: the buffer itself is a view in the dtype and size of an earlier weight.
                flat = torch.empty(0, dtype=dtype, device=self._device)
                flat.set_(storage)
                elements = flat[:element_count]
                return elements.view(target.shape)
        return torch.empty(target.shape, dtype=dtype, device=self._device)

    def _pack(self, target: TargetParam, weight: Tensor | None) -> None:
        """Renew the packed copies of a parameter; ``weight`` has its values where vLLM keeps no other copy."""
        if not target.packing_modules:
            return
        if weight is not None:
            parameter = nn.Parameter(weight, requires_grad=False)
            setattr(target.module, target.attribute, parameter)
        for module in target.packing_modules:
            module.quant_method.process_weights_after_loading(module)
        # Otherwise the parameter would alias the trainer's weight or a buffer that the next weight is assembled in.
        if weight is not None and target.parameter.numel():
            raise TransferError(f"vLLM kept {target.name}, which it used to replace by its packed copy")

    def _record_checksum(
        self,
        checksums: dict[tuple[int, ...], int],
        transfer: Transfer,
        rows: Tensor,
    ) -> None:
        """Record the CRC-32 of a transfer's rows in the source's dtype, if updates are checked."""
        if self._check:
            copy = rows.to(transfer.dtype, copy=True).flatten()  # numpy would pin the parameter's own storage
            content = copy.view(torch.uint8).cpu()
            key = transfer[:7]
            checksums[key] = zlib.crc32(content.numpy())

    def _compare_checksums(self) -> None:
        """Compare every slice at its source and its target.  A collective.

        Raises:
            TransferError: a slice of this rank differs from its source.
        """
        sent_by_rank: list[dict[tuple[int, ...], int]] = [{}] * self._group.size()
        dist.all_gather_object(sent_by_rank, self._sent_checksums, group=self._group)
        for key, checksum in self._stored_checksums.items():
            source = key[0]
            target_index = key[4]
            sent_checksum = sent_by_rank[source].get(key)
            if sent_checksum != checksum:
                name = self._targets[target_index].name
                raise TransferError(f"{name}: rows from rank {source} arrived changed (checksum {checksum:08x})")


def _fills_packed_param(transfer: Transfer, parameter: Tensor, target: TargetParam) -> bool:
    """Return whether a transfer of all of ``parameter`` is all of a target that exists in packed form alone."""
    if not target.packing_modules or target.parameter.numel():
        return False
    if transfer.source_offset or transfer.target_offset:
        return False
    # It is packed without a copy, so that nothing would convert another shape or dtype on the way.
    if tuple(parameter.shape) != target.shape:
        return False
    if parameter.dtype != target.parameter.dtype:
        return False
    total_length = parameter.numel()
    if target.dim is not None:
        total_length = parameter.shape[target.dim]
    return transfer.length == total_length
