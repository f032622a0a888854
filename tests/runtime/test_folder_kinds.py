"""Every kind of folder given to every kind of tool: its name and the right command in one sentence, or no complaint."""

import json
from pathlib import Path

import pytest

from ovr_megatron.analysis.experiment import ExperimentError, read_experiment
from ovr_megatron.checkpoint.manifest import CheckpointError, read_manifest
from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.errors import UserError
from ovr_megatron.families import ModelShape
from ovr_megatron.replay import load
from ovr_megatron.runtime.folder_kinds import KINDS, describe_folder, kind_of, newest_iteration
from ovr_megatron.weights.folder import WeightError, WeightFolder
from ovr_megatron.weights.megatron import open_megatron

# Files by kind, as the programs name them; the folder's name is the kind's.
FILES = {
    "run": ["config.yaml", "checkpoints/step_000100/manifest.json", "checkpoints/step_000020/manifest.json"],
    "checkpoints": ["step_000100/manifest.json", "step_000020/manifest.json"],
    "checkpoint": ["manifest.json", "policy/config.json", "policy/model.safetensors"],
    "Hugging Face": ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "trainer.json"],
    "adapter": ["adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"],
    "Megatron": ["latest_checkpointed_iteration.txt", "iter_0000010/metadata.json", "iter_0000010/.metadata"],
    "DeepSpeed": ["latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"],
    "verl": ["model_world_size_8_rank_0.pt", "optim_world_size_8_rank_0.pt", "huggingface/config.json"],
    "torch.distributed.checkpoint": [".metadata", "__0_0.distcp"],
    "GGUF": ["model-Q4_K_M.gguf", "config.json"],
    "pickle": ["config.json", "pytorch_model-00001-of-00002.bin"],
    "file": [],
}
# What each kind of tool answers to each kind of folder; "" where it is the right one, or a tool's own check comes next.
ANSWERS = {
    "model": {
        "run": "give one of its checkpoints, {path}/checkpoints/step_000100",
        "checkpoints": "give one of them, {path}/step_000100",
        "checkpoint": "",
        "Hugging Face": "",
        "adapter": "ovr convert to-hf --merge",
        "Megatron": "ovr convert from-megatron --megatron {path} --hf DIR --out CKPT",
        "DeepSpeed": "python zero_to_fp32.py {path} DIR --safe_serialization",
        "verl": "python -m verl.model_merger merge --backend fsdp",
        "torch.distributed.checkpoint": "with the program that wrote it",
        "GGUF": "the Hugging Face folder that they were made from",
        "pickle": "save_pretrained(DIR)",
        "file": "give the folder that it lies in",
    },
    "checkpoint": {
        "run": "give one of its checkpoints, {path}/checkpoints/step_000100",
        "checkpoints": "give one of them, {path}/step_000100",
        "checkpoint": "",
        "Hugging Face": "ovr convert from-hf --hf {path} --out CKPT",
        "adapter": "ovr convert to-hf --merge",
        "Megatron": "ovr convert from-megatron --megatron {path} --hf DIR --out CKPT",
        "DeepSpeed": "python zero_to_fp32.py {path} DIR --safe_serialization",
        "verl": "python -m verl.model_merger merge --backend fsdp",
        "torch.distributed.checkpoint": "with the program that wrote it",
        "GGUF": "the Hugging Face folder that they were made from",
        "pickle": "save_pretrained(DIR)",
        "file": "give the folder that it lies in",
    },
    "run": {
        "run": "",
        "checkpoints": "give the folder that run.dir named",
        "checkpoint": "give the folder of its run",
        "Hugging Face": "give the folder that run.dir named",
        "adapter": "give the folder that run.dir named",
        "Megatron": "give the folder that run.dir named",
        "DeepSpeed": "give the folder that run.dir named",
        "verl": "give the folder that run.dir named",
        "torch.distributed.checkpoint": "give the folder that run.dir named",
        "GGUF": "give the folder that run.dir named",
        "pickle": "give the folder that run.dir named",
        "file": "give the folder that run.dir named",
    },
    "megatron": {
        "run": "its checkpoints need no conversion: give {path}/checkpoints/step_000100",
        "checkpoints": "they need no conversion: give {path}/step_000100",
        "checkpoint": "it needs no conversion",
        "Hugging Face": "ovr convert from-hf --hf {path} --out CKPT",
        "adapter": "ovr convert to-hf --merge",
        "Megatron": "",
        "DeepSpeed": "python zero_to_fp32.py {path} DIR --safe_serialization",
        "verl": "python -m verl.model_merger merge --backend fsdp",
        "torch.distributed.checkpoint": "with the program that wrote it",
        "GGUF": "the Hugging Face folder that they were made from",
        "pickle": "save_pretrained(DIR)",
        "file": "give the folder that it lies in",
    },
}


def read_model(path: Path) -> None:
    """What every command does with a model's folder first."""
    folder = weights_of(path)
    ModelShape.from_hf(folder)
    WeightFolder(folder)


TOOLS = {
    "model": [read_model],
    "checkpoint": [read_manifest],
    "run": [read_experiment, lambda path: load(path, [])],
    "megatron": [open_megatron],
}


@pytest.fixture
def make(tmp_path: Path, tiny: Path):
    def make(kind: str) -> Path:
        path = tmp_path / kind
        if kind == "file":
            path.write_bytes(b"")
        for name in FILES[kind]:
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes((tiny / name).read_bytes() if name in ("config.json", "policy/config.json") else b"")
        if kind == "Megatron":
            (path / "latest_checkpointed_iteration.txt").write_text("10\n")
        return path

    return make


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real ``config.json``: what comes after it is to be judged."""
    from ovr_megatron.model.tiny import make_tiny_model

    folder = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    (folder / "policy").mkdir()
    (folder / "policy/config.json").write_bytes((folder / "config.json").read_bytes())
    return folder


def test_the_table_is_whole() -> None:
    names = {kind.name for kind in KINDS}
    assert names == FILES.keys()
    assert all(answers.keys() == names for answers in ANSWERS.values())


@pytest.mark.parametrize("kind", FILES)
def test_each_tool_names_the_kind_and_the_command(kind: str, make) -> None:
    path = make(kind)
    found = kind_of(path)
    assert found is not None and found.name == kind
    for wanted, answers in ANSWERS.items():
        answer = answers[kind].format(path=path)
        sentence = describe_folder(path, wanted)  # type: ignore[arg-type]
        if not answer:
            assert sentence is None
            continue
        assert sentence is not None and sentence.startswith(f"{path} {found.sentence}; ") and answer in sentence
        assert "\n" not in sentence and "{" not in sentence
        for tool in TOOLS[wanted]:
            with pytest.raises(UserError) as error:
                tool(path)
            assert str(error.value) == sentence


def test_a_folder_of_no_kind_gets_the_tools_own_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        assert kind_of(path) is None
        with pytest.raises(ExperimentError, match=r"no such folder|neither a run folder"):
            read_experiment(path)
        with pytest.raises(CheckpointError, match="not a checkpoint, or its writing was interrupted"):
            read_manifest(path)


def test_the_newest_iteration_is_the_one_that_the_tracker_names(tmp_path: Path) -> None:
    for name in ("iter_0000010", "iter_0000200", "release"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        (tmp_path / name / "common.pt").write_bytes(b"")
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    for text, name in (
        ("10", "iter_0000010"),
        ("200\n", "iter_0000200"),
        ("release", "release"),
        ("7", "iter_0000200"),
    ):
        tracker.write_text(text)
        assert newest_iteration(tmp_path) == tmp_path / name
    assert newest_iteration(tmp_path / "release") == tmp_path / "release"
    # A name in the tracker leads to no folder elsewhere.
    tracker.write_text("../../etc")
    assert newest_iteration(tmp_path) == tmp_path / "iter_0000200"
    # To convert other weights than the tracker's would be a silent mistake.
    tracker.write_text("7")
    with pytest.raises(WeightError, match=r"iteration.txt names 'iter_0000007', which is not there or not whole"):
        open_megatron(tmp_path)
