"""The validation loss of rows with images and several turns: ours in several layouts, for tests/stages.py, and
Transformers', for tests/test_stages.py.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from ovr_megatron.coldstart.validation import open_validation
from ovr_megatron.config import ColdStartConfig, DataConfig, ModelConfig, RunConfig, SourceConfig, ValidationConfig
from ovr_megatron.config.layout_text import parse_layout
from ovr_megatron.config.model import OptimizerConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder

LAYOUTS = ("", "zero=1", "tp=2,sp=1", "pp=2", "cp=2")


def layout_losses(model: Path, rows: Path, world: World) -> dict[str, list[dict[str, float]]]:
    """Return the losses of the weights of ``model`` in each layout, twice.  A collective."""
    sources = [SourceConfig(path=str(path), name=path.stem) for path in sorted(rows.glob("*.jsonl"))]
    data = DataConfig(template="model", pack_tokens=256, max_prompt_tokens=200, min_pixels=784, max_pixels=12544)
    config = ColdStartConfig(
        run=RunConfig(dir=str(rows)),
        model=ModelConfig(path=str(model)),
        data=data,
        validation=ValidationConfig(sources=sources),
        packs_per_step=2,
    )
    losses = {}
    for layout in LAYOUTS:
        parallel, _ = parse_layout(layout)
        if layout == "zero=1":
            parallel = replace(parallel, overlap=True)
        engine = Engine(ModelShape.from_hf(model), config.model, parallel, world)
        engine.with_optimizer(OptimizerConfig(), 1).load(WeightFolder(model))
        layout_world = replace(world, layout=world.arrange(parallel))
        validation = open_validation(config, Processor(model, data), engine, layout_world)
        assert validation is not None
        losses[layout or "dp=2"] = [validation.losses(), validation.losses()]
    return losses


def turn(role: str, text: str, *images: str) -> dict[str, object]:
    parts = [{"type": "image", "image": image} for image in images]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}] if parts else text}


def write_rows(folder: Path) -> None:
    """Write chats of one and several turns, images and a system message, in two sources."""
    folder.mkdir()
    colours = np.random.default_rng(3)
    for name, size in (("a", (84, 56)), ("b", (56, 112))):
        pixels = colours.integers(0, 256, (*size, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{name}.png")
    chats = {
        "images": [
            [turn("user", "Add the red digits.", "a.png"), turn("assistant", "red3 red5")],
            [
                turn("user", "Which?", "b.png", "a.png"),
                turn("assistant", "8"),
                turn("user", "And this?", "a.png"),
                turn("assistant", "Let me check: 8."),
            ],
        ],
        "texts": [
            [turn("system", "Be short."), turn("user", "Add 3+5."), turn("assistant", "8")],
            [turn("user", "List: red3 green2"), turn("assistant", "Take red:3,5. Add 3+5=8. So 8")],
            [turn("user", "2"), turn("assistant", "3"), turn("user", "4"), turn("assistant", "5 8 8")],
        ],
    }
    for name, rows in chats.items():
        lines = [json.dumps({"messages": messages}) + "\n" for messages in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def reference(model_folder: Path, folder: Path) -> dict[str, float]:
    """Transformers' loss by source, and of all rows: of each chat alone; replies and the tokens that end them count."""
    processor = AutoProcessor.from_pretrained(model_folder, min_pixels=784, max_pixels=12544, use_fast=False)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    sums: dict[str, list[float]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            messages = json.loads(line)["messages"]
            text = processor.apply_chat_template(messages, tokenize=False)
            contents = [message["content"] for message in messages if isinstance(message["content"], list)]
            names = [part["image"] for content in contents for part in content if part["type"] == "image"]
            pictures = [PIL.Image.open(folder / name).convert("RGB") for name in names]
            batch = processor(text=[text], images=pictures or None, return_tensors="pt")
            learned = learned_tokens(processor.tokenizer, batch["input_ids"][0].tolist())
            labels = torch.full_like(batch["input_ids"], -100)
            labels[0, learned] = batch["input_ids"][0, learned]
            with torch.no_grad():
                loss = float(model(**batch, labels=labels).loss)
            for key in (path.stem, ""):
                entry = sums.setdefault(key, [0.0, 0])
                entry[0] += loss * len(learned)
                entry[1] += len(learned)
    return {key: total / count for key, (total, count) in sums.items()}


def learned_tokens(tokenizer: object, ids: list[int]) -> list[int]:
    """Indices between ``<|im_start|>assistant`` and ``<|im_end|>``, the latter included, read off the characters."""
    text, ends = "", []
    for token in ids:
        text += tokenizer.decode([token])
        ends.append(len(text))
    spans = [match.span(1) for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
    return [i for i, end in enumerate(ends) if any(start < end <= stop for start, stop in spans)]
