"""Model folders as people have them: each is read, filled in with a notice, or refused in one sentence.

Every case goes through the command that imports a model, and those of the files beside the weights through the
processor that each stage opens.
"""

import json
import re
import runpy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from ovr_megatron.config import ColdStartConfig, DataConfig, ModelConfig, RunConfig
from ovr_megatron.data.hf_assets import complete_folder
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import Message, Row, TextPart
from ovr_megatron.errors import UserError
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.preflight import check_model
from ovr_megatron.runtime.command import run_command

TOOLS = Path(__file__).resolve().parents[2] / "tools"
SIZES = TinySizes(hidden=32, layers=2, ffn=48, vision_hidden=32, vision_heads=2, vision_ffn=40)
CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
PREPROCESSOR, WEIGHTS = "preprocessor_config.json", "model.safetensors"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model in float32."""
    return make_tiny_model(tmp_path_factory.mktemp("sound"), tied=False, sizes=SIZES)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


def edit(name: str, part: str | None = None, **values: Any) -> Change:
    """Set fields of a JSON file, or of an object in it; ``...`` removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        target = content[part] if part else content
        for key, value in values.items():
            if value is ...:
                target.pop(key)
            else:
                target[key] = value
        path.write_text(json.dumps(content))

    return change


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None
    )


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for each in changes:
            each(folder)

    return change


def weights(rename: Callable[[str], str | None] = lambda name: name, **changed: Any) -> Change:
    """Save the tensors under other names (None: not), then set those of ``changed`` to what they give."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        kept = {rename(name): tensor for name, tensor in tensors.items() if rename(name)}
        for name, make in changed.items():
            kept[name.replace("__", ".")] = make(tensors)
        save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def poison(name: str, value: float) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        tensors[name].view(-1)[3] = value
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def text(**values: Any) -> Change:
    return edit(CONFIG, **values)


def vision(**values: Any) -> Change:
    return edit(CONFIG, "vision_config", **values)


def rope(**values: Any) -> Change:
    return edit(CONFIG, "rope_scaling", **values)


def tokens(**changes: Callable[[Any], Any]) -> Change:
    """Change parts of tokenizer.json and leave its Python twin out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / TOKENIZER).read_text())
        for key, new in changes.items():
            content[key] = new(content[key])
        (folder / TOKENIZER).write_text(json.dumps(content))
        remove("vocab.json", "merges.txt")(folder)

    return change


def more_tokens(count: int) -> Change:
    """Add special tokens behind those of the tokenizer, as a fine-tune with words of its own does."""
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(1000 + n): {"content": f"<|more_{n}|>", **plain} for n in range(count)}
    return edit(TOKENIZER_CONFIG, "added_tokens_decoder", **added)


def template(source: Any) -> Change:
    return both(remove("chat_template.json"), edit(TOKENIZER_CONFIG, chat_template=source))


# name: (what is done to a sound folder, what the sentence says)
REFUSED: dict[str, tuple[Change, str]] = {
    # config.json cannot be read
    "no config": (remove(CONFIG), "config.json does not exist; give the folder"),
    "empty config": (write(CONFIG, ""), "config.json:1: not JSON"),
    "cut off config": (write(CONFIG, '{"model_type": "qwen2'), "config.json:1: not JSON"),
    "config in another encoding": (write(CONFIG, b'{"a": "\xff\xfe"}'), "config.json is not text in UTF-8"),
    "config nested without end": (write(CONFIG, "[" * 100_000), "nested too deeply"),
    "config is a list": (write(CONFIG, "[]"), "config.json: holds a list and not an object"),
    "config is a folder": (both(remove(CONFIG), lambda f: (f / CONFIG).mkdir()), "config.json cannot be read"),
    "another model": (text(model_type="qwen2_vl"), "model_type is 'qwen2_vl', expected"),
    "model type is a number": (text(model_type=7), "model_type is 7, expected"),
    "another head": (text(architectures=["Qwen2_5_VLForTokenClassification"]), "field 'architectures' is"),
    "awq": (text(quantization_config={"quant_method": "awq", "bits": 4}), r"weights are quantised \(awq\)"),
    "gptq": (text(quantization_config={"quant_method": "gptq"}), r"weights are quantised \(gptq\)"),
    "bitsandbytes": (text(quantization_config={"load_in_4bit": True}), r"weights are quantised \(unknown\)"),
    "integer dtype": (text(torch_dtype="int8"), "field 'torch_dtype' is 'int8'; it can be float32"),
    # what it claims and is not computed
    "gelu": (text(hidden_act="gelu"), "field 'hidden_act' is 'gelu'"),
    "gelu in the tower": (vision(hidden_act="quick_gelu"), "field 'vision_config.hidden_act' is 'quick_gelu'"),
    "sliding window": (text(use_sliding_window=True, max_window_layers=1), "layers from 1 on would attend to 4096"),
    "sliding layers": (text(layer_types=["full_attention", "sliding_attention"]), "'layer_types' asks for"),
    "linear rope": (rope(type="linear", factor=2.0), "rotary type 'linear' is not known"),
    "dynamic rope": (rope(type="dynamic", factor=2.0), "rotary type 'dynamic' is not known"),
    "longrope": (rope(rope_type="longrope", factor=2.0), "rotary type 'longrope' is not known"),
    "partial rope": (rope(partial_rotary_factor=0.5), "field 'partial_rotary_factor' is 0.5"),
    "dropout": (text(attention_dropout=0.1), "field 'attention_dropout' is 0.1"),
    "grey pictures": (vision(in_channels=1), "field 'vision_config.in_channels' is 1"),
    # impossible numbers
    "no width": (text(hidden_size=...), "field 'hidden_size' is missing"),
    "no tower": (text(vision_config=...), "field 'vision_config.hidden_size' is missing"),
    "tower is a list": (text(vision_config=[]), r"field 'vision_config' is \[\] and not an object"),
    "width 0": (text(hidden_size=0), "field 'hidden_size' is 0"),
    "width is a text": (text(hidden_size="32"), "field 'hidden_size' is '32'"),
    "width is half": (text(hidden_size=32.5), "field 'hidden_size' is 32.5"),
    "layers -1": (text(num_hidden_layers=-1), "field 'num_hidden_layers' is -1"),
    "layers true": (text(num_hidden_layers=True), "field 'num_hidden_layers' is True"),
    "a billion layers": (text(num_hidden_layers=10**9), "field 'num_hidden_layers' is 1000000000"),
    "width of 300 digits": (text(hidden_size=10**300), "field 'hidden_size' is 1000"),
    "heads do not divide": (text(num_attention_heads=3), "hidden_size 32 is not a multiple of num_attention_heads 3"),
    "groups do not divide": (text(num_key_value_heads=3), "num_attention_heads 4 is not a multiple of num_key_v"),
    "no vocabulary": (text(vocab_size=None), "field 'vocab_size' is None"),
    "eps is NaN": (text(rms_norm_eps=float("nan")), "field 'rms_norm_eps' is nan"),
    "eps is negative": (text(rms_norm_eps=-1e-6), "field 'rms_norm_eps' is -1e-06"),
    "theta is infinite": (text(rope_theta=float("inf")), "field 'rope_theta' is inf"),
    "theta is 0": (text(rope_theta=0), "field 'rope_theta' is 0"),
    "no theta": (text(rope_theta=...), "field 'rope_theta' is None"),
    "no rope": (text(rope_scaling=None), "field 'mrope_section' is missing"),
    "rope is a text": (text(rope_scaling="mrope"), "field 'rope_scaling' is 'mrope' and not an object"),
    "rope of two rows": (rope(mrope_section=[2, 2]), r"mrope_section \[2, 2\] is not three numbers"),
    "rope of texts": (rope(mrope_section=["1", "2", "1"]), "field 'mrope_section' is '1'"),
    "positions 0": (text(max_position_embeddings=0), "field 'max_position_embeddings' is 0"),
    "tied is a text": (text(tie_word_embeddings="yes"), "field 'tie_word_embeddings' is 'yes'"),
    "image id past the end": (text(image_token_id=10**6), "field 'image_token_id' is 1000000"),
    "image id negative": (text(image_token_id=-1), "field 'image_token_id' is -1"),
    "image and video alike": (lambda f: text(video_token_id=_id(f, "image"))(f), "are the same id"),
    "tower heads": (vision(num_heads=3), "vision_config.hidden_size 32 is not a multiple of 4 x num_heads 3"),
    "tower width": (vision(out_hidden_size=64), "vision_config.out_hidden_size 64 is not hidden_size 32"),
    "window": (vision(window_size=30), "vision_config.window_size 30 is not a multiple of 28"),
    "full attention past the end": (vision(fullatt_block_indexes=[7]), "names block 7, and the tower has 2"),
    "full attention as a number": (vision(fullatt_block_indexes=1), "field 'vision_config.fullatt_block_indexes' is 1"),
    "time stands still": (vision(tokens_per_second=0), "field 'vision_config.tokens_per_second' is 0"),
    "rule after a video": (text(after_video="later"), "field 'after_video' is 'later'"),
    "nested and empty": (text(text_config={"hidden_size": 32}), "field 'text_config.num_hidden_layers' is missing"),
    # tokenizer
    "no vocabulary files": (remove(TOKENIZER, "vocab.json", "merges.txt"), "does not give a text back"),
    "no tokenizer": (remove(TOKENIZER, "vocab.json", "merges.txt", TOKENIZER_CONFIG), "does not give a text back"),
    "no merges": (tokens(model=lambda m: {**m, "merges": [], "vocab": {}}), "does not give a text back"),
    "tokenizer cut off": (write(TOKENIZER, '{"model": '), "tokenizer.json cannot be read"),
    "tokenizer empty": (write(TOKENIZER, "{}"), "Transformers cannot load its tokenizer"),
    "tokenizer is a list": (write(TOKENIZER, "[]"), "tokenizer.json holds a list and not an object"),
    "tokenizer of another kind": (tokens(model=lambda m: {"type": "Unknown"}), "cannot load its tokenizer"),
    "tokenizer is a pointer": (write(TOKENIZER, "version https://git-lfs.github.com/spec/v1\noid"), "cannot be"),
    "tokenizer config is a list": (write(TOKENIZER_CONFIG, "[1]"), "tokenizer_config.json holds a list"),
    "tokenizer class is a number": (edit(TOKENIZER_CONFIG, tokenizer_class=3), "cannot load its tokenizer"),
    "ids past the vocabulary": (more_tokens(60), "ids of the tokenizer lie past the model's"),
    "vocabulary cut": (text(vocab_size=300, **{f"{k}_token_id": n for n, k in enumerate(
        ("image", "video", "vision_start", "vision_end"))}), "lie past the model's vocabulary of 300"),
    "another image id": (lambda f: text(image_token_id=_id(f, "image") - 9)(f), "in the tokenizer and .* in config"),
    "special tokens are plain": (both(tokens(added_tokens=lambda added: [{**t, "special": False} for t in added]), edit(
        TOKENIZER_CONFIG, added_tokens_decoder=..., additional_special_tokens=..., eos_token=..., pad_token=...)),
        "is no special token of the tokenizer"),
    "added tokens are a text": (edit(TOKENIZER_CONFIG, added_tokens_decoder="x"), "cannot load its tokenizer"),
    # processor
    "preprocessor cut off": (write(PREPROCESSOR, "{"), "preprocessor_config.json cannot be read"),
    "preprocessor is a list": (write(PREPROCESSOR, "[]"), "preprocessor_config.json holds a list"),
    "unknown image processor": (edit(PREPROCESSOR, image_processor_type="MyProcessor"), "cannot load its tokenizer or"),
    "another image processor": (edit(PREPROCESSOR, image_processor_type="CLIPImageProcessor"), "would go through CLIP"),
    "another processor": (edit(PREPROCESSOR, processor_class="Qwen2VLProcessor"), "its processor is Qwen2VLProcessor"),
    "patches of 16": (edit(PREPROCESSOR, patch_size=16), "patch_size of Qwen2VL.* is 16 and the model needs 14"),
    "merged by 4": (edit(PREPROCESSOR, merge_size=4), "merge_size of Qwen2VL.* is 4 and the model needs 2"),
    "pixels as they are": (edit(PREPROCESSOR, do_resize=False), "do_resize of Qwen2VL.* is False"),
    "deviation 0": (edit(PREPROCESSOR, image_std=[0.2, 0.0, 0.2]), "image_std is .* each must be above 0"),
    "mean is a text": (edit(PREPROCESSOR, image_mean="abc"), "image_mean|cannot be used|cannot load"),
    # weights
    "no weights": (remove(WEIGHTS), "has no safetensors weights"),
    "pickled weights": (both(remove(WEIGHTS), write("pytorch_model.bin", "x")), "and no safetensors weights; save"),
    "adapter alone": (both(remove(WEIGHTS), write("adapter_config.json", "{}")), "holds a LoRA adapter and no model"),
    "weights cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "damaged or cut off"),
    "weights are a pointer": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "damaged or cut off"),
    "index without tensors": (write("model.safetensors.index.json", '{"weight_map": {}}'), "names no tensor"),
    "index of numbers": (write("model.safetensors.index.json", '{"weight_map": {"a": 1}}'), "points outside"),
    "index is no text": (write("model.safetensors.index.json", b"\xff\xff"), "is not a safetensors index"),
    "another file of weights": (lambda f: (f / WEIGHTS).rename(f / "model-1.safetensors"), "but no model.safet"),
    "lost head": (weights(lambda n: n if n != "lm_head.weight" else None), "the head was lost in saving"),
    "no vision tower": (weights(lambda n: n if not n.startswith("visual.") else None), "vision tower .* is missing"),
    "prefix of PEFT": (weights(lambda n: f"base_model.model.{n}"), "every tensor is named base_model"),
    "prefix of a wrapper": (weights(lambda n: f"module.{n}"), r"every tensor is named module\.\.\."),
    "prefix of a compiler": (weights(lambda n: f"_orig_mod.{n}"), r"every tensor is named _orig_mod\.\.\."),
    "adapter within": (weights(model__layers__0__self_attn__q_proj__lora_A__default__weight=lambda _: torch.ones(2)),
                       "is a part of a LoRA adapter"),
    "awq within": (weights(lambda n: n.replace("down_proj.weight", "down_proj.qweight")), r"quantised weight \(AWQ or"),
    "fp8 within": (weights(model__layers__0__mlp__down_proj__weight_scale_inv=lambda _: torch.ones(1)), r"\(FP8\)"),
    "a tensor too many": (weights(extra__weight=lambda _: torch.ones(1)), "extra.weight not in this model"),
    "a tensor too few": (weights(lambda n: None if n == "model.norm.weight" else n), "no tensor model.norm.weight"),
    "another shape": (weights(model__norm__weight=lambda _: torch.ones(31)), r"has shape \[31\], config.json makes it"),
    "integers": (weights(model__norm__weight=lambda _: torch.ones(32, dtype=torch.int8)), "is stored as I8"),
    "NaN": (poison("model.layers.1.mlp.down_proj.weight", float("nan")), "layers.1.mlp.down_proj.weight has 1 of 1536"),
    "infinite": (poison("visual.merger.ln_q.weight", float("-inf")), "merger.ln_q.weight has 1 of 32 values"),
    # links
    "link out of the folder": (both(remove("merges.txt"), lambda f: (f / "merges.txt").symlink_to("/etc/hostname")),
                               "merges.txt is a link that leaves the folder"),
}  # fmt: skip


def _id(folder: Path, name: str) -> int:
    return json.loads((folder / CONFIG).read_text())[f"{name}_token_id"]


def import_model(folder: Path, out: Path) -> Any:
    """Exit code of ``convert_from_hf.py``."""
    try:
        runpy.run_path(str(TOOLS / "convert_from_hf.py"))["main"](["--hf", str(folder), "--out", str(out)])
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize("case", REFUSED)
def test_broken_folder_is_refused_in_one_sentence(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = REFUSED[case]
    change(folder)
    assert import_model(folder, tmp_path / "out") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ovr convert from-hf:")]
    assert re.search(sentence, line), line
    assert str(folder) in line
    assert len(line) < 600
    assert not (tmp_path / "out").exists()


TEMPLATES: dict[str, tuple[Any, str]] = {
    "not Jinja": ("{% for %}", "the chat template cannot be rendered"),
    "undefined": ("{{ nothing.here }}", "the chat template cannot be rendered"),
    "refuses": ("{{ raise_exception('no chats') }}", r"rendered \(TemplateError: no chats\)"),
    "divides by zero": ("{{ 1 // 0 }}", "the chat template cannot be rendered"),
    "without the text": ("<|im_start|>user<|im_end|>", "writes a user's text 0 times"),
    "twice": ("{{ messages[0].content }}{{ messages[0].content }}", "writes a user's text 2 times"),
    "of another tokenizer": ("<|start_header_id|>{{ messages[0].content }}", "writes <.start_header_id.>, which is no"),
    "none": (None, "has no chat template; set data.template=think"),
    "a number": (3, "several chat templates|cannot load|no chat template|cannot be rendered"),
    "several": ([{"name": "a", "template": "x"}, {"name": "b", "template": "y"}], "several chat templates|cannot"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_broken_template_is_refused_in_one_sentence(case: str, folder: Path) -> None:
    source, sentence = TEMPLATES[case]
    template(source)(folder)
    with pytest.raises(UserError, match=sentence) as caught:
        Processor(folder, DataConfig(template="model"))
    assert "\n" not in str(caught.value)
    if case in ("not Jinja", "undefined", "without the text", "none"):
        Processor(folder, DataConfig())  # ours does not need the folder's


FILLED: dict[str, Change] = {
    "no preprocessor": remove(PREPROCESSOR),
    "early name": edit(PREPROCESSOR, image_processor_type="Qwen2_5_VLImageProcessor"),
    "early fast name": edit(PREPROCESSOR, image_processor_type="Qwen2_5_VLImageProcessorFast"),
}


@pytest.mark.parametrize("case", FILLED)
def test_image_processor_is_filled_in_with_a_notice(
    case: str, folder: Path, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FILLED[case](folder)
    assert import_model(folder, tmp_path / "out") == 0
    assert capsys.readouterr().err.count(f"notice: {folder} ") == 1
    # what is written loads without this project, and has the pixels of a sound folder
    mine = AutoProcessor.from_pretrained(tmp_path / "out" / "policy").image_processor
    theirs = AutoProcessor.from_pretrained(sound).image_processor
    picture = torch.arange(3 * 56 * 84, dtype=torch.uint8).view(3, 56, 84)
    pixels = [each(images=[picture], return_tensors="pt")["pixel_values"] for each in (mine, theirs)]
    assert torch.equal(*pixels)
    assert complete_folder(folder) == complete_folder(folder)
    assert Processor(folder, DataConfig()).encode([row("Hi")], generation=True)


def row(words: str) -> Row:
    return Row((Message("user", (TextPart(words),)),), answer="1", where="rows.jsonl:1")


NOTICED: dict[str, tuple[Change, str]] = {
    "adapter beside the model": (
        lambda f: save_file({"a.lora_A.weight": torch.ones(1)}, f / "adapter_model.safetensors"),
        "adapter_model.safetensors is a LoRA adapter, which is not applied",
    ),
    "consolidated beside the model": (
        lambda f: save_file({"x": torch.ones(1)}, f / "consolidated.00.safetensors"),
        "consolidated.00.safetensors is another copy of a model; model.safetensors is read",
    ),
    "files of a trainer": (write("training_args.bin", "x"), "not copied, as they are no part of the model: training_"),
}


@pytest.mark.parametrize("case", NOTICED)
def test_what_lies_beside_a_model_is_said(
    case: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, sentence = NOTICED[case]
    change(folder)
    assert import_model(folder, tmp_path / "out") == 0
    said = capsys.readouterr()
    assert sentence in said.out + said.err
    written = {path.name for path in (tmp_path / "out" / "policy").iterdir()}
    assert not written & {"adapter_model.safetensors", "consolidated.00.safetensors", "training_args.bin"}


@pytest.mark.parametrize(
    "case", ["no vocabulary files", "ids past the vocabulary", "gelu", "lost head", "another image id"]
)
def test_preflight_names_a_folder_that_does_not_work(case: str, folder: Path) -> None:
    config = ColdStartConfig(model=ModelConfig(path=str(folder)), run=RunConfig(dir=str(folder / "run")))
    assert check_model(config, False) == []
    change, sentence = REFUSED[case]
    change(folder)
    [problem] = check_model(config, False)
    assert re.search(sentence, problem), problem


@pytest.mark.parametrize("tool", ["tokenise", "average_checkpoints"])
def test_other_commands_refuse_a_tokenizer_that_makes_nothing_of_a_text(
    tool: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    REFUSED["no vocabulary files"][0](folder)
    line = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "<think>\n2\n</think>\n2"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": line}) + "\n")
    arguments = {
        "tokenise": [f"{tmp_path}/set", "--model", f"{folder}", f"data.sources=[{{path: {tmp_path}/rows.jsonl}}]"],
        "average_checkpoints": [f"{folder}", "--out", f"{tmp_path}/mean"],
    }
    with pytest.raises(SystemExit) as end:
        run_command(partial(runpy.run_path(str(TOOLS / f"{tool}.py"))["main"], arguments[tool]))
    assert end.value.code == 2
    assert "does not give a text back" in capsys.readouterr().err
    assert not (tmp_path / "set").exists() and not (tmp_path / "mean").exists()
