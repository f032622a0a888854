"""Reading and writing safetensors folders, with the safetensors library itself as the other side."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovr_megatron.data.hf_files import AssetError
from ovr_megatron.weights.folder import WeightError, WeightFolder, WeightWriter, copy_hf_assets

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    formats = [torch.float32, torch.bfloat16, torch.float16]
    named = {f"model.layers.{i}.x": torch.randn(8, 4, generator=generator).to(dtype) for i, dtype in enumerate(formats)}
    named["visual.nan"] = torch.tensor([float("nan"), -0.0, 0.0, float("inf")])
    return named


def write(directory, tensors, shard_bytes=1 << 30):
    with WeightWriter(directory, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def bits(tensors):
    return {
        name: (tensor.dtype, tuple(tensor.shape), bytes(tensor.view(torch.uint8).flatten().tolist()))
        for name, tensor in tensors.items()
    }


def test_one_shard_has_no_index(tmp_path, tensors):
    write(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert bits(load_file(tmp_path / "model.safetensors")) == bits(tensors)


def test_a_shard_has_the_bytes_that_the_library_writes(tmp_path, tensors):
    tensors |= {"b.number": torch.tensor(3), "a.flags": torch.tensor([True, False, True]), "ä": torch.ones(3).double()}
    tensors["model.layers.0.odd"] = torch.arange(3).bfloat16()
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_and_index(tmp_path, tensors):
    write(tmp_path, tensors, shard_bytes=150)
    index = json.loads((tmp_path / INDEX).read_text())
    assert list(index["weight_map"]) == list(tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX]
    for file in files:
        held = load_file(tmp_path / file)
        assert bits(held) == bits({name: tensors[name] for name, at in index["weight_map"].items() if at == file})
        assert sum(tensor.nbytes for tensor in held.values()) <= 150


def test_views_of_one_storage_are_written_as_their_own_tensors(tmp_path):
    gate_up = torch.arange(24.0).view(6, 4)
    gate, up = gate_up.chunk(2)
    write(tmp_path, {"gate": gate, "up": up, "turned": gate_up.T})
    assert bits(load_file(tmp_path / "model.safetensors")) == bits(
        {"gate": gate, "up": up, "turned": gate_up.T.contiguous()}
    )


@pytest.mark.parametrize("shard_bytes", [1, 150, 1 << 30])
def test_reads_back_what_it_wrote(tmp_path, tensors, shard_bytes):
    write(tmp_path, tensors, shard_bytes)
    with WeightFolder(tmp_path) as folder:
        assert sorted(folder.names()) == sorted(tensors)
        assert bits({name: folder.tensor(name) for name in folder.names()}) == bits(tensors)
        assert folder.shape("model.layers.0.x") == (8, 4)
        assert [folder.dtype(f"model.layers.{i}.x") for i in range(3)] == ["F32", "BF16", "F16"]
        assert "visual.nan" in folder and "visual.none" not in folder


def test_reads_the_names_of_transformers_5(tmp_path):
    save_file(
        {"model.visual.a": torch.ones(1), "model.language_model.b": torch.ones(2)}, tmp_path / "model.safetensors"
    )
    with WeightFolder(tmp_path) as folder:
        assert sorted(folder.names()) == ["model.b", "visual.a"]
        assert folder.tensor("model.b").shape == (2,)


def test_both_names_of_one_tensor_are_refused(tmp_path):
    save_file({"model.visual.a": torch.ones(1), "visual.a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightError, match=r"visual\.a is stored a second time"):
        WeightFolder(tmp_path)


def test_interrupted_write_leaves_nothing_that_looks_whole(tmp_path, tensors):
    with pytest.raises(KeyboardInterrupt), WeightWriter(tmp_path, shard_bytes=1) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_killed_write_is_refused_and_can_be_done_again(tmp_path, tensors):
    writer = WeightWriter(tmp_path, shard_bytes=1)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    del writer  # no end of the block: as after a kill
    assert all(path.name.endswith(".partial") for path in tmp_path.iterdir())
    with pytest.raises(WeightError, match="no safetensors weights"):
        WeightFolder(tmp_path)
    write(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_are_not_written_over_weights(tmp_path, tensors):
    write(tmp_path, tensors)
    with pytest.raises(WeightError, match="has weights already"):
        WeightWriter(tmp_path)


def test_a_name_twice_is_refused(tmp_path):
    with pytest.raises(WeightError, match=r"a\.weight is written twice"):
        write_twice(tmp_path)


def write_twice(directory):
    with WeightWriter(directory, shard_bytes=1) as writer:
        for _ in range(2):
            writer.add("a.weight", torch.ones(3))


def sharded(directory, tensors):
    write(directory, tensors, shard_bytes=150)
    return directory / "model-00002-of-00002.safetensors"


def test_missing_shard(tmp_path, tensors):
    sharded(tmp_path, tensors).unlink()
    with pytest.raises(
        WeightError, match=r"model-00002-of-00002\.safetensors is missing, but model\.safetensors\.index"
    ):
        WeightFolder(tmp_path)


def test_cut_off_shard(tmp_path, tensors):
    shard = sharded(tmp_path, tensors)
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(WeightError, match=r"model-00002-of-00002\.safetensors is damaged or cut off"):
        WeightFolder(tmp_path)


def test_shard_without_a_tensor_that_the_index_names(tmp_path, tensors):
    save_file({"other": torch.ones(1)}, sharded(tmp_path, tensors))
    with pytest.raises(
        WeightError, match=r"00002-of-00002\.safetensors: lacks .*which model\.safetensors\.index\.json"
    ):
        WeightFolder(tmp_path)


def test_missing_index(tmp_path, tensors):
    sharded(tmp_path, tensors)
    (tmp_path / INDEX).unlink()
    with pytest.raises(WeightError, match=r"has model-00001.*but no model\.safetensors\.index\.json"):
        WeightFolder(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_broken_index(tmp_path, tensors, text):
    sharded(tmp_path, tensors)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightError, match=r"index\.json is not a safetensors index"):
        WeightFolder(tmp_path)


def test_index_that_points_outside(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(WeightError, match="points outside the folder"):
        WeightFolder(tmp_path)


def test_folder_without_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightError, match="no safetensors weights"):
        WeightFolder(tmp_path)


def test_unknown_tensor(tmp_path, tensors):
    write(tmp_path, tensors)
    with WeightFolder(tmp_path) as folder, pytest.raises(WeightError, match=r"no tensor model\.layers\.9\.x"):
        folder.tensor("model.layers.9.x")


def test_only_known_hf_assets_are_copied(tmp_path):
    source, out = tmp_path / "a", tmp_path / "b"
    kept = ["config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE"]
    left = [INDEX, "pytorch_model.bin", ".git/HEAD", "extra/x.txt", "modeling.py", "training_args.bin", ".env"]
    for name in [*kept, *left, "model.safetensors", "id_rsa", "config.json.bak", "model-00001.partial"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(f"{name} é")
    assert sorted(copy_hf_assets(source, out)) == sorted(kept)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(kept)
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in kept)


@pytest.mark.parametrize("name", ["merges.txt", "config.json", "README.md"])
def test_a_link_that_leaves_the_folder_is_not_copied(tmp_path, name):
    source = tmp_path / "a"
    source.mkdir()
    (tmp_path / "secret").write_text("key")
    (source / name).symlink_to("../secret")
    with pytest.raises(AssetError, match=rf"{name} is a link that leaves the folder, to {tmp_path}/secret"):
        copy_hf_assets(source, tmp_path / "b")
    assert list((tmp_path / "b").iterdir()) == []


def test_links_within_the_folder_and_those_of_the_cache_of_hugging_face_are_followed(tmp_path):
    home = tmp_path / "models--Qwen--Qwen2.5-VL-7B-Instruct"
    source = home / "snapshots" / "0a1b"
    source.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "blobs" / "cafe").write_text("blob")
    (source / "vocab.json").symlink_to("../../blobs/cafe")
    (source / "LICENSE").write_text("text")
    (source / "NOTICE").symlink_to("LICENSE")
    (tmp_path / "link").symlink_to(source)
    assert copy_hf_assets(tmp_path / "link", tmp_path / "b") == ["LICENSE", "NOTICE", "vocab.json"]
    assert [(tmp_path / "b" / name).read_text() for name in ("vocab.json", "NOTICE")] == ["blob", "text"]
    (source / "merges.txt").symlink_to("../../refs")
    with pytest.raises(AssetError, match="leaves the folder"):
        copy_hf_assets(source, tmp_path / "c")
    (source / "merges.txt").unlink()
    (source / "merges.txt").symlink_to("nowhere")
    with pytest.raises(AssetError, match="no file"):
        copy_hf_assets(source, tmp_path / "c")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16", "a": 1}, {"torch_dtype": "float32", "a": 1}),
        (
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "b": 2}},
            {"dtype": "float32", "text_config": {"dtype": "float32", "b": 2}},
        ),
        ({"a": {"b": 1}}, {"a": {"b": 1}, "torch_dtype": "float32"}),
    ],
)
def test_the_config_names_the_new_number_format(tmp_path, config, expected):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    copy_hf_assets(tmp_path / "a", tmp_path / "b", torch.float32)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == expected


def test_a_config_that_names_the_format_already_keeps_its_bytes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_bytes(b'{ "torch_dtype":"float32"}')
    copy_hf_assets(tmp_path / "a", tmp_path / "b", torch.float32)
    assert (tmp_path / "b" / "config.json").read_bytes() == b'{ "torch_dtype":"float32"}'
