"""The trainer's weights into vLLM's parameters, slice by slice.

Trainer and engine share the processes.  A plan, made once from what every rank holds and what its engine wants, says
which rows go where; an update follows it in steps of a set size: while the slices of one step travel, those of the
last are put in place.  What a rank has itself is copied straight into vLLM's parameter.

On a CPU vLLM multiplies with packed copies of its weights, and most weights exist only in that form.  Such a weight is
put together in passing memory, or taken from the trainer as it is where both agree, and packed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from ovr_megatron.rollout.sampling import RolloutError
from ovr_megatron.weights.slices import Held, Part, Piece, Run, SliceError, Step, plan, rows_of

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class TransferError(RolloutError):
    """An update that cannot reach all of the engine's parameters, or that arrived changed."""


@dataclass
class Wanted:
    """A parameter of vLLM on this rank.

    Attributes:
        name: vLLM's.
        shape: Its sizes here, also where vLLM keeps only a packed copy.
        packs: Layers that multiply with a packed copy of it.
    """

    name: str
    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    dim: int | None
    runs: tuple[Run, ...]
    packs: list[nn.Module]

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself; without elements where only the packed copy exists."""
        return getattr(self.module, self.attribute)  # type: ignore[no-any-return]

    def described(self) -> Part:
        """What other ranks must know."""
        return Part(self.dim, 0, self.parameter.dtype, True, self.runs)


@dataclass(frozen=True)
class Traffic:
    """What one update moved on this rank.

    Attributes:
        copied: Bytes that this rank had itself.
        received: Bytes from other ranks.
        seconds: Wall time.
        floor: Seconds that the same bytes take as plain copies and messages, at the rates measured with the plan.
    """

    copied: int
    received: int
    seconds: float
    floor: float

    def metrics(self) -> dict[str, float]:
        """For the log."""
        return {
            "sync/copied_mb": self.copied / 1e6,
            "sync/received_mb": self.received / 1e6,
            "perf/sync_gb_per_second": (self.copied + self.received) / max(self.seconds, 1e-9) / 1e9,
            "timing/sync_floor": self.floor,
        }


class Reshard:
    """Fills the parameters of this rank's vLLM.

    Args:
        model: vLLM's model.
        bucket_bytes: most bytes of a step; two steps are in memory at once.
        check: compare checksums of every slice at both ends.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int, check: bool = False):
        self._wanted = list(wanted_by(model))
        self._bucket_bytes, self._check = bucket_bytes, check
        self._device = next(model.parameters()).device
        self._group = dist.new_group()
        self._held: list[Part] | None = None
        self._plans: list[list[Step]] = []
        self._is_filled = False
        self._rates = (float("inf"), float("inf"))

    @torch.no_grad()
    def update(self, held: Sequence[Held], everything: bool = False) -> Traffic:
        """Fill every parameter, later only those that are trained unless ``everything`` is asked for.  A collective.

        Raises:
            TransferError: no rank has what is wanted; a slice arrived changed.
        """
        began = time.perf_counter()
        described = [one.described() for one in held]
        if self._is_new(described):
            self._make_plans(described)
            self._measure()
            began = time.perf_counter()
        steps = self._plans[self._is_filled and not everything]
        _Update(self, steps, held).run()
        self._is_filled = True
        copied = sum(piece.nbytes for step in steps for piece in step.copies)
        received = sum(piece.nbytes for step in steps for piece in step.receives)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        floor = copied / self._rates[0] + received / self._rates[1]
        return Traffic(copied, received, time.perf_counter() - began, floor)

    def _is_new(self, described: list[Part]) -> bool:
        """Whether on any rank the trainer holds something else than the plans are made for."""
        differs = torch.tensor(int(described != self._held), device=self._device)
        dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=self._group)
        return bool(differs.item())

    def _make_plans(self, described: list[Part]) -> None:
        """One for all parameters, one for those that are trained."""
        everyone: list[tuple[list[Part], list[Part]]] = [([], [])] * dist.get_world_size()
        mine = (described, [one.described() for one in self._wanted])
        dist.all_gather_object(everyone, mine, group=self._group)
        helds, wanteds = zip(*everyone, strict=True)
        try:
            self._plans = [
                plan(helds, wanteds, dist.get_rank(), self._bucket_bytes, trained_only)
                for trained_only in (False, True)
            ]
        except SliceError as error:
            raise TransferError(f"the engine's weights cannot be updated: {error}") from error
        self._held, self._is_filled = described, False

    def _measure(self) -> None:
        """Bytes a second of a plain copy, and on the slowest rank of the largest step's messages alone."""
        volumes = [sum(p.nbytes for p in step.receives + step.sends) for step in self._plans[0]]
        box = torch.tensor(volumes, dtype=torch.int64, device=self._device)
        dist.all_reduce(box, group=self._group)
        step = self._plans[0][int(box.argmax())]
        size = max(min(self._bucket_bytes, 64 << 20), 1 << 20)
        ours, theirs = (torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(2))
        copy_rate = size / self._fastest(lambda: theirs.copy_(ours))
        link_rate = float("inf")
        if box.any():
            messages = _Messages(step, torch.empty(_room(step), dtype=torch.uint8, device=self._device), self._group)
            seconds = self._fastest(lambda: messages.start().wait())
            rate = torch.tensor(messages.moved / seconds if messages.moved else link_rate, device=self._device)
            dist.all_reduce(rate, op=dist.ReduceOp.MIN, group=self._group)
            link_rate = float(rate)
        self._rates = (copy_rate, link_rate)

    def _fastest(self, act: Callable[[], object]) -> float:
        """Seconds of the best of three times."""
        found = []
        for _ in range(3):
            began = time.perf_counter()
            act()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return max(min(found), 1e-9)


class _Messages:
    """The bytes of a step on their way: first what is sent, then what comes, one message for each other rank."""

    def __init__(self, step: Step, bucket: Tensor, group: dist.ProcessGroup):
        self._group = group
        self.places: list[tuple[Piece, Tensor]] = []  # a piece to pack, and where
        self.arrivals: list[tuple[Piece, Tensor]] = []
        self._operations: list[tuple[object, Tensor, int]] = []
        self._running: list[dist.Work] = []
        end = 0
        for pieces, target in ((step.sends, True), (step.receives, False)):
            for other in sorted({piece.target if target else piece.source for piece in pieces}):
                first = end
                for piece in pieces:
                    if (piece.target if target else piece.source) == other:
                        place = bucket[end : end + piece.nbytes].view(piece.dtype)
                        (self.places if target else self.arrivals).append((piece, place))
                        end += piece.room
                self._operations.append((dist.isend if target else dist.irecv, bucket[first:end], other))
        self.moved = sum(piece.nbytes for piece in step.sends + step.receives)

    def start(self) -> _Messages:
        """Let them go."""
        if self._operations:
            operations = [dist.P2POp(kind, box, other, self._group) for kind, box, other in self._operations]
            self._running = dist.batch_isend_irecv(operations)
        return self

    def wait(self) -> None:
        """Until all have come."""
        for one in self._running:
            one.wait()


def _room(step: Step) -> int:
    """Bytes of a step's bucket."""
    return sum(piece.room for piece in step.sends + step.receives)


class _Update:
    """One run through the steps."""

    def __init__(self, reshard: Reshard, steps: list[Step], held: Sequence[Held]):
        self._steps, self._held, self._wanted = steps, held, reshard._wanted
        self._group, self._device, self._check = reshard._group, reshard._device, reshard._check
        self._building: dict[int, Tensor] = {}  # weights that are packed once they are whole
        self._scratch: list[Tensor] = []
        self._sums: tuple[dict[tuple[int, ...], int], dict[tuple[int, ...], int]] = ({}, {})  # at both ends

    def run(self) -> None:
        """Send step n + 1 while step n is put in place."""
        rooms = [max((_room(step) for step in self._steps[parity::2]), default=0) for parity in (0, 1)]
        buckets = [torch.empty(room, dtype=torch.uint8, device=self._device) for room in rooms]
        flying: tuple[Step, _Messages] | None = None
        for number, step in enumerate(self._steps):
            messages = _Messages(step, buckets[number % 2], self._group)
            for piece, place in messages.places:
                source = self._source(piece)
                place.view(source.shape).copy_(source)
                self._note(0, piece, source)
            messages.start()
            if flying:
                self._land(*flying)
            flying = step, messages
        if flying:
            self._land(*flying)
        if self._check:
            self._compare()

    def _source(self, piece: Piece) -> Tensor:
        held = self._held[piece.held]
        return rows_of(held.parameter, held.dim, piece.begin, piece.length)

    def _land(self, step: Step, messages: _Messages) -> None:
        """Put what has come, and what was here, in place."""
        lent = self._lent(step)
        for piece in step.copies:
            if piece.wanted not in lent:
                source = self._source(piece)
                place = self._place(piece)
                place.copy_(source.view(place.shape))
                self._note(0, piece, source)
                self._note(1, piece, place)
        messages.wait()
        for piece, box in messages.arrivals:
            place = self._place(piece)
            place.copy_(box.view(place.shape))
            self._note(1, piece, place)
        for number in step.complete:
            self._finish(self._wanted[number], lent.get(number, self._building.get(number)))
            if number in self._building:
                self._scratch.append(self._building.pop(number))

    def _lent(self, step: Step) -> dict[int, Tensor]:
        """Weights to pack that the trainer holds exactly as vLLM wants them."""
        found = {}
        for piece in step.copies:
            wanted, parameter = self._wanted[piece.wanted], self._held[piece.held].parameter
            if (
                wanted.packs
                and not wanted.parameter.numel()
                and (piece.begin, piece.at) == (0, 0)
                and tuple(parameter.shape) == wanted.shape
                and piece.length == (parameter.shape[wanted.dim] if wanted.dim is not None else parameter.numel())
                and parameter.dtype == wanted.parameter.dtype
            ):
                found[piece.wanted] = parameter
        return found

    def _place(self, piece: Piece) -> Tensor:
        """Where the rows of a piece belong."""
        wanted = self._wanted[piece.wanted]
        target: Tensor = wanted.parameter.data
        if not target.numel():
            if piece.wanted not in self._building:
                self._building[piece.wanted] = self._passing(wanted)
            target = self._building[piece.wanted]
        return rows_of(target, wanted.dim, piece.at, piece.length)

    def _passing(self, wanted: Wanted) -> Tensor:
        """Memory for a weight until it is packed; the same for weight after weight."""
        numbers, dtype = torch.Size(wanted.shape).numel(), wanted.parameter.dtype
        for i, free in enumerate(self._scratch):
            if free.untyped_storage().nbytes() >= numbers * dtype.itemsize:
                whole = torch.empty(0, dtype=dtype, device=self._device).set_(self._scratch.pop(i).untyped_storage())
                return whole[:numbers].view(wanted.shape)
        return torch.empty(wanted.shape, dtype=dtype, device=self._device)

    def _finish(self, wanted: Wanted, whole: Tensor | None) -> None:
        """Pack a weight anew where vLLM multiplies with a packed copy."""
        if not wanted.packs:
            return
        if whole is not None:
            setattr(wanted.module, wanted.attribute, nn.Parameter(whole, requires_grad=False))
        for module in wanted.packs:
            module.quant_method.process_weights_after_loading(module)  # type: ignore[union-attr, operator]
        if whole is not None and wanted.parameter.numel():
            raise TransferError(f"vLLM kept {wanted.name}, which it used to replace by its packed copy")

    def _note(self, end: int, piece: Piece, rows: Tensor) -> None:
        if self._check:
            copy = rows.to(piece.dtype, copy=True).flatten()  # numpy would pin the parameter's own storage
            self._sums[end][piece[:7]] = zlib.crc32(copy.view(torch.uint8).cpu().numpy())

    def _compare(self) -> None:
        """Every slice where it was taken and where it was put.  A collective."""
        sent: list[dict[tuple[int, ...], int]] = [{}] * dist.get_world_size()
        dist.all_gather_object(sent, self._sums[0], group=self._group)
        for key, found in self._sums[1].items():
            if sent[key[0]].get(key) != found:
                name = self._wanted[key[4]].name
                raise TransferError(f"{name}: rows from rank {key[0]} arrived changed (checksum {found:08x})")


def wanted_by(model: nn.Module) -> Iterator[Wanted]:
    """Every parameter of vLLM's Qwen2.5-VL on this rank, and the rows of the hub's tensors that it is made of.

    The source of each rule is the class in vLLM's ``model_executor/layers`` that it names.
    """
    found: dict[int, Wanted] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in found:
                shape, dim, runs = _layout(f"{prefix}.{attribute}", module, parameter)
                found[id(parameter)] = Wanted(f"{prefix}.{attribute}", module, attribute, shape, dim, runs, [])
            if attribute == "weight" and hasattr(module, "cpu_linear"):
                found[id(parameter)].packs.append(module)
    yield from found.values()


def _layout(
    name: str, module: nn.Module, parameter: nn.Parameter
) -> tuple[tuple[int, ...], int | None, tuple[Run, ...]]:
    """Sizes here, dimension of cutting, and runs."""
    hub = name.removeprefix("language_model.")
    fused = next((whole for whole in _FUSED if whole in hub), None)
    names = [hub.replace(fused, part) for part in _FUSED[fused]] if fused else [hub]
    shape = tuple(parameter.shape)
    is_matrix = name.endswith(".weight")
    if isinstance(module, LinearBase) and is_matrix:  # a weight that is packed only has no sizes of its own
        shape = (module.output_size_per_partition, module.input_size_per_partition)  # type: ignore[assignment]
    if isinstance(module, QKVParallelLinear):
        return shape, 0, tuple(_qkv_runs(names, module))
    if isinstance(module, MergedColumnParallelLinear):
        sizes = [size // module.tp_size for size in module.output_sizes]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        cuts = zip(names, sizes, firsts, strict=True)
        return shape, 0, tuple(Run(part, module.tp_rank * size, first, size) for part, size, first in cuts)
    if isinstance(module, ColumnParallelLinear):
        return shape, 0, (Run(hub, module.tp_rank * shape[0], 0, shape[0]),)
    if isinstance(module, RowParallelLinear) and is_matrix:
        return shape, 1, (Run(hub, module.tp_rank * shape[1], 0, shape[1]),)
    if isinstance(module, VocabParallelEmbedding):
        rows = module.shard_indices
        first, end = rows.org_vocab_start_index, rows.org_vocab_end_index
        return shape, 0, (Run(hub, first, 0, end - first),)
    return shape, None, (Run(hub, 0, 0, torch.Size(shape).numel()),)


def _qkv_runs(names: Sequence[str], module: QKVParallelLinear) -> Iterator[Run]:
    """Query, key and value rows; three tensors of the hub, or one in which they follow each other (vision)."""
    heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
    totals = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)
    kv_rank = module.tp_rank // module.num_kv_head_replicas
    at = before = 0
    for i, (count, total, rank) in enumerate(zip(heads, totals, (module.tp_rank, kv_rank, kv_rank), strict=True)):
        size = count * module.head_size
        inside = 0 if len(names) == 3 else before
        yield Run(names[i] if len(names) == 3 else names[0], inside + rank * size, at, size)
        at += size
        before += total * module.head_size
