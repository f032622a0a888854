"""The model on a GPU: Transformer Engine's layers beside ours and beside Transformers, FP8 training, the head."""

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ovr_megatron.coldstart.step_trainer import cross_entropy
from ovr_megatron.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, SourceConfig
from ovr_megatron.data.packing import Pack, pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.stream import open_stream
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.model.context import rank_rows
from ovr_megatron.model.heads import token_scores
from ovr_megatron.model.transformer_config import DTYPES
from ovr_megatron.runtime.distributed import World
from ovr_megatron.verify import ODD_LENGTHS, compare, make_documents, reference
from ovr_megatron.weights.folder import WeightFolder

FP8_STEPS = 200


def build(folder: Path, world: World, critic: bool = False, **model: object) -> Engine:
    settings = ModelConfig(path=str(folder), **model)  # type: ignore[arg-type]
    engine = Engine(ModelShape.from_hf(folder), settings, ParallelConfig(), world, critic)
    return engine.with_optimizer(OptimizerConfig(lr=1e-3, warmup_steps=10), FP8_STEPS).load(WeightFolder(folder))


@pytest.mark.parametrize(
    ("layers", "dtype"), [("local", "float32"), ("local", "bfloat16"), ("transformer_engine", "bfloat16")]
)
@pytest.mark.parametrize("name", ["tied", "untied"])
@pytest.mark.parametrize("critic", [False, True], ids=["policy", "critic"])
def test_parity(folders: dict[str, Path], world: World, layers: str, dtype: str, name: str, critic: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found = make_documents(ModelShape.from_hf(folders[name]), texts=ODD_LENGTHS)
    engine = build(folders[name], world, critic, layers=layers, dtype=dtype)
    theirs = reference(folders[name], found, DTYPES[dtype], critic)
    report = compare(engine, found, theirs, packed=True)
    print(layers, dtype, name, max(report.logits.values()), report.worst_gradient)
    assert report.passed


def test_both_kinds_of_layers_have_the_same_parameters(folders: dict[str, Path], world: World) -> None:
    engines = [build(folders["untied"], world, layers=layers) for layers in ("local", "transformer_engine")]
    ours, theirs = ({h.row.megatron: h.parameter.shape for h in engine.live.holdings} for engine in engines)
    assert ours == theirs


@pytest.mark.parametrize("cp", [2, 4])
def test_the_rows_of_a_rank_are_transformer_engines(cp: int) -> None:
    import transformer_engine_torch as tex

    bounds = [0, 8 * cp, 10 * cp, 24 * cp]
    for rank in range(cp):
        theirs = tex.thd_get_partitioned_indices(
            torch.tensor(bounds, dtype=torch.int32, device="cuda"), bounds[-1], cp, rank
        )
        assert rank_rows(bounds, cp, rank).tolist() == theirs.tolist()


def text_packs(folder: Path, count: int) -> list[Pack]:
    config = DataConfig(sources=[SourceConfig(path="puzzle:digits?form=text&task=sum")])
    processor, stream = Processor(folder, config), open_stream(config, 1)
    return [pack(processor.encode(list(islice(stream, 32)), generation=False)) for _ in range(count)]


@pytest.mark.parametrize("fp8", ["delayed", "current", "block"])
def test_eight_bit_training_follows_sixteen_bit_training(folders: dict[str, Path], world: World, fp8: str) -> None:
    packs = text_packs(folders["untied"], FP8_STEPS)
    curves = {}
    for kind in ("none", fp8):
        engine = build(folders["untied"], world, layers="transformer_engine", dtype="bfloat16", fp8=kind)
        curves[kind] = torch.tensor([engine.train([p], cross_entropy)["loss"] for p in packs])
    wide, narrow = (curves[kind].unfold(0, 20, 20).mean(-1) for kind in ("none", fp8))
    difference = ((narrow - wide) / wide).abs()
    print(fp8, f"largest difference over 20 steps: {float(difference.max()):.2%}")
    assert wide[-1] < 0.5 * wide[0]
    assert difference.max() < 0.01


def peak_and_seconds(work: Callable[[], None]) -> tuple[int, float]:
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, began = torch.cuda.memory_allocated(), time.perf_counter()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, time.perf_counter() - began


def test_the_head_at_full_size(world: World) -> None:
    tokens, vocabulary, width = 65536, 152064, 3584
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(0.02 * torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16))
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
    banned = torch.zeros(vocabulary, dtype=torch.bool, device="cuda")
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)

    def ours() -> None:
        logprobs, _ = token_scores(hidden, weight, labels, banned, 1.0, world.groups.tp)
        (-logprobs.mean()).backward()

    def naive() -> None:  # a quarter of the rows at a time: all of them do not fit
        for rows, targets in zip(hidden.split(tokens // 4), labels.split(tokens // 4), strict=True):
            F.cross_entropy((rows @ weight.t()).float(), targets, reduction="sum").backward()

    peak, seconds = peak_and_seconds(ours)
    _, naive_seconds = peak_and_seconds(naive)
    print(f"head: {peak / 2**30:.2f} GiB, {seconds / naive_seconds:.2f} times the naive time")
    assert peak <= 3e9
