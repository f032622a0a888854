"""Checkpoints of Megatron-Core itself become ours bit for bit, and Megatron-Core loads what is written for it."""

import json
import os
import pickle
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.cli import main
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.weights.folder import WeightError
from ovr_megatron.weights.rank_files import RankFiles
from ovr_megatron.weights.torch_dist import TorchDistFolder, read_index

pytestmark = pytest.mark.both_cores

ROOT = Path(__file__).resolve().parents[2]
SIZES = TinySizes(hidden=64, layers=4, ffn=96, vision_hidden=32, vision_heads=2, vision_ffn=32, vision_depth=1)


@pytest.fixture(scope="module")
def written(loaded_python: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model, our two forms of it for Megatron, and Megatron's own four."""
    root = tmp_path_factory.mktemp("megatron")
    hf = make_tiny_model(root / "hf", tied=False, seed=3, sizes=SIZES, perturb=True)
    main(["convert", "from-hf", "--hf", str(hf), "--out", str(root / "ckpt")])
    bridge, gpt, out = root / "ours/bridge", root / "ours/gpt", root / "theirs"
    for path, words in ((bridge, []), (gpt, ["--text-only"])):
        main(["convert", "to-megatron", "--checkpoint", str(root / "ckpt"), "--out", str(path), *words])
    launch(loaded_python, "save", hf, out)
    return SimpleNamespace(hf=hf, out=out, bridge=bridge, gpt=gpt)


def launch(python: Path, *arguments: str | Path) -> str:
    """Run two ranks of Megatron-Core; return what they print."""
    command = [python, "-m", "ovr_megatron.torchrun", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "tests/checkpoint/megatron_ranks.py"
    done = subprocess.run([*command, script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def convert(megatron: Path, hf: Path, out: Path, *words: str) -> Path:
    main(["convert", "from-megatron", "--megatron", str(megatron), "--hf", str(hf), "--out", str(out), *words])
    return out / "policy"


def assert_equal(folder: Path, hf: Path) -> None:
    """Transformers loads the same bits from both."""
    ours, theirs = (Qwen2_5_VLForConditionalGeneration.from_pretrained(path).state_dict() for path in (folder, hf))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_megatron_core_loads_what_is_written(loaded_python: Path, written: SimpleNamespace) -> None:
    """Two ranks of tensor parallelism with a tower, and two stages of a pipeline without."""
    differing = launch(loaded_python, "load", written.hf, written.bridge, written.gpt)
    assert json.loads(differing.splitlines()[-1]) == [{"bridge": [], "gpt": []}] * 2


@pytest.mark.parametrize("name", ["bridge", "gpt", "stages", "ranks"])
def test_a_checkpoint_of_megatron_core_becomes_ours(written: SimpleNamespace, name: str, tmp_path: Path) -> None:
    """Layers stacked and a tower; layers apart, gate and up apart; files of two stages; files of two tensor ranks."""
    words = [] if name in ("bridge", "ranks") else ["--text-only"]
    assert_equal(convert(written.out / name, written.hf, tmp_path / "ckpt", *words), written.hf)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    with pytest.raises(SystemExit) as error:
        main([str(word) for word in words])
    assert error.value.code == 2
    return capsys.readouterr().err


def test_a_language_model_alone_asks_for_a_tower(
    written: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("convert", "from-megatron", "--hf", written.hf, "--out", tmp_path / "ckpt", "--megatron")
    assert "with --text-only the tower is that of --hf" in refused(capsys, *command, written.out / "gpt")
    assert "leave out --text-only" in refused(capsys, *command, written.out / "bridge", "--text-only")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("name", ["bridge", "gpt", "stages", "ranks"])
def test_a_model_of_other_sizes_is_refused(
    written: SimpleNamespace, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"ffn": TinySizes(**{**vars(SIZES), "ffn": 128}), "layers": TinySizes(**{**vars(SIZES), "layers": 3})}
    words = [] if name in ("bridge", "ranks") else ["--text-only"]
    for field, other in sizes.items():
        hf = make_tiny_model(tmp_path / field, tied=False, sizes=other)
        path = written.out / name
        error = refused(
            capsys, "convert", "from-megatron", "--megatron", path, "--hf", hf, "--out", tmp_path / "c", *words
        )
        assert "do not belong together" in error


class Touch:
    """A pickle that makes a file when it is loaded without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_no_foreign_pickle_is_run(written: SimpleNamespace, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps({"state_dict_metadata": Touch(mark)}))
    with pytest.raises(WeightError, match=r"it names posix\.mkdir"):
        read_index(tmp_path)
    rank = tmp_path / "mp_rank_00"
    rank.mkdir()
    torch.save({"model": {"a": torch.zeros(1)}, "args": Touch(mark)}, rank / "model_optim_rng.pt")
    with pytest.raises(WeightError, match=r"asks for .*mkdir to be run"):
        RankFiles(tmp_path)
    assert not mark.exists()
    pickle.loads(index.read_bytes())
    assert mark.exists(), "the pickle must be one that does something"


def test_an_index_cannot_name_a_file_elsewhere(written: SimpleNamespace, tmp_path: Path) -> None:
    iteration = written.out / "bridge/iter_0000010"
    for path in iteration.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = pickle.loads((tmp_path / ".metadata").read_bytes())
    for stored in index.storage_data.values():
        stored.relative_path = f"../{iteration.name}/{stored.relative_path}"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    folder = TorchDistFolder(tmp_path)
    with pytest.raises(WeightError, match="which is no file of the folder"):
        folder.shards("language_model.decoder.final_layernorm.weight")


def test_a_damaged_chunk_is_named(written: SimpleNamespace, tmp_path: Path) -> None:
    for path in (written.out / "bridge/iter_0000010").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 200 if path.suffix == ".distcp" else None])
    with pytest.raises(WeightError, match=r"linear_fc2.weight is damaged or cut off"):
        TorchDistFolder(tmp_path).shards("language_model.decoder.layers.mlp.linear_fc2.weight", 3)


def test_a_tied_model_in_bfloat16_goes_there_and_back(tmp_path: Path) -> None:
    hf = make_tiny_model(tmp_path / "hf", tied=True, seed=5, sizes=SIZES, perturb=True, dtype=torch.bfloat16)
    main(["convert", "from-hf", "--hf", str(hf), "--out", str(tmp_path / "a")])
    main(["convert", "to-megatron", "--checkpoint", str(tmp_path / "a"), "--out", str(tmp_path / "m")])
    # The folder itself, and its iteration.
    for name, path in (("b", tmp_path / "m"), ("c", tmp_path / "m/release")):
        folder = convert(path, hf, tmp_path / name)
        for file in ("model.safetensors", "config.json"):
            assert (folder / file).read_bytes() == (tmp_path / "a/policy" / file).read_bytes()


def test_a_family_without_known_names_of_its_tower_goes_as_a_language_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_tiny_model(tmp_path / "hf", tied=False, seed=3, sizes=SIZES, perturb=True, family="qwen3_vl")
    main(["convert", "from-hf", "--hf", str(hf), "--out", str(tmp_path / "ckpt")])
    command = ["convert", "to-megatron", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "megatron"]
    assert "the names that Megatron-Bridge gives its vision tower are not known here" in refused(capsys, *command)
    main([*map(str, command), "--text-only"])
    metadata = read_index(tmp_path / "megatron/release").state_dict_metadata
    for norm in ("q_layernorm", "k_layernorm"):  # Transformer Engine asks for the state of each of its modules
        assert f"decoder.layers.self_attention.{norm}._extra_state/shard_0_{SIZES.layers}" in metadata
    policy = convert(tmp_path / "megatron", hf, tmp_path / "again", "--text-only")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (policy, hf))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
