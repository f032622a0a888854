"""Turn samples into packs: documents one after the other, without padding.

torch, which a pack's tensors need, is imported where one is made: the module itself loads in a fraction of a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ovr_megatron.data.best_fit import PackError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import Row

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # label of a token that predicts nothing


@dataclass(frozen=True)
class Origin:
    """The row that a document was made of, for records and metrics."""

    where: str
    id: str
    source: str


@dataclass
class Pack:
    """Documents in one row, on the host.  T tokens, D documents, P patches, F image and video features.

    Attributes:
        tokens: int64[T].
        labels: int64[T]; the next token of the same document where that one is a target, else -100.
        position_ids: int64[3, T], counted from 0 in each document.
        cu_seqlens: int32[D + 1], where documents begin and the last one ends, alignment tails left out.
        patches: float32[P, patch_dim].
        grid_thw: int64[n, 3], patches in time, height and width of each image or video.
        placement: int64[F], index in ``tokens`` of each feature, F = P / merge^2.
        extras: More arrays [T] in line with ``labels``: what belongs to a target stands where it is predicted.
        cu_seqlens_padded: int32[D + 1], where the documents' rows begin, alignment tails included.
        origins: The row of each document; empty where no record needs it.
        prefix_of: int64[D], for each document the index of the one before whose end its own first row follows, a prompt
            that several documents share, or -1 for none; None: no document has one.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    patches: Tensor
    grid_thw: Tensor
    placement: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)
    cu_seqlens_padded: Tensor | None = None
    origins: tuple[Origin, ...] = ()
    prefix_of: Tensor | None = None

    @property
    def bounds(self) -> Tensor:
        """int32[D + 1], the rows at which documents begin."""
        return self.cu_seqlens if self.cu_seqlens_padded is None else self.cu_seqlens_padded

    def document_of(self, rows: Tensor) -> Tensor:
        """Return int64[n], the index of the document in which each of ``rows`` (int64[n], on the host) lies."""
        import torch  # noqa: PLC0415 - see above

        ends = self.bounds[1:].to(rows.dtype)
        # To the right: the row at which a document ends is the first of the next.
        return torch.searchsorted(ends, rows, right=True)

    def aligned(self, document: int, total: int) -> Pack:
        """Return the pack with every document's rows a multiple of ``document`` and all rows a multiple of ``total``.

        Added rows carry no label, no feature and no position; the last document takes the rows that ``total`` asks
        for.

        Args:
            document: 1 where documents may have any length.
            total: a multiple of ``document``.
        """
        import torch  # noqa: PLC0415 - see above

        starts = self.cu_seqlens.numpy()
        lengths = np.diff(starts)
        padded = -(-lengths // document) * document
        tail = -padded.sum() % total
        padded[-1] += tail
        if (padded == lengths).all():
            return self
        # Row i of the pack becomes row i + (padding of the documents before its own).
        bounds = np.cumsum([0, *padded])
        padding_before = bounds[:-1] - starts[:-1]
        shift = np.repeat(padding_before, lengths)
        row_indices = np.arange(len(self.tokens)) + shift
        rows = torch.from_numpy(row_indices)
        size = int(bounds[-1])

        def pad(values: Tensor, fill: int = 0) -> Tensor:
            shape = (*values.shape[:-1], size)
            out = values.new_full(shape, fill)
            out[..., rows] = values
            return out

        return Pack(
            tokens=pad(self.tokens),
            labels=pad(self.labels, IGNORED),
            position_ids=pad(self.position_ids),
            cu_seqlens=self.cu_seqlens,
            patches=self.patches,
            grid_thw=self.grid_thw,
            placement=rows[self.placement],
            extras={name: pad(values) for name, values in self.extras.items()},
            cu_seqlens_padded=torch.from_numpy(bounds.astype(np.int32)),
            origins=self.origins,
            prefix_of=self.prefix_of,
        )


def pack(
    samples: Sequence[Sample],
    extras: Sequence[Mapping[str, np.ndarray]] | None = None,
    prompts: Sequence[int] | None = None,
) -> Pack:
    """Put ``samples`` one after the other.

    Args:
        samples: At least one.
        extras: For each sample, arrays with one number per target in order, or one per token in line with
            the labels.  All samples have the same names.
        prompts: A number of each sample's prompt; a prompt of several samples becomes a document of its own before
            them, without labels, see `share_prompts`.  None: every sample is one document.

    Raises:
        PackError: no sample, or an extra of another length.
    """
    import torch  # noqa: PLC0415 - see above

    if not samples:
        raise PackError("a pack needs at least one sample")
    prefix_of = None
    if prompts is not None:
        samples, extras, prefixes = share_prompts(samples, extras, prompts)
        prefix_of = torch.tensor(prefixes)
    lengths = [len(sample) for sample in samples]
    starts = np.cumsum([0, *lengths])
    labels = [_labels(sample) for sample in samples]
    placements = []
    # Not strict: the last start is the end of the pack.
    for sample, start in zip(samples, starts, strict=False):
        placements.append(sample.placement + start)
    arrays = {
        "tokens": np.concatenate([sample.tokens for sample in samples]),
        "labels": np.concatenate(labels),
        "position_ids": np.concatenate([sample.position_ids for sample in samples], axis=1),
        "cu_seqlens": starts.astype(np.int32),
        "patches": np.concatenate([sample.patches for sample in samples]),
        "grid_thw": np.concatenate([sample.grid_thw for sample in samples]),
        "placement": np.concatenate(placements),
    }
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    extra_tensors = {}
    if extras:
        for name in extras[0]:
            aligned = []
            for extra, sample_labels in zip(extras, labels, strict=True):
                aligned.append(_align_extra(name, extra[name], sample_labels))
            values = np.concatenate(aligned)
            extra_tensors[name] = torch.from_numpy(values)
    origins = []
    for sample in samples:
        row = sample.row
        origins.append(Origin(row.where, row.id, row.source))
    return Pack(**tensors, origins=tuple(origins), extras=extra_tensors, prefix_of=prefix_of)


def share_prompts(
    samples: Sequence[Sample],
    extras: Sequence[Mapping[str, np.ndarray]] | None,
    prompts: Sequence[int],
) -> tuple[list[Sample], list[Mapping[str, np.ndarray]] | None, list[int]]:
    """Cut samples of one prompt into the prompt, once, and what follows it; return the documents.

    The last token of the prompt stays with every sample: its row predicts the first target, which is another one in
    each.  Images and videos lie in the prompt, and so are encoded once.

    Args:
        samples: As of `pack`; those of one prompt begin with the same tokens, and have targets behind them alone.
        extras: As of `pack`; documents without targets get empty arrays.
        prompts: A number of each sample's prompt.

    Returns:
        Documents, prompts first and samples in their order; their extras; and `Pack.prefix_of` of each.
    """
    counts = Counter(prompts)
    shared = {}  # the document of each prompt that has several samples
    documents: list[Sample] = []
    for sample, prompt in zip(samples, prompts, strict=True):
        if counts[prompt] > 1 and prompt not in shared and _prefix_rows(sample) > 0:
            shared[prompt] = len(documents)
            documents.append(_cut_rows(sample, 0, _prefix_rows(sample)))
    prefix_of = [-1] * len(documents)
    for sample, prompt in zip(samples, prompts, strict=True):
        document = shared.get(prompt, -1)
        prefix_of.append(document)
        documents.append(sample if document < 0 else _cut_rows(sample, _prefix_rows(sample), len(sample)))
    if extras is None:
        return documents, None, prefix_of
    empty = {name: values[:0] for name, values in extras[0].items()}
    return documents, [empty] * len(shared) + list(extras), prefix_of


def _prefix_rows(sample: Sample) -> int:
    """Return the number of rows before the one that predicts the first target."""
    first_target = int(sample.loss_mask.argmax())
    return first_target - 1


def _cut_rows(sample: Sample, start: int, stop: int) -> Sample:
    """Return rows ``start`` to ``stop`` of a sample, with its images if these are the first."""
    rows = replace(
        sample,
        tokens=sample.tokens[start:stop],
        loss_mask=sample.loss_mask[start:stop],
        position_ids=sample.position_ids[:, start:stop],
    )
    if start == 0:
        return rows
    return replace(
        rows,
        patches=sample.patches[:0],
        grid_thw=sample.grid_thw[:0],
        placement=sample.placement[:0],
        images=[],
        videos=[],
    )


def blank_pack(extras: Iterable[str] = (), rows: int = 1) -> Pack:
    """Return a pack of ``rows`` tokens without labels, for a rank that has nothing to learn from in a step.

    Args:
        extras: Names of the arrays that the other ranks' packs have; here they are zeros.
        rows: At least one.
    """
    import torch  # noqa: PLC0415 - see above

    return Pack(
        tokens=torch.zeros(rows, dtype=torch.int64),
        labels=torch.full((rows,), IGNORED),
        position_ids=torch.zeros(3, rows, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, rows], dtype=torch.int32),
        patches=torch.zeros(0, 0),
        grid_thw=torch.zeros(0, 3, dtype=torch.int64),
        placement=torch.zeros(0, dtype=torch.int64),
        extras={name: torch.zeros(rows) for name in extras},
    )


def _labels(sample: Sample) -> np.ndarray:
    """Return int64[S]: the next token where it is a target, else `IGNORED`."""
    labels = np.full(len(sample), IGNORED, np.int64)
    next_tokens = sample.tokens[1:]
    is_target = sample.loss_mask[1:]
    # The last token predicts nothing: the next one is of another document.
    labels[:-1] = np.where(is_target, next_tokens, IGNORED)
    return labels


def _align_extra(name: str, values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the values in line with ``labels``; of one value per target, zeros stand in between."""
    values = np.asarray(values)
    targets = labels != IGNORED
    if len(values) == len(labels):
        return values
    if len(values) != targets.sum():
        raise PackError(
            f"extra {name!r} has {len(values)} numbers for a sample of {len(labels)} tokens and {targets.sum()} targets"
        )
    aligned = np.zeros(len(labels), values.dtype)
    aligned[targets] = values
    return aligned


def count_replies(rows: Sequence[Row], learn: str) -> tuple[int, int]:
    """Count the assistant messages of ``rows``, and those that ``data.learn`` and their weights make targets."""
    total = 0
    learned = 0
    for row in rows:
        replies = [message for message in row.messages if message.role == "assistant"]
        targets = sum(message.learn for message in replies)
        if learn != "all":
            targets = min(targets, 1)
        total += len(replies)
        learned += targets
    return total, learned
