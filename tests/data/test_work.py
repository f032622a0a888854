"""Packs with images are shared among the replicas by the FLOP of language model and vision tower."""

import json
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from ovr_megatron.coldstart.balance import row_work
from ovr_megatron.config import ColdStartConfig, DataConfig, ModelConfig, RunConfig, SourceConfig
from ovr_megatron.data.best_fit import plan_packs
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.supervised import open_packs
from ovr_megatron.families import ModelShape
from ovr_megatron.model.flops import training_flops
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.plan.report import read_shape
from ovr_megatron.runtime.balance import balance

SIZES = TinySizes(layers=1, hidden=64, heads=2, kv_heads=1, ffn=64, vision_hidden=64, vision_ffn=128)


def write_rows(folder, images):
    """Short questions about pictures of many sizes beside long texts, or texts alone."""
    draw = np.random.default_rng(4)
    lines = []
    for index in range(60):
        content = "red3 " * int(draw.integers(4, 40))
        if images and index % 3 == 0:
            width, height = (28 * draw.integers(2, 9, 2)).tolist()
            PIL.Image.new("RGB", (width, height)).save(folder / f"{index}.png")
            content = [{"type": "image", "image": f"{index}.png"}, {"type": "text", "text": "red3"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "So</think>3"}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path = folder / "rows.jsonl"
    path.write_text("".join(lines))
    return SourceConfig(path=str(path))


def replica_flops(model, source, balance, steps):
    """The FLOP of the costlier replica over their mean, of each step, and the rows of the first replica."""
    data = DataConfig(sources=[source], pack_tokens=200, max_prompt_tokens=150, balance=balance)
    shape, processor = ModelShape.from_hf(model), Processor(model, data)
    config = ColdStartConfig(
        run=RunConfig(dir="run"), model=ModelConfig(path=str(model)), data=data, steps=steps, packs_per_step=8
    )
    ratios, rows, loads = [], [], np.zeros((steps, 2))
    for rank in range(2):
        world = SimpleNamespace(rank=0, size=1, dp_rank=rank, dp_size=2, is_main=False)
        packs, _ = open_packs(config, processor, world, row_work(config, processor))
        for step in range(steps):
            for pack in next(packs):
                loads[step, rank] += training_flops(shape, pack.cu_seqlens.diff().tolist(), pack.grid_thw.tolist())
                rows.append((rank, tuple(origin.where for origin in pack.origins)))
    ratios = loads.max(1) / loads.mean(1)
    return ratios, rows


def test_the_replicas_of_a_step_have_like_work(tmp_path):
    model = make_tiny_model(tmp_path / "model", sizes=SIZES)
    source = write_rows(tmp_path, images=True)
    by_attention, _ = replica_flops(model, source, "attention", 5)
    by_flops, _ = replica_flops(model, source, "flops", 5)
    assert by_flops.max() < 1.02 < by_attention.max()
    assert by_flops.mean() < by_attention.mean()


@pytest.mark.parametrize("trains_tower", [False, True])
def test_a_7b_models_imbalance_before_and_after(trains_tower, capsys):
    """2,048 rows, half with an image of 0.05 to 1 megapixel, in packs of 16,384 tokens, 8 a step for 4 replicas."""
    shape, _ = read_shape("7B")
    draw = np.random.default_rng(0)
    lengths, grids = [], []
    for index in range(2048):
        text = int(np.clip(draw.lognormal(6, 0.8), 16, 8000))
        sides = (2 * np.sqrt(draw.uniform(0.05e6, 1e6)) / 28 * draw.uniform(0.7, 1.4, 2)).round().astype(int)
        height, width = np.maximum(sides - sides % 2, 2).tolist()
        grids.append([(1, height, width)] if index % 2 else [])
        lengths.append(text + (height * width // 4 if index % 2 else 0))
    work = [
        training_flops(shape, [n], grid, vision_trains=trains_tower) for n, grid in zip(lengths, grids, strict=True)
    ]
    packs = plan_packs(lengths, 16384)
    packs = packs[: len(packs) // 8 * 8]
    flops = np.array([sum(work[i] for i in members) for members in packs])
    squares = [sum(lengths[i] ** 2 for i in members) for members in packs]
    ratios = {}
    for name, costs in {"attention": squares, "flops": flops}.items():
        steps = []
        for first in range(0, len(packs), 8):
            shares = balance(costs[first : first + 8], 4, equal_counts=True)
            loads = [flops[first : first + 8][share].sum() for share in shares]
            steps.append(max(loads) / np.mean(loads))
        ratios[name] = float(np.mean(steps))
    with capsys.disabled():
        print(f"\ntower trains: {trains_tower}, slowest replica over the mean: {ratios}")
    assert ratios["flops"] < ratios["attention"]
