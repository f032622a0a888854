"""Checks, copies and comparisons of whole folders, on tiny models."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from ovr_megatron.families import ModelShape
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime.ownership import RECORD, write_record
from ovr_megatron.weights.folder import WeightError, WeightFolder, WeightWriter
from ovr_megatron.weights.table import canonical
from ovr_megatron.weights.transfer import check_weights, copy_weights, differences, same_bits, staged

SIZES = TinySizes(hidden=32, layers=2, ffn=48, vision_hidden=32, vision_heads=2, vision_ffn=40)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    return make_tiny_model(tmp_path / "hf", tied=request.param, sizes=SIZES)


def check_folder(directory, critic=False):
    with WeightFolder(directory) as folder:
        check_weights(folder, ModelShape.from_hf(directory), critic)


def change(directory, function):
    tensors = load_file(directory / "model.safetensors")
    function(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_whole_model_passes(model):
    check_folder(model)


def test_a_critic_has_a_value_head_and_no_output_layer(model):
    with pytest.raises(WeightError, match=r"no tensor value_head\.weight"):
        check_folder(model, critic=True)
    change(model, lambda tensors: tensors.pop("lm_head.weight", None))
    change(model, lambda tensors: tensors.update({"value_head.weight": torch.zeros(1, 32)}))
    check_folder(model, critic=True)
    with pytest.raises(WeightError, match=r"value_head\.weight not in this model|no tensor lm_head\.weight"):
        check_folder(model)


def test_missing_tensor(model):
    change(model, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(WeightError, match=r"no tensor model\.norm\.weight; the folder is not whole"):
        check_folder(model)


def test_unknown_tensor(model):
    change(model, lambda tensors: tensors.update({"visual.blocks.7.norm1.weight": torch.ones(32)}))
    with pytest.raises(WeightError, match=r"visual\.blocks\.7\.norm1\.weight not in this model"):
        check_folder(model)


def test_tensor_of_another_shape_names_both_shapes(model):
    change(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(33)}))
    with pytest.raises(WeightError, match=r"model\.norm\.weight has shape \[33\], config\.json makes it \[32\]"):
        check_folder(model)


def test_quantised_tensor(model):
    change(model, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(WeightError, match=r"model\.norm\.weight is stored as I8"):
        check_folder(model)


def test_weights_of_another_model(model, tmp_path):
    other = make_tiny_model(tmp_path / "other", tied=False, sizes=TinySizes(hidden=64, layers=2, ffn=48))
    (model / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(WeightError, match=r"weights and config\.json do not belong together"):
        check_folder(model)


def test_tied_model_may_store_its_head_if_equal(tmp_path):
    model = make_tiny_model(tmp_path / "hf", tied=True, sizes=SIZES)
    change(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    check_folder(model)
    change(model, lambda tensors: tensors["lm_head.weight"][5, 3].add_(1e-3))
    with pytest.raises(WeightError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check_folder(model)


def test_copy_keeps_bits_and_converts_on_demand(model, tmp_path):
    original = load_file(model / "model.safetensors")
    with WeightFolder(model) as folder:
        copy_weights(folder, tmp_path / "same", ModelShape.from_hf(model))
        shape = ModelShape.from_hf(model)
        copy_weights(folder, tmp_path / "half", shape, torch.bfloat16, leave_out=["model.norm.weight"])
    same, half = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "half"))
    assert same.keys() == original.keys()
    assert all(same_bits(same[name], original[name]) for name in original)
    assert original.keys() - half.keys() == {"model.norm.weight"}
    assert all(same_bits(half[name], original[name].bfloat16()) for name in half)


def test_a_family_s_folders_have_its_published_names_whatever_was_read(tmp_path):
    model = make_tiny_model(tmp_path / "hf", sizes=SIZES, family="qwen3_vl")
    published = load_file(model / "model.safetensors")
    assert "model.language_model.norm.weight" in published and "model.visual.pos_embed.weight" in published
    shape = ModelShape.from_hf(model)
    (tmp_path / "renamed").mkdir()
    renamed = {canonical(name): tensor for name, tensor in published.items()}
    assert not renamed.keys() & published.keys()
    save_file(renamed, tmp_path / "renamed/model.safetensors", metadata={"format": "pt"})
    for source in (model, tmp_path / "renamed"):
        with WeightFolder(source) as folder:
            check_weights(folder, shape)
            copy_weights(folder, tmp_path / f"copy of {source.name}", shape)
        copied = load_file(tmp_path / f"copy of {source.name}" / "model.safetensors")
        assert copied.keys() == published.keys()
        assert all(same_bits(copied[name], published[name]) for name in published)


def folder_bytes(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "converted"])
def test_any_number_of_workers_writes_the_same_bytes(model, tmp_path, dtype):
    shape = ModelShape.from_hf(model)
    with WeightFolder(model) as folder:
        for workers in (1, 2, 5):
            copy_weights(folder, tmp_path / str(workers), shape, dtype, workers=workers, shard_bytes=20_000)
        with WeightWriter(tmp_path / "one by one", shard_bytes=20_000) as writer:
            for name in folder.names():
                writer.add(name, folder.tensor(name).to(dtype or folder.tensor(name).dtype))
    one = folder_bytes(tmp_path / "1")
    assert len(one) > 5
    assert all(folder_bytes(tmp_path / other) == one for other in ("2", "5", "one by one"))


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failing_worker_leaves_nothing(model, tmp_path, monkeypatch, workers):
    with WeightFolder(model) as folder:
        sound = folder.tensor
        monkeypatch.setattr(folder, "tensor", lambda name: sound(name if "layers.1" not in name else "absent"))
        with pytest.raises(WeightError, match="no tensor absent"):
            copy_weights(folder, tmp_path / "out", ModelShape.from_hf(model), workers=workers, shard_bytes=20_000)
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_is_full_names_the_file_and_leaves_nothing(model, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with WeightFolder(model) as folder, pytest.raises(OSError, match=r"out/model-00001\.partial"):
            copy_weights(folder, tmp_path / "out", ModelShape.from_hf(model))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").iterdir())


def test_same_bits_tells_zeros_apart_and_takes_equal_nans():
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(2), torch.zeros(2).int())


def test_differences_name_each_tensor_and_file(model, tmp_path):
    tied = ModelShape.from_hf(model).tied
    other = make_tiny_model(tmp_path / "other", tied=tied, sizes=SIZES)
    assert differences(model, other) == []
    change(other, lambda tensors: tensors["model.norm.weight"][3].add_(0.25))
    change(other, lambda tensors: tensors.update({"extra": torch.ones(1)}))
    change(other, lambda tensors: tensors.update({"visual.merger.ln_q.weight": torch.ones(32).bfloat16()}))
    (other / "merges.txt").write_text("")
    (other / "vocab.json").unlink()
    assert differences(model, other) == [
        f"extra: only in {other}",
        "model.norm.weight: 1 of 32 values differ, by up to 0.25",
        "visual.merger.ln_q.weight: torch.float32 [32] against torch.bfloat16 [32]",
        "merges.txt: the files differ",
        f"vocab.json: only in {model}",
    ]
    assert len(differences(model, other, ignore=["extra", "vocab.json"])) == 3


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("bit", "gap"), [(0, "1.19e-07"), (31, "2"), (30, "inf")])
def test_differences_find_one_bit(model, tmp_path, workers, bit, gap):
    other = make_tiny_model(tmp_path / "other", tied=ModelShape.from_hf(model).tied, sizes=SIZES)
    change(
        other, lambda tensors: tensors["model.norm.weight"].view(torch.uint8)[28 + bit // 8].bitwise_xor_(1 << bit % 8)
    )
    assert differences(model, other, workers=workers) == [f"model.norm.weight: 1 of 32 values differ, by up to {gap}"]


def test_differences_allow_a_head_on_one_side_only_when_tied(model, tmp_path):
    tied = ModelShape.from_hf(model).tied
    other = make_tiny_model(tmp_path / "other", tied=tied, sizes=SIZES)
    change(other, lambda tensors: tensors.pop("lm_head.weight", None))
    change(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert differences(model, other) == ([] if tied else [f"lm_head.weight: only in {model}"])


def test_staged_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out, []) as partial:
        (partial / "config.json").write_text("1")
        assert not out.exists()
    assert (out / "config.json").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "second", []) as partial:
        (partial / "config.json").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_staged_replaces_only_a_model_and_only_on_demand(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    for replace, message in ((False, "not empty.*--force"), (True, "was not written by these tools")):
        with pytest.raises(WeightError, match=message), staged(out, [], replace):
            pass
    (out / "thesis.tex").unlink()
    for content in ("old", "new"):
        with staged(out, [], replace=True) as partial:
            (partial / "config.json").write_text(content)
    assert (out / "config.json").read_text() == "new"
    assert sorted(path.name for path in out.iterdir()) == [RECORD, "config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_staged_failure_keeps_what_was_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    write_record(out)
    with pytest.raises(RuntimeError), staged(out, [], replace=True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "old"


def test_staged_killed_between_the_two_names_gives_the_old_folder_back(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "config.json").write_text("old")
    write_record(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(WeightError, match=r"--force"), staged(tmp_path / "out", []):
        pass
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    with staged(tmp_path / "out", [], replace=True) as partial:
        (partial / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", ["a", "a/b", "."])
def test_staged_never_touches_its_source(tmp_path, out):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({}))
    with pytest.raises(WeightError, match="lie in each other"), staged(tmp_path / out, [tmp_path / "a"], True):
        pass
