"""A family that is registered from elsewhere: its sizes, weights, tokens, positions, scores and plan."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

from ovr_megatron import families
from ovr_megatron.checkpoint.hf_assets import write_generation_config
from ovr_megatron.config import ConfigError, DataConfig, ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.schema import ImagePart, Message, Row, TextPart
from ovr_megatron.engine import Engine
from ovr_megatron.families import Family, ModelShape, default_family, family_of, family_of_folder, register
from ovr_megatron.families.config_json import ShapeError
from ovr_megatron.families.presets import presets, write_config
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.plan.parameters import count_parameters
from ovr_megatron.plan.report import read_shape
from ovr_megatron.rollout.sampling import end_tokens
from ovr_megatron.runtime import distributed
from ovr_megatron.verify import make_documents, make_packs, objective
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.table import rows

NAME = "dummy_vl"
END = "<|turn_end|>"
NORM = "model.last_norm.weight"
SKIP = 100  # positions that the dummy leaves out before the first token


def renamed(text: str) -> str:
    return text.replace("<|im_end|>", END)


def dummy(folder: Path) -> Family:
    """The default family under another name, with another token, a renamed weight, other positions and one preset."""
    base = default_family()
    template = folder / "think.jinja"
    template.write_text(renamed(base.processor.think_template.read_text()))
    norm = "model.norm.weight"
    return replace(
        base,
        name=NAME,
        title="Dummy-VL",
        model_types=(NAME,),
        is_default=False,
        presets={"70B": base.presets["7B"] | {"model_type": NAME, "num_hidden_layers": 280}},
        tokens=replace(base.tokens, end_of_turn=END),
        processor=replace(base.processor, think_template=template),
        positions=lambda *document: SKIP + base.positions(*document),
        weight_table=tuple(
            (name, tuple(NORM if hf == norm else hf for hf in hfs), *row) for name, hfs, *row in base.weight_table
        ),
        patch_forward=lambda shape, frame: (1.0, 1.0),
        tiny=replace(
            base.tiny,
            config=lambda sizes, ids, *options: (
                base.tiny.config(sizes, {**ids, "<|im_end|>": ids[END]}, *options) | {"model_type": NAME}
            ),
            tensors=lambda *sizes: (
                (NORM if name == norm else name, shape) for name, shape in base.tiny.tensors(*sizes)
            ),
            special_tokens=tuple(map(renamed, base.tiny.special_tokens)),
            chat_template=renamed(base.tiny.chat_template),
        ),
    )


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    with pytest.MonkeyPatch.context() as patch:
        known = {family.name: family for family in families.families()}
        patch.setattr(families, "_FAMILIES", replace(families._FAMILIES, rows=known))
        registered = dummy(tmp_path_factory.mktemp("dummy"))
        register(registered)
        yield registered


@pytest.fixture(scope="module")
def folder(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), family=NAME, seed=3, perturb=True)


@pytest.fixture(scope="module")
def default_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("default"), seed=3, perturb=True)


def test_config_json_leads_to_the_family(family: Family, folder: Path, default_folder: Path) -> None:
    shape = ModelShape.from_hf(folder)
    assert shape.family == NAME
    assert family_of(shape) is family_of(NAME) is family_of_folder(folder) is family
    assert replace(shape, family=default_family().name) == ModelShape.from_hf(default_folder)


def test_weights_follow_the_family_s_table(folder: Path, default_folder: Path) -> None:
    names = [name for row in rows(ModelShape.from_hf(folder)) for name in row.hf]
    assert NORM in names and "model.norm.weight" not in names
    stored = load_file(folder / "model.safetensors")
    assert set(names) == set(stored)
    assert torch.equal(stored[NORM], load_file(default_folder / "model.safetensors")["model.norm.weight"])


def test_samples_have_the_family_s_tokens_and_positions(folder: Path, default_folder: Path) -> None:
    picture = PIL.Image.fromarray(np.arange(84 * 56 * 3, dtype=np.uint8).reshape(84, 56, 3))
    question = Message("user", (ImagePart(image=picture), TextPart("Add 1+2")))
    row = Row((question, Message("assistant", (TextPart("It is 3.</think>3"),))))
    ours, default = (Processor(path, DataConfig()) for path in (folder, default_folder))
    sample = ours.encode([row], generation=False)[0]
    expected = default.encode([row], generation=False)[0]
    np.testing.assert_array_equal(sample.tokens, expected.tokens)  # the renamed token has the other one's id
    assert sample.grid_thw.tolist() == [[1, 6, 4]]
    assert ours.decode(sample.tokens, skip_special_tokens=False).endswith(END)
    np.testing.assert_array_equal(sample.position_ids, SKIP + expected.position_ids)
    vocabulary = ours.tokenizer.get_vocab()
    assert end_tokens(ours.shape, ours.tokenizer) == [vocabulary[END], vocabulary["<|endoftext|>"]]


def test_generation_ends_with_the_family_s_token(folder: Path, tmp_path: Path) -> None:
    processor = Processor(folder, DataConfig())
    vocabulary = processor.tokenizer.get_vocab()
    write_generation_config(tmp_path, processor.shape, vocabulary)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert written["eos_token_id"] == [vocabulary[END], vocabulary["<|endoftext|>"]]


def test_it_trains_as_the_default_family_does(folder: Path, default_folder: Path) -> None:
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    losses = []
    for path in (folder, default_folder):
        shape = ModelShape.from_hf(path)
        engine = Engine(shape, ModelConfig(path=str(path)), ParallelConfig(), world)
        engine.with_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=0), 2).load(WeightFolder(path))
        # Rotary positions are relative: the dummy's offset changes rounding alone.
        packs = make_packs(make_documents(shape), shape, True, False, 1)
        losses.append([engine.train(packs, objective)["loss"] for _ in range(2)])
        assert (NORM in dict(engine.weights())) == (path == folder)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_plan_asks_the_family(family: Family, folder: Path, default_folder: Path) -> None:
    shape, path = read_shape("70B")
    assert path is None and shape.family == NAME and shape.layers == 280
    assert count_parameters(read_shape(str(folder))[0]) == count_parameters(read_shape(str(default_folder))[0])
    frame = [(1, 8, 8)]
    images = training_flops(shape, [10], frame) - training_flops(shape, [10])
    assert images == 2 * 8 * 8


def test_messages_name_every_known_family(family: Family, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    types = " or ".join(repr(other.model_types[0]) for other in families.families())
    with pytest.raises(ShapeError, match=f"model_type is 'llama', expected {types}"):
        ModelShape.from_hf(tmp_path)
    with pytest.raises(ShapeError, match=r"give the folder of a Hugging Face .* or Dummy-VL model"):
        ModelShape.from_hf(tmp_path / "absent")
    with pytest.raises(ConfigError, match=f"family='other' is not known; choose one of .*{NAME}$"):
        family_of("other")
    with pytest.raises(ConfigError, match="family='other' is not known"):
        make_tiny_model(tmp_path / "tiny", family="other")
    with pytest.raises(ValueError, match=f"'8B' is no .* or Dummy-VL; choose one of {', '.join(presets())}"):
        write_config("8B", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, f"family {NAME}: {NAME} .* is registered already"),
        ({"model_types": ("second",), "presets": {}}, f"'{NAME}' is registered already; choose another name"),
        ({"name": "second"}, f"family second: {NAME} .model_type {NAME}. is registered already"),
        ({"name": "second", "model_types": ("second",)}, f"family second: 70B names a preset of {NAME}"),
    ],
)
def test_a_second_family_of_a_name_is_refused(family: Family, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        register(replace(family, **changes))


def test_only_its_package_names_a_family() -> None:
    package = Path(families.__file__).parent
    built_in = [family for family in families.families() if (package / family.name).is_dir()]
    assert built_in
    for path in package.parent.rglob("*.py"):
        text = path.read_text().lower()
        for family in built_in:
            if package / family.name not in path.parents:
                named = [name for name in (family.name, family.title, family.architecture) if name.lower() in text]
                assert not named, path
