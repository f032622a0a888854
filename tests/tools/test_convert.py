"""The command lines: Hugging Face -> checkpoint -> Hugging Face, with Transformers as the reader."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from ovr_megatron.checkpoint.manifest import check, write_manifest
from ovr_megatron.families import ModelShape, families
from ovr_megatron.families.presets import presets
from ovr_megatron.families.yarn import Yarn
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.runtime.ownership import RECORD

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZES = TinySizes(hidden=32, layers=2, ffn=48, vision_hidden=32, vision_heads=2, vision_ffn=40)


def run(tool, *arguments):
    """Exit code of a command line."""
    main = runpy.run_path(str(TOOLS / f"{tool}.py"))["main"]
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(params=[(True, torch.float32), (False, torch.bfloat16)], ids=["tied", "untied-bf16"])
def hf(request, tmp_path):
    tied, dtype = request.param
    return make_tiny_model(tmp_path / "hf", tied=tied, dtype=dtype, sizes=SIZES, perturb=True)


@pytest.fixture
def checkpoint(hf, tmp_path):
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "ckpt") == 0
    return tmp_path / "ckpt"


def raw_bytes(directory):
    """Header-free content of every file: the tensors' bytes by name, and the other files' bytes."""
    names = [path for path in directory.iterdir() if path.suffix != ".safetensors" and path.name != RECORD]
    found = {path.name: path.read_bytes() for path in names}
    for path in directory.glob("*.safetensors"):
        found |= {
            name: (str(t.dtype), t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in load_file(path).items()
        }
    return found


def test_round_trip_keeps_every_bit_and_every_file(hf, checkpoint, tmp_path):
    assert check(checkpoint).step == 0
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back", "--verify", hf) == 0
    assert raw_bytes(tmp_path / "back") == raw_bytes(hf)


STRUCTURE = {"depth", "deepstack_visual_indexes", "fullatt_block_indexes", "num_hidden_layers", "tie_word_embeddings"}


def copy_structure(config, published):
    """Give a small model's ``config`` the number and the kinds of layers of a published one."""
    for key, value in published.items():
        if key in ("text_config", "vision_config"):
            copy_structure(config[key], value)
        elif key in STRUCTURE and key in config:
            config[key] = value


@pytest.mark.parametrize("preset", presets())
def test_round_trip_of_every_published_structure(preset, tmp_path):
    published = presets()[preset]
    hf = tmp_path / "hf"
    (family,) = (family for family in families() if preset in family.presets)
    make_tiny_model(hf, tied=bool(published["tie_word_embeddings"]), sizes=SIZES, family=family.name)
    config = json.loads((hf / "config.json").read_text())
    copy_structure(config, published)
    (hf / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    family.load_hf_class()(AutoConfig.from_pretrained(hf)).save_pretrained(hf)
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "ckpt") == 0
    assert run("convert_to_hf", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "back", "--verify", hf) == 0
    assert raw_bytes(tmp_path / "back") == raw_bytes(hf)
    layers = {name.split("layers.")[1].split(".")[0] for name in raw_bytes(hf) if "layers." in name}
    assert len(layers) == published.get("text_config", published)["num_hidden_layers"]


def test_round_trip_of_a_tied_model_that_stores_its_head(tmp_path):
    hf = make_tiny_model(tmp_path / "hf", tied=True, sizes=SIZES)
    tensors = load_file(hf / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, hf / "model.safetensors")
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "ckpt") == 0
    assert run("convert_to_hf", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "back", "--verify", hf) == 0
    assert raw_bytes(tmp_path / "back") == raw_bytes(hf)


def test_transformers_loads_the_export_without_a_missing_or_unknown_tensor(hf, checkpoint, tmp_path):
    run("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back")
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values()), info
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(hf)
    for name, parameter in original.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name]), name
    assert AutoProcessor.from_pretrained(tmp_path / "back").tokenizer.chat_template


def test_a_folder_saved_by_transformers_is_read_in_either_generation_of_names(hf, tmp_path):
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(hf, dtype=torch.float32)
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    AutoProcessor.from_pretrained(hf).save_pretrained(tmp_path / "saved")
    renamed = tmp_path / "renamed"
    shutil.copytree(hf, renamed)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert "model.language_model.norm.weight" in tensors
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight")
    save_file(tensors, renamed / "model.safetensors", metadata={"format": "pt"})
    for number, source in enumerate((tmp_path / "saved", renamed)):
        ckpt, back = tmp_path / f"ckpt{number}", tmp_path / f"back{number}"
        assert run("convert_from_hf", "--hf", source, "--out", ckpt) == 0
        assert run("convert_to_hf", "--checkpoint", ckpt, "--out", back, "--verify", source) == 0
        names = load_file(back / "model.safetensors")
        assert all(
            name.startswith(("visual.", "model.layers.", "model.embed", "model.norm", "lm_head")) for name in names
        )


def test_yarn_is_written_at_import_and_comes_out_of_the_export(hf, tmp_path, capsys):
    ckpt, back = tmp_path / "ckpt", tmp_path / "back"
    assert run("convert_from_hf", "--hf", hf, "--out", ckpt, "--yarn", "2.5") == 0
    assert "YaRN: 10,240 positions in config.json, 2.5 times 4,096" in capsys.readouterr().out
    assert run("convert_to_hf", "--checkpoint", ckpt, "--out", back, "--verify", hf) == 1
    assert "config.json: the files differ\n1 differences" in capsys.readouterr().out
    assert (back / "config.json").read_bytes() == (ckpt / "policy" / "config.json").read_bytes()
    assert ModelShape.from_hf(back).yarn == Yarn(2.5, 4096, pytest.approx(1.0916, abs=1e-4))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(back)
    assert model.config.text_config.rope_parameters["rope_type"] == "yarn"
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "same", "--yarn", "1") == 2
    assert "--yarn 1 gives no more positions" in capsys.readouterr().err
    assert not (tmp_path / "same").exists()


def test_verify_exits_1_and_names_the_difference(hf, checkpoint, tmp_path, capsys):
    tensors = load_file(hf / "model.safetensors")
    tensors["visual.merger.ln_q.weight"][2] += 0.5
    save_file(tensors, hf / "model.safetensors")
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back", "--verify", hf) == 1
    assert "differs: visual.merger.ln_q.weight" in capsys.readouterr().out


def test_verify_finds_one_flipped_bit_whatever_the_workers(hf, checkpoint, tmp_path, capsys):
    path = hf / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last tensor of the file
    path.write_bytes(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    last = max((entry["data_offsets"][1], name) for name, entry in header.items() if name != "__metadata__")[1]
    exporting = ("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back", "--verify", hf, "--force")
    for workers in (1, 3):
        assert run(*exporting, "--workers", workers) == 1
        said = capsys.readouterr().out
        assert f"differs: {last}: 1 of " in said
        assert f"1 differences from {hf}" in said


def test_workers_are_at_least_one(hf, tmp_path, capsys):
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "ckpt", "--workers", 0) == 2
    assert "--workers: '0' is not a whole number of at least 1" in capsys.readouterr().err
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "ckpt", "--workers", 3) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_number_format(hf, checkpoint, tmp_path, dtype):
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back", "--dtype", dtype) == 0
    expected, original = getattr(torch, dtype), load_file(hf / "model.safetensors")
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        assert torch.equal(tensor, original[name].to(expected)) and tensor.dtype == expected
    assert Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "back").dtype == expected


def test_export_of_what_was_trained_samples_what_was_trained(checkpoint, tmp_path):
    base = json.dumps({"temperature": 0.1, "top_k": 1, "repetition_penalty": 1.05})
    (checkpoint / "policy" / "generation_config.json").write_text(base)
    write_manifest(checkpoint, 12)
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back") == 0
    found = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    expected = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    assert found | expected == found
    assert (tmp_path / "back" / "generation_config.base.json").read_text() == base


def test_critic_export_says_what_it_leaves_out(hf, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint / "policy", checkpoint / "critic")
    tensors = load_file(checkpoint / "critic" / "model.safetensors")
    tied = tensors.pop("lm_head.weight", None) is None
    save_file(
        {**tensors, "value_head.weight": torch.ones(1, SIZES.hidden)},
        checkpoint / "critic" / "model.safetensors",
        metadata={"format": "pt"},
    )
    (checkpoint / "optimizer-critic").mkdir()
    (checkpoint / "optimizer-critic" / "state").touch()
    write_manifest(checkpoint, 12)
    back = tmp_path / "back"
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", back, "--critic", "--verify", hf) == 1
    said = capsys.readouterr().out
    assert {line for line in said.splitlines() if line.startswith("differs: ")} == {
        "differs: generation_config.json: the files differ",
        f"differs: generation_config.base.json: only in {back}",
    }
    assert "critic of step 12" in said
    assert "left out: value_head.weight (a Hugging Face model has no place for it), optimizer-critic, policy" in said
    assert ("cannot generate" in said) != tied
    assert load_file(back / "model.safetensors").keys() == tensors.keys()
    _, info = AutoModel.from_pretrained(back, output_loading_info=True)
    assert not any(info.values()), info


def test_a_checkpoint_without_a_critic(checkpoint, tmp_path, capsys):
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back", "--critic") == 2
    assert "has no critic, only policy" in capsys.readouterr().err


def test_damaged_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    path = checkpoint / "policy" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back") == 2
    assert "policy/model.safetensors has" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_out_folder_is_replaced_only_by_force(hf, checkpoint, tmp_path, capsys):
    again = ("convert_from_hf", "--hf", hf, "--out", checkpoint)
    assert run(*again) == 2
    assert "--force" in capsys.readouterr().err
    assert run(*again, "--force") == 0
    back = ("convert_to_hf", "--checkpoint", checkpoint, "--out", tmp_path / "back")
    assert [run(*back), run(*back), run(*back, "--force", "--verify", hf)] == [0, 2, 0]
    assert run("convert_to_hf", "--checkpoint", checkpoint, "--out", checkpoint, "--force") == 2
    check(checkpoint)


def test_another_model_is_refused(hf, tmp_path, capsys):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "a") == 2
    (hf / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    assert run("convert_from_hf", "--hf", hf, "--out", tmp_path / "a") == 2
    said = capsys.readouterr().err
    assert "model_type is 'llama'" in said
    assert "mlp.down_proj.weight has shape [32, 48], config.json makes it [32, 64]" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_average_of_checkpoints_is_a_checkpoint_that_exports(tmp_path):
    for seed in range(2):
        make_tiny_model(tmp_path / f"hf{seed}", seed=seed, sizes=SIZES)
        run("convert_from_hf", "--hf", tmp_path / f"hf{seed}", "--out", tmp_path / f"ckpt{seed}")
    assert run("average_checkpoints", tmp_path / "ckpt0", tmp_path / "ckpt1", "--out", tmp_path / "mean") == 0
    assert run("average_checkpoints", tmp_path / "hf0", tmp_path / "hf1", "--out", tmp_path / "mean_hf") == 0
    exported = ("--checkpoint", tmp_path / "mean", "--out", tmp_path / "back", "--verify", tmp_path / "mean_hf")
    assert run("convert_to_hf", *exported) == 0
    assert check(tmp_path / "mean").extra["average_of"] == [str(tmp_path / f"ckpt{seed}") for seed in range(2)]


@pytest.mark.parametrize("tool", ["convert_from_hf", "convert_to_hf", "average_checkpoints"])
def test_help_needs_no_torch(tool):
    code = (
        f"import sys, runpy; sys.argv = ['x', '--help']; sys.modules['torch'] = None\n"
        f"runpy.run_path({str(TOOLS / tool) + '.py'!r}, run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout
