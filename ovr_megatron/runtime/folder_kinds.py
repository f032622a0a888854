"""Recognise what a path holds, so that the wrong folder is answered with its kind and the command that is right.

Names of files decide; nothing is opened but a text of some bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Purpose = Literal["model", "checkpoint", "run", "megatron"]

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_\d{7}|release")
_RUN_REMEDY = "give the folder that run.dir named"
_OTHER = "other"


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder, or of file.

    Attributes:
        name: short, unique.
        sentence: what a path of this kind is or has, to stand behind the path.
        holds: whether a path is of this kind.
        remedies: what to do, by the purpose of the tool, or ``other``; ``{path}`` stands for the path. The kind serves
            a purpose that has no entry.
    """

    name: str
    sentence: str
    holds: Callable[[Path], bool]
    remedies: dict[str, str]


def newest_iteration(path: Path) -> Path | None:
    """Return the folder of a checkpoint of Megatron-LM or Megatron-Bridge: ``path``, or its newest iteration.

    Returns:
        None where ``path`` is no such checkpoint.
    """
    if _is_iteration(path):
        return path
    folders = [folder for folder in _entries(path) if _ITERATION.fullmatch(folder.name) and _is_iteration(folder)]
    for folder in folders:
        if folder.name == tracked_iteration(path):
            return folder
    # Weights without an iteration come before those of any.
    return max(folders, key=lambda folder: (folder.name != "release", folder.name), default=None)


def tracked_iteration(path: Path) -> str | None:
    """Return the name of the folder that the tracker of a checkpoint names; None without a tracker."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip()[:20]
    return f"iter_{int(text):07d}" if text.isdecimal() else text


def kind_of(path: Path) -> FolderKind | None:
    """Return the kind of a path, None where it is of none that is known."""
    return next((kind for kind in KINDS if kind.holds(path)), None)


def describe_folder(path: str | Path, purpose: Purpose) -> str | None:
    """Return one sentence on what a path is and the command that is right, where it does not serve a tool's purpose.

    Returns:
        None where the path serves the purpose or is of no kind that is known.
    """
    path = Path(path)
    kind = kind_of(path)
    if kind is None:
        return None
    remedy = kind.remedies.get(purpose)
    if remedy is None and purpose == "run":
        remedy = _RUN_REMEDY if kind is not _RUN else None
    elif remedy is None and _OTHER in kind.remedies:
        remedy = kind.remedies[_OTHER]
    if remedy is None:
        return None
    return f"{path} {kind.sentence}; {remedy.format(path=path, newest=_newest_step(path), run=path.parent.parent)}"


def _entries(path: Path) -> list[Path]:
    """Return the entries of a folder; none of what is no folder or cannot be read."""
    try:
        return list(path.iterdir())
    except OSError:
        return []


def _has(path: Path, *patterns: str) -> bool:
    return any(next(path.glob(pattern), None) is not None for pattern in patterns)


def _is_iteration(path: Path) -> bool:
    if _has(path, "mp_rank_*/model_optim_rng.pt"):
        return True
    return (path / "metadata.json").is_file() and _has(path, ".metadata", "common.pt", "*.distcp")


def _newest_step(path: Path) -> str:
    steps = sorted(path.glob("checkpoints/step_*")) or sorted(path.glob("step_*"))
    return str(steps[-1]) if steps else f"{path}/checkpoints/step_N"


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file() and not _has(path, "manifest.json", "config.json", "adapter_config.json")


def _is_checkpoints(path: Path) -> bool:
    return _has(path, "step_*/manifest.json")


def _is_checkpoint(path: Path) -> bool:
    return (path / "manifest.json").is_file() and not (path / "config.json").exists()


def _is_adapter(path: Path) -> bool:
    has_weights = (path / "model.safetensors").exists() or (path / "model.safetensors.index.json").exists()
    return _has(path, "adapter_config.json", "adapter_model.safetensors") and not has_weights


def _is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() and _has(path, "*.safetensors")


def _is_deepspeed(path: Path) -> bool:
    states = "*_model_states.pt"
    return _has(path, "zero_to_fp32.py", "*zero_pp_rank_*_optim_states.pt", states, f"global_step*/{states}")


def _is_verl(path: Path) -> bool:
    shards = "model_world_size_*_rank_*.pt"
    return _has(path, shards, f"actor/{shards}", f"global_step_*/actor/{shards}")


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" or _has(path, "*.gguf")


_RUN = FolderKind(
    "run",
    "is a run folder",
    _is_run,
    {
        "model": "give one of its checkpoints, {newest}",
        "checkpoint": "give one of its checkpoints, {newest}",
        "megatron": "its checkpoints need no conversion: give {newest} to the command that is to read it",
    },
)
_CHECKPOINTS = FolderKind(
    "checkpoints",
    "holds the checkpoints of a run",
    _is_checkpoints,
    {
        "model": "give one of them, {newest}",
        "checkpoint": "give one of them, {newest}",
        "megatron": "they need no conversion: give {newest} to the command that is to read it",
    },
)
_CHECKPOINT = FolderKind(
    "checkpoint",
    "is a checkpoint of this program",
    _is_checkpoint,
    {
        "run": "give the folder of its run, {run}",
        "megatron": "it needs no conversion: give it to the command that is to read it",
    },
)
ADAPTER = FolderKind(
    "adapter",
    "holds a LoRA adapter and no model",
    _is_adapter,
    {
        _OTHER: "merge it into its model, with `ovr convert to-hf --merge` if it is of a checkpoint of ours and else "
        "by PEFT's merge_and_unload, and give that folder"
    },
)
_HUGGING_FACE = FolderKind(
    "Hugging Face",
    "is a Hugging Face folder",
    _is_hugging_face,
    {
        "checkpoint": "make a checkpoint of it: ovr convert from-hf --hf {path} --out CKPT",
        "megatron": "make a checkpoint of it: ovr convert from-hf --hf {path} --out CKPT",
    },
)
_MEGATRON = FolderKind(
    "Megatron",
    "is a checkpoint of Megatron-LM or Megatron-Bridge",
    lambda path: newest_iteration(path) is not None,
    {
        "model": "convert it: ovr convert from-megatron --megatron {path} --hf DIR --out CKPT",
        "checkpoint": "convert it: ovr convert from-megatron --megatron {path} --hf DIR --out CKPT",
    },
)
_DEEPSPEED = FolderKind(
    "DeepSpeed",
    "is a checkpoint of DeepSpeed (ZeRO)",
    _is_deepspeed,
    {
        _OTHER: "write its weights by DeepSpeed's own script, python zero_to_fp32.py {path} DIR --safe_serialization, "
        "copy config.json and the tokenizer beside them, and give DIR"
    },
)
_VERL = FolderKind(
    "verl",
    "is a checkpoint of verl (FSDP)",
    _is_verl,
    {
        _OTHER: "merge its shards by verl, python -m verl.model_merger merge --backend fsdp --local_dir ACTOR "
        "--target_dir DIR with the folder of model_world_size_*.pt as ACTOR, and give DIR"
    },
)
_DCP = FolderKind(
    "torch.distributed.checkpoint",
    "is a checkpoint of torch.distributed.checkpoint, not of Megatron-Core",
    lambda path: (path / ".metadata").is_file() and _has(path, "*.distcp"),
    {_OTHER: "export it as a Hugging Face folder with the program that wrote it, and give that"},
)
_GGUF = FolderKind(
    "GGUF",
    "holds weights for llama.cpp (GGUF)",
    _is_gguf,
    {_OTHER: "give the Hugging Face folder that they were made from"},
)
_PICKLE = FolderKind(
    "pickle",
    "has weights as pickle (.bin) and no safetensors weights",
    lambda path: _has(path, "pytorch_model*.bin", "*.bin"),
    {_OTHER: "save it as safetensors: load it with Transformers and call save_pretrained(DIR)"},
)
_FILE = FolderKind(
    "file",
    "is a file",
    lambda path: path.is_file(),
    {_OTHER: "give the folder that it lies in"},
)
# The first that holds: a whole model comes before what else its folder has, but a run's own file before all.
KINDS = (
    *(_CHECKPOINT, _RUN, _CHECKPOINTS, _GGUF, ADAPTER, _HUGGING_FACE),
    *(_MEGATRON, _VERL, _DEEPSPEED, _DCP, _PICKLE, _FILE),
)
