"""Turn checkpoints of Megatron-LM and Megatron-Bridge into ours, and a policy into one that they load."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from ovr_megatron.checkpoint.manifest import CheckpointError, check, write_manifest
from ovr_megatron.data.hf_assets import check_assets, complete_folder
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.runtime.files import write_whole
from ovr_megatron.runtime.folder_kinds import TRACKER, describe_folder
from ovr_megatron.weights.folder import WeightError, WeightFolder, copy_hf_assets
from ovr_megatron.weights.megatron import MegatronFolder, chunks, empty_states, open_megatron
from ovr_megatron.weights.shard import FORMATS
from ovr_megatron.weights.torch_dist import write_torch_dist
from ovr_megatron.weights.transfer import EMBEDDING, check_finite, check_weights, copy_weights, staged

# Both programs take a checkpoint of this name for weights without a training state: steps count from 0.
_RELEASE = "release"
# How Megatron-Bridge saves by default: layers stacked, gate and up in one tensor.
_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
# What Megatron-Bridge asks of the run that saved a checkpoint before it loads the weights.
_RUN_CONFIG = {
    "model": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
    "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
}


def import_megatron(megatron: Path, hf: Path, out: Path, text_only: bool, workers: int, force: bool) -> None:
    """Write the weights of ``megatron`` as a checkpoint of step 0, which appears when it is complete.

    Args:
        megatron: checkpoint of Megatron-LM or Megatron-Bridge, or one of its iterations.
        hf: Hugging Face folder of the model, of which configuration, tokenizer and processor are taken.
        out: folder to write.
        text_only: whether the checkpoint is of the language model alone; the vision tower is that of ``hf``.
        workers: shards written at a time.
        force: whether a folder of ours is replaced.

    Raises:
        WeightError: the checkpoint cannot be read, or is of another model.
    """
    shape = check_assets(hf)
    _check_tower(shape, text_only)
    source = open_megatron(megatron)
    with MegatronFolder(source, shape, WeightFolder(hf) if text_only else None) as folder:
        # All checks come before anything is written.
        check_weights(folder, shape)
        check_finite(folder)
        with staged(out, [megatron, hf], force) as partial:
            policy = partial / "policy"
            copy_hf_assets(complete_folder(hf), policy, FORMATS[folder.dtype(EMBEDDING)])
            copy_weights(folder, policy, shape, workers=workers)
            # Last: it has the hashes of all files.
            manifest = write_manifest(partial, step=0, extra={"converted_from": str(folder.directory.resolve())})
    total_bytes = sum(file.bytes for file in manifest.files.values())
    print(f"{out}: checkpoint of step 0 from {folder.directory}, {total_bytes:,} bytes")
    if text_only:
        print(f"vision tower: that of {hf}")


def export_megatron(checkpoint: Path, out: Path, text_only: bool, dtype: str | None, force: bool) -> None:
    """Write the policy of ``checkpoint`` for Megatron-LM and Megatron-Bridge; ``out`` appears when it is complete.

    Args:
        checkpoint: ours.
        out: folder to write.
        text_only: whether the language model alone is written, under the names of Megatron-LM's GPTModel.
        dtype: of the result; None keeps the stored one.
        force: whether a folder of ours is replaced.

    Raises:
        CheckpointError: there is no policy of whole weights.
    """
    source = checkpoint / "policy"
    manifest = check(checkpoint, under="policy")
    if not source.is_dir():
        raise CheckpointError(f"{checkpoint} has no policy; use another checkpoint")
    if problem := describe_folder(source, "model"):
        raise CheckpointError(problem)
    shape = ModelShape.from_hf(source)
    _check_tower(shape, text_only)
    with WeightFolder(source) as folder:
        check_weights(folder, shape)
        check_finite(folder)
        with staged(out, [checkpoint], force) as partial:
            release = partial / _RELEASE
            release.mkdir()
            parts = list(chunks(folder, shape, text_only, getattr(torch, dtype) if dtype else None))
            common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": _CONTENT}
            write_torch_dist(release, parts, empty_states(shape, text_only), common)
            write_whole(release / "run_config.yaml", yaml.safe_dump(_RUN_CONFIG))
            write_whole(partial / TRACKER, _RELEASE)
    names = "GPTModel, without the vision tower" if text_only else "Megatron-Bridge"
    print(f"{out}: policy of step {manifest.step} in torch_dist, under the names of {names}")


def _check_tower(shape: ModelShape, text_only: bool) -> None:
    """Refuse a whole model whose vision tower has names in Megatron-Bridge that are not known here.

    Raises:
        WeightError: names the family and the remedy.
    """
    family = family_of(shape)
    if not (text_only or family.has_bridge_tower):
        raise WeightError(
            f"{family.title}: the names that Megatron-Bridge gives its vision tower are not known here; convert the "
            "language model alone with --text-only"
        )
