"""Turn Hugging Face folders into checkpoints, and checkpoints into Hugging Face folders or their average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from ovr_megatron.checkpoint.hf_assets import write_generation_config
from ovr_megatron.checkpoint.manifest import MANIFEST, CheckpointError, check, write_manifest
from ovr_megatron.data.hf_assets import check_assets, complete_folder, load_assets
from ovr_megatron.data.hf_files import list_other_files
from ovr_megatron.errors import UserError
from ovr_megatron.families import ModelShape
from ovr_megatron.families.stretch import stretch_positions
from ovr_megatron.runtime import watchdog
from ovr_megatron.runtime.terminal import printable
from ovr_megatron.runtime.work_barrier import WorkBarrier
from ovr_megatron.weights.adapters import MergedFolder, adapter_dtype, is_adapter_folder, read_adapter_settings
from ovr_megatron.weights.average import average
from ovr_megatron.weights.diagnosis import HEAD
from ovr_megatron.weights.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WeightFolder, copy_hf_assets
from ovr_megatron.weights.selected_layers import SelectedLayers, check_layers, write_layer_count
from ovr_megatron.weights.transfer import (
    VALUE_HEAD,
    check_finite,
    check_weights,
    copy_weights,
    differences,
    staged,
)

SHOWN_DIFFERENCES = 20
_exports = itertools.count()  # of `export_model`: the same on all ranks


def import_hf(
    hf: Path,
    out: Path,
    workers: int,
    force: bool,
    yarn: float | None,
    layers: Sequence[int] | None = None,
) -> None:
    """Write ``out/policy``, stretched ``yarn`` times, and the manifest; ``out`` appears when it is complete.

    With ``layers`` the language model has these layers alone, in this order.

    Raises:
        ConfigError: there are no such layers, or ``yarn`` stretches nothing.
        WeightError: a tensor is missing, unknown or of another size.
    """
    shape = check_assets(hf)
    selected: WeightFolder | None = None
    if layers is not None:
        check_layers(layers, shape)
        selected = SelectedLayers(hf, layers)
        shape = replace(shape, layers=len(layers))
    with selected or WeightFolder(hf) as folder:
        # All checks come before anything is written.
        check_weights(folder, shape)
        check_finite(folder)
        with staged(out, [hf], force) as partial:
            policy = partial / "policy"
            copy_hf_assets(complete_folder(hf), policy)
            if layers is not None:
                shape = write_layer_count(policy, layers)
            if yarn is not None:
                shape = stretch_positions(policy, yarn)
            copy_weights(folder, policy, shape, workers=workers)
            # Last: it has the hashes of all files.
            origin = str(hf.resolve())
            manifest = write_manifest(partial, step=0, extra={"converted_from": origin})
    total_bytes = sum(file.bytes for file in manifest.files.values())
    print(f"{out}: checkpoint of step 0, {total_bytes:,} bytes")
    other_files = list_other_files(hf)
    if other_files:
        print(f"not copied, as they are no part of the model: {', '.join(other_files)}")
    if yarn is not None:
        print(f"YaRN: {shape.max_positions:,} positions in config.json, {yarn:g} times {shape.trained_positions:,}")


def open_weights(folder: Path, merge: bool, base: Path | None = None) -> WeightFolder:
    """Open the weights of a part of a checkpoint, with ``merge`` those of its model with its adapters added.

    ``base`` is the model's folder, where it is not the one that ``adapter_config.json`` names.

    Raises:
        CheckpointError: ``merge`` is set and there are no adapters, or the reverse.
        WeightError: the adapters cannot be read, or are of another model.
    """
    if is_adapter_folder(folder) and not merge:
        raise CheckpointError(
            f"{folder} holds adapters: give --merge to add them to the model, or serve them as they are (PEFT's format)"
        )
    if not merge:
        return WeightFolder(folder)
    if not is_adapter_folder(folder):
        raise CheckpointError(f"{folder} holds entire weights, so there is nothing to merge; leave out --merge")
    settings = read_adapter_settings(folder)
    model = base or settings.base
    if not model.is_dir():
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {settings.base}, which is not there; name the "
            "folder of the model with --base"
        )
    return MergedFolder(model, WeightFolder(folder, ADAPTER_WEIGHTS), settings.scale)


def export_hf(
    checkpoint: Path,
    out: Path,
    critic: bool,
    dtype: str | None,
    workers: int,
    force: bool,
    merge: bool = False,
    base: Path | None = None,
    on_progress: Callable[[], None] = watchdog.touch,
) -> None:
    """Write the folder ``out``, which appears when it is complete; print which parts of the checkpoint are left out.

    With ``merge`` the checkpoint's adapters are added to the weights of the model that they were trained beside, which
    ``base`` names where it has moved; without ``dtype`` the result has the dtype of the run.  ``on_progress`` is called
    for each tensor and file that is read.

    Raises:
        CheckpointError: the checkpoint lacks the part, or holds adapters and ``merge`` is not set, or the reverse.
        WeightError: weights or adapters do not belong to the model.
    """
    part = "critic" if critic else "policy"
    source = checkpoint / part
    manifest = check(checkpoint, under=part, on_file=on_progress)
    parts = {name.split("/")[0] for name in manifest.files}
    if not source.is_dir():
        present = ", ".join(sorted(parts))
        raise CheckpointError(f"{checkpoint} has no {part}, only {present}; use another checkpoint")
    shape = ModelShape.from_hf(source)
    assets = load_assets(source, shape)
    export_dtype = getattr(torch, dtype) if dtype else None
    if merge and export_dtype is None:
        export_dtype = adapter_dtype(source)
    with open_weights(source, merge, base) as folder:
        # All checks come before anything is written.
        check_weights(folder, shape, critic)
        check_finite(folder, on_tensor=on_progress)
        with staged(out, [checkpoint], force) as partial:
            copy_hf_assets(source, partial, export_dtype)
            if manifest.step:  # step 0 is the base model itself
                vocabulary = assets.tokenizer.get_vocab()
                write_generation_config(partial, shape, vocabulary)
            copy_weights(folder, partial, shape, export_dtype, [VALUE_HEAD], workers, on_tensor=on_progress)
    print(f"{out}: {part} of step {manifest.step}")
    left_out = sorted(parts - {part})
    if critic:
        left_out.insert(0, f"{VALUE_HEAD} (a Hugging Face model has no place for it)")
        if not shape.tied:
            print("a critic has no lm_head.weight: load it with AutoModel, it cannot generate")
    left_out_text = ", ".join(left_out) or "nothing"
    print(printable(f"left out: {left_out_text}"))


def export_model(checkpoint: str | Path, out: str | Path, dtype: str | None = None, critic: bool = False) -> None:
    """Write the policy of a checkpoint as a Hugging Face folder, adapters merged.

    Where ranks are joined it is a collective: the first one writes, and all wait for it.

    Args:
        checkpoint: a folder ``step_N`` of a run.
        out: a folder that is not there yet.
        dtype: ``float32`` or ``bfloat16``; by default that of the run.
        critic: export the critic instead, without its value head.

    Raises:
        CheckpointError: the checkpoint lacks the part, or is damaged.
        WeightError: weights or adapters do not belong to the model, or ``out`` is there.
    """
    folder = Path(checkpoint)
    is_joined = dist.is_initialized()
    problem: list[UserError | OSError | None] = [None]
    work = WorkBarrier(f"export/{next(_exports)}") if is_joined else None
    if not is_joined or dist.get_rank() == 0:
        merge = is_adapter_folder(folder / ("critic" if critic else "policy"))
        try:
            on_progress = work.step if work else watchdog.touch
            export_hf(folder, Path(out), critic, dtype, 1, force=False, merge=merge, on_progress=on_progress)
        except (UserError, OSError) as error:
            problem = [error]
    if work:
        # A large model takes its time: the wait lasts for as long as the first rank makes progress.
        work.wait()
        # All ranks raise or none.
        dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise problem[0]


def compare_export(out: Path, hf: Path, critic: bool, workers: int) -> bool:
    """Compare with the folder ``hf``, tensors bit by bit, other files byte by byte; print and return the result.

    Returns:
        Whether both folders are equal.
    """
    # The export of a critic has neither: its value head has no place there, and it has no output layer.
    ignore = [HEAD, VALUE_HEAD] if critic else []
    problems = differences(out, hf, ignore=ignore, workers=workers)
    for problem in problems[:SHOWN_DIFFERENCES]:
        print(printable(f"differs: {problem}"))
    if problems:
        print(f"{len(problems)} differences from {hf}")
    else:
        print(f"equal to {hf}, bit by bit")
    return not problems


def average_checkpoints(directories: Sequence[Path], out: Path, force: bool) -> None:
    """Write the mean to ``out``: a checkpoint if all ``directories`` are checkpoints, else a Hugging Face folder."""
    checkpoints = [directory for directory in directories if (directory / MANIFEST).exists()]
    manifests = [check(directory, under="policy") for directory in checkpoints]
    if len(checkpoints) < len(directories):
        average(directories, out, force)
        print(f"{out}: Hugging Face folder, mean of {len(directories)} models")
        return
    step = max(manifest.step for manifest in manifests)
    sources = [str(directory.resolve()) for directory in directories]
    with staged(out, directories, force) as partial:
        average(directories, partial / "policy")
        write_manifest(partial, step, extra={"average_of": sources})
    print(f"{out}: checkpoint, mean of the policies of {len(directories)} checkpoints")
