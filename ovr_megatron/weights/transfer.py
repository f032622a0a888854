"""Check folders of weights against the model, copy and compare them, and publish a folder in one step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ovr_megatron.data.hf_files import list_hf_assets
from ovr_megatron.families import ModelShape
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.ownership import refusal, write_record
from ovr_megatron.runtime.progress import Progress
from ovr_megatron.weights import table
from ovr_megatron.weights.diagnosis import HEAD, explain
from ovr_megatron.weights.folder import SHARD_BYTES, WeightError, WeightFolder, some, write_folder
from ovr_megatron.weights.shard import FORMATS, PIECE, Pending, as_bytes, sync
from ovr_megatron.weights.table import published_name

EMBEDDING = "model.embed_tokens.weight"
VALUE_HEAD = "value_head.weight"
_FLOATS = ("F32", "BF16", "F16")


def check_weights(folder: WeightFolder, shape: ModelShape, critic: bool = False) -> None:
    """Check every name and size against the model: nothing missing, nothing unknown.

    A tied model may store ``lm_head.weight`` too, if it is equal to the embedding.

    Raises:
        WeightError: names the tensor, and both shapes where they differ.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for row in table.rows(shape, critic):
        expected |= zip(row.hf, row.sizes, strict=True)
    names = set(folder.names())
    doubled = shape.tied and not critic and HEAD in names
    if doubled:
        expected[HEAD] = (shape.vocab, shape.hidden)
    where = folder.directory
    shared_names = names & expected.keys()
    for name in sorted(shared_names):
        _check_tensor(folder, name, expected[name])
    if names != expected.keys():
        # A known way of saving says more than the names that it leaves missing or unknown.
        reason = explain(where, names, expected, critic)
        if reason:
            raise WeightError(reason)
    missing = sorted(expected.keys() - names)
    if missing:
        missing_names = some(missing)
        raise WeightError(f"{where}: no tensor {missing_names}; the folder is not whole, or of another model")
    unknown = sorted(names - expected.keys())
    if unknown:
        raise WeightError(f"{where}: {some(unknown)} not in this model; weights and config.json do not belong together")
    if doubled:
        head = folder.tensor(HEAD)
        embedding = folder.tensor(EMBEDDING)
        if not same_bits(head, embedding):
            raise WeightError(
                f"{where}: {HEAD} differs from {EMBEDDING}, but config.json ties them; set tie_word_embeddings to false"
            )


def _check_tensor(folder: WeightFolder, name: str, expected: tuple[int, ...]) -> None:
    where = folder.directory
    shape = folder.shape(name)
    if shape != expected:
        raise WeightError(
            f"{where}: {name} has shape {list(shape)}, config.json makes it {list(expected)}; "
            "weights and config.json do not belong together"
        )
    dtype = folder.dtype(name)
    if dtype not in _FLOATS:
        allowed = ", ".join(_FLOATS)
        raise WeightError(f"{where}: {name} is stored as {dtype}, not {allowed}; give a model that is not quantised")


def check_finite(
    folder: WeightFolder,
    share: tuple[int, int] = (0, 1),
    on_tensor: Callable[[], None] = watchdog.touch,
) -> None:
    """Refuse weights that are NaN or infinite; every byte is read, piece by piece.

    Args:
        folder: The weights.
        share: Rank and number of ranks, each of which reads every so-manyth tensor.
        on_tensor: Called before each tensor is read.

    Raises:
        WeightError: names the tensor and how many of its values are not finite.
    """
    rank, ranks = share
    names = folder.names()
    for name in names[rank::ranks]:
        on_tensor()
        tensor = folder.tensor(name)
        require_finite(tensor, name, folder.directory)


def require_finite(tensor: Tensor, name: str, directory: Path) -> None:
    """Refuse one tensor that has a NaN or an infinity.

    Raises:
        WeightError: names it.
    """
    count = 0
    for piece in tensor.flatten().split(PIECE):
        finite = int(piece.isfinite().sum())
        count += piece.numel() - finite
    if count:
        raise WeightError(
            f"{directory}: {name} has {count} of {tensor.numel()} values that are NaN or infinite; the model diverged "
            "or was damaged, give an earlier checkpoint or get the file again"
        )


def copy_weights(
    source: WeightFolder,
    out: Path,
    shape: ModelShape,
    dtype: torch.dtype | None = None,
    leave_out: Sequence[str] = (),
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[], None] = watchdog.touch,
) -> None:
    """Write the tensors of ``source`` to ``out``, except those named in ``leave_out``, in ``dtype`` or as stored.

    They get the names that published folders of the family of ``shape`` have, whichever they have in ``source``.
    ``workers`` threads write a shard each; the files are the same for any number of them.  Memory holds a few
    pieces of tensors, apart from the mapped pages of ``source``.  ``on_tensor`` is called before each tensor is read.
    """

    def load(name: str) -> Tensor:
        on_tensor()
        return source.tensor(name)

    tensors = []
    for name in source.names():
        if name in leave_out:
            continue
        pending = Pending(
            name=published_name(name, shape),
            dtype=dtype or FORMATS[source.dtype(name)],
            shape=source.shape(name),
            load=partial(load, name),
        )
        tensors.append(pending)
    title = f"weights of {source.directory}"
    write_folder(out, tensors, title, workers, shard_bytes)


def differences(
    ours: Path,
    theirs: Path,
    ignore: Sequence[str] = (),
    workers: int = 1,
) -> list[str]:
    """List the differences of two Hugging Face folders: each tensor bit by bit, and each other file byte by byte.

    ``lm_head.weight`` may be stored on one side only if the model is tied.  Hidden files and the names in
    ``ignore`` (tensors or files) are not compared.  ``workers`` threads compare a tensor each.
    """
    lines: list[str] = []
    with WeightFolder(ours) as a, WeightFolder(theirs) as b:
        all_names = {*a.names(), *b.names()}
        names = sorted(all_names.difference(ignore))
        optional: set[str] = set()
        if ModelShape.from_hf(ours).tied:
            optional.add(HEAD)
        compare = partial(_difference, a, b, optional)
        with (
            ThreadPoolExecutor(workers) as pool,
            Progress(len(names), f"comparing with {theirs}", "tensor") as progress,
        ):
            # In the order of the names, whichever thread is the first.
            for difference in pool.map(compare, names):
                if difference:
                    lines.append(difference)
                progress.update(1)
    assets = {*list_hf_assets(ours), *list_hf_assets(theirs)}
    for file in sorted(assets.difference(ignore)):
        lines += _asset_differences(ours, theirs, file)
    return lines


def _asset_differences(ours: Path, theirs: Path, file: str) -> list[str]:
    """List the differences of a file that one of the folders names, or both."""
    our_file = ours / file
    their_file = theirs / file
    lines = []
    if not their_file.exists():
        lines.append(f"{file}: only in {ours}")
    if not our_file.exists():
        lines.append(f"{file}: only in {theirs}")
    if not lines and our_file.read_bytes() != their_file.read_bytes():
        lines.append(f"{file}: the files differ")
    return lines


def _difference(
    a: WeightFolder,
    b: WeightFolder,
    optional: set[str],
    name: str,
) -> str | None:
    holders = [folder.directory for folder in (a, b) if name in folder]
    if len(holders) == 1:
        # A tied model's head is the embedding, stored a second time.
        if name in optional:
            return None
        return f"{name}: only in {holders[0]}"
    x = a.tensor(name)
    y = b.tensor(name)
    if x.dtype != y.dtype or x.shape != y.shape:
        x_shape = list(x.shape)
        y_shape = list(y.shape)
        return f"{name}: {x.dtype} {x_shape} against {y.dtype} {y_shape}"
    if same_bits(x, y):
        return None
    count, largest = _disagreement(x, y)
    return f"{name}: {count} of {x.numel()} values differ, by up to {largest:.3g}"


def _disagreement(x: Tensor, y: Tensor) -> tuple[int, float]:
    """Return how many values of two tensors of one dtype and shape differ in a bit, and the largest difference."""
    count = 0
    largest_by_piece = [0.0]
    x_pieces = x.flatten().split(PIECE)
    y_pieces = y.flatten().split(PIECE)
    for a, b in zip(x_pieces, y_pieces, strict=True):
        # By bytes, as in `same_bits`: a NaN equals itself, and 0 is not -0.
        differing_bytes = as_bytes(a) != as_bytes(b)
        bytes_by_value = differing_bytes.view(len(a), -1)
        differs = bytes_by_value.any(1)
        if differs.any():
            count += int(differs.sum())
            a_values = a[differs].double()
            b_values = b[differs].double()
            largest = (a_values - b_values).abs().max()
            largest_by_piece.append(largest.item())
    # Python's max would pass over a NaN; torch's returns it.
    largest_of_all = torch.tensor(largest_by_piece).max()
    return count, largest_of_all.item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits (a NaN equals itself, 0 is not -0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a_bytes = as_bytes(a)
    b_bytes = as_bytes(b)
    return torch.equal(a_bytes, b_bytes)


@contextmanager
def staged(out: Path, sources: Sequence[Path], replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` when the block ends without an error and the disk has it.

    It lies beside ``out``.  A killed process leaves it, hidden, and ``out`` as it was; the next call removes it.

    ``replace`` allows an ``out`` whose own record names every file in it (`ovr_megatron.runtime.ownership`); anything
    else is never removed.

    Raises:
        WeightError: ``out`` is not empty and may not be replaced, or contains or lies in one of the ``sources``.
    """
    out = out.resolve()
    for source in sources:
        resolved = source.resolve()
        if out.is_relative_to(resolved) or resolved.is_relative_to(out):
            raise WeightError(f"{out} and {source} lie in each other; choose another folder to write")
    # Both lie beside `out`, on the same file system: a rename there is one step.
    unfinished = out.with_name(f".{out.name}.partial")
    old = out.with_name(f".{out.name}.old")
    if old.exists() and not out.exists():  # killed in the moment between the two names
        old.rename(out)
    if out.exists() and not _is_empty_folder(out):
        if not replace:
            raise WeightError(f"{out} exists and is not empty; choose another folder, or replace it with --force")
        problem = refusal(out)
        if problem:
            raise WeightError(problem)
    out.parent.mkdir(parents=True, exist_ok=True)
    for left_over in (unfinished, old):
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        write_record(unfinished)
        # Every byte is on the disk before the folder has its name: a crash never leaves a named folder half written.
        for path in (*unfinished.rglob("*"), unfinished):
            sync(path)
        if out.exists():
            out.rename(old)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # what failed or was stopped; nothing once it has its name
    sync(out.parent)
    # The replaced folder goes only when the disk has the name of the new one.
    shutil.rmtree(old, ignore_errors=True)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
