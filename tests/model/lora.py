"""Adapters in every layout, for tests/model/test_lora.py: ``torchrun ... 4 processes ... lora.py MODEL OUT``.

The referee is PEFT on Transformers' model, with the adapter that one of our checkpoints holds.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from ovr_megatron.checkpoint import store
from ovr_megatron.checkpoint.conversion import export_hf
from ovr_megatron.checkpoint.hf_assets import write_hf_assets
from ovr_megatron.checkpoint.manifest import CheckpointError
from ovr_megatron.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, ParallelConfig
from ovr_megatron.config.layout_text import parse_layout
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape, family_of
from ovr_megatron.launch import compose
from ovr_megatron.model.tiny import TinySizes, make_tiny_model
from ovr_megatron.ppo.experience import Models
from ovr_megatron.runtime import distributed
from ovr_megatron.verify import (
    ODD_LENGTHS,
    Reference,
    compare,
    gradient_differences,
    make_documents,
    make_packs,
    objective,
    run_reference,
)
from ovr_megatron.weights.folder import ADAPTER_WEIGHTS, WeightFolder
from ovr_megatron.weights.table import canonical
from tests.model.matrix import WHOLE

LORA = LoraConfig(rank=4, alpha=8, vision=True)
LAYOUTS: tuple[str, ...] = ("dp=4", "tp=2", "pp=2,vpp=2", "cp=2,tp=2,sp=1", "zero=1,tp=2", "zero=1,pp=2")
RECOMPUTED = {"recompute full, pp=2": "pp=2", "recompute selective, tp=2": "tp=2"}
if WHOLE:
    LAYOUTS += ("tp=2,sp=1", "pp=2", "pp=4", "cp=2", "cp=4", "pp=2,tp=2", "zero=1")
    RECOMPUTED["recompute full"] = "dp=4"
SHARED = LAYOUTS if WHOLE else ("zero=1,tp=2", "pp=2,vpp=2", "cp=2")
STEPS = 3
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=0, clip_grad=1.0, weight_decay=0.1)


def build(
    layout: str,
    lora: LoraConfig = LORA,
    folder: Path | None = None,
    critic: bool = False,
    beside: Engine | None = None,
    **model: object,
) -> Engine:
    settings = ModelConfig(path=str(base), lora=lora, **model)
    parallel = ParallelConfig() if layout == "dp=4" else parse_layout(layout)[0]
    engine = Engine(shape, settings, parallel, world, critic, base=beside)
    return engine.with_optimizer(OPTIMIZER, 10).load(WeightFolder(folder or base))


def packs_of(engine: Engine) -> list:
    packs = make_packs(documents, shape, packed=True, critic=engine.critic, at_least=4)
    return packs[engine.groups.dp.rank() :: engine.groups.dp.size()]


def train(engine: Engine, steps: int) -> list[float]:
    return [engine.train(packs_of(engine), objective)["loss"] for _ in range(steps)]


def save(engine: Engine, name: str) -> Path:
    engines = {"critic" if engine.critic else "policy": engine}
    return store.save(out / name, engine.step_count, engines, out / "companions", {}, world)


def refused(path: Path) -> list[str]:
    """Messages of resuming ``path`` beside other weights, with another alpha, and without adapters."""
    other = out / "other"
    if world.is_main:
        sizes = TinySizes(layers=shape.layers)
        make_tiny_model(other, tied=False, seed=6, perturb=True, sizes=sizes, family=shape.family)
    torch.distributed.barrier()
    messages = []
    for engine in (
        build("tp=2", folder=other),
        build("tp=2", LoraConfig(rank=4, alpha=16, vision=True)),
        build("tp=2", LoraConfig()),
    ):
        checkpoint = store.find(path.parent, world)
        assert checkpoint is not None
        try:
            store.restore(checkpoint, {"policy": engine})
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def merged_critic() -> list[str]:
    """Names of the tensors of a critic that was trained by adapters, merged and exported."""
    critic = build("pp=2", critic=True)
    train(critic, 1)
    path = save(critic, "critics")
    if world.is_main:
        export_hf(path, out / "merged critic", critic=True, dtype="bfloat16", workers=1, force=False, merge=True)
    torch.distributed.barrier()
    with WeightFolder(out / "merged critic") as folder:
        assert {folder.dtype(name) for name in folder.names()} == {"BF16"}
        return folder.names()


def peft_reference(adapter: Path, merged: Path) -> tuple[Reference, dict[str, Tensor], float]:
    """Results of PEFT, the gradients of the adapters under the names in the adapter's file, and a difference.

    It is the largest one between a weight that PEFT merges and ours in the folder ``merged``.
    """
    # After `ovr_megatron`, which lets Transformers import torchvision on a machine without a GPU.
    from peft import PeftModel

    model_class = family_of(shape).load_hf_class()
    model = model_class.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    results = run_reference(model, shape, documents)
    gradients = {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in wrapped.named_parameters()
        if parameter.grad is not None
    }
    difference = 0.0
    with WeightFolder(merged) as folder:
        for name, parameter in wrapped.merge_and_unload().named_parameters():
            ours = folder.tensor(canonical(name))
            difference = max(difference, float((parameter.detach() - ours).abs().max()))
    return results, gradients, difference


def row(engine: Engine, theirs: Reference | None, their_gradients: dict[str, Tensor]) -> dict[str, float]:
    """Errors of a layout against PEFT."""
    report = compare(engine, documents, theirs, packed=True)
    ours = {name: tensor.float().clone() for name, tensor in engine.gradients()}
    if theirs is None:
        return {}
    assert ours.keys() == their_gradients.keys()
    return {
        "outputs": max(report.logits.values()) / max(1.0, report.largest_logit),
        "gradients": max(gradient_differences(ours, their_gradients).values()),
        "loss": abs(report.loss - theirs.loss) / theirs.loss,
    }


def logits_of(engine: Engine) -> Tensor:
    return torch.cat([engine.logits(pack) for pack in make_packs(documents, shape, True, False, 2)])


def difference(logits: Tensor, expected: Tensor) -> float:
    """Largest difference of a logit, relative to the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def base_without_adapters(adapter: Path) -> float:
    """Largest difference of a logit between the initial model and one whose adapters are disabled."""
    engine = build("tp=2,sp=1").load_adapter(WeightFolder(adapter, ADAPTER_WEIGHTS))
    with engine.without_adapters():
        disabled = logits_of(engine)
    return float((disabled - logits_of(build("tp=2,sp=1", LoraConfig()))).abs().max())


def shards_are_merged(adapter: Path, merged: Path) -> dict[str, float]:
    """Largest difference between what a rank hands to vLLM and the merged model's rows, over all weights."""
    errors = {}
    with WeightFolder(merged) as folder:
        for layout in ("tp=2", "pp=2"):
            engine = build(layout).load_adapter(WeightFolder(adapter, ADAPTER_WEIGHTS))
            largest = 0.0
            for shard in engine.held():
                tensor = shard.merged()
                for part in shard.ranges:
                    full = folder.tensor(part.tensor)
                    if shard.dim is None:
                        expected, ours = full.flatten(), tensor.flatten()
                        dim = 0
                    else:
                        expected, ours, dim = full, tensor, shard.dim
                    rows = expected.narrow(dim, part.start, part.length)
                    difference = ours.narrow(dim, part.offset, part.length) - rows
                    largest = max(largest, float(difference.abs().max()))
            errors[layout] = largest
    return errors


def resumed() -> dict[str, list[list[float]]]:
    """Losses of three steps after a checkpoint, where it was written, in the same layout, and in others."""
    losses = {}
    writer = build("zero=1,tp=2")
    train(writer, 2)
    path = save(writer, "resumed")
    losses = [train(writer, 3)]
    for layout in ("zero=1,tp=2", "dp=4", "pp=2"):
        engine = build(layout)
        checkpoint = store.find(path.parent, world)
        assert checkpoint is not None
        store.restore(checkpoint, {"policy": engine})
        losses.append(train(engine, 3))
    return {"losses": losses}


def base_storages(engine: Engine) -> dict[str, int]:
    """Address of the storage of every frozen weight but a head."""
    holdings = [holding for holding in engine.live.holdings if engine._is_base(holding)]
    return {holding.row.megatron: holding.parameter.untyped_storage()._cdata for holding in holdings}


def base_bytes(engine: Engine) -> int:
    """Bytes that the frozen weights have on the device, without those that are too small to be offloaded."""
    sizes = [h.parameter.untyped_storage().nbytes() for h in engine.live.holdings if engine._is_base(h)]
    return sum(size for size in sizes if size > 4096)


def one_base(layout: str) -> dict[str, bool]:
    """Train a policy and a critic that share the frozen weights, and a critic that has its own, in turn."""
    policy = build(layout)
    own = build(layout, critic=True)
    sharing = build(layout, critic=True, beside=policy)
    storages = base_storages(policy)
    whole = base_bytes(policy)
    before = logits_of(policy)
    facts = {
        "the same memory": base_storages(sharing) == storages and sharing.shares_base(policy),
        "memory of its own": not set(base_storages(own).values()) & set(storages.values()),
        "most of the weights": 2 * len(storages) > len(policy.live.holdings) - len(policy.trained),
    }
    config = compose("tiny_rl", [f"model.path={base}", "offload=true"])
    models = Models(config, world, Processor(base, config.data), policy, sharing, reference=policy)
    losses = []
    sizes = []
    for _ in range(2):
        models.offload_except(None)
        sizes.append(base_bytes(policy))
        losses.append(train(sharing, 1))
        sizes.append(base_bytes(policy))
        models.offload_except(policy)
        sizes.append(base_bytes(policy))
        models.offload_except(sharing)
        sizes.append(base_bytes(policy))
    facts["offloaded when neither works"] = sizes == [0, whole, whole, whole] * 2
    facts["no bit of a loss"] = losses == [train(own, 1) for _ in range(2)]
    equal = True
    for (_, ours), (_, theirs) in zip(sharing.weights(), own.weights(), strict=True):
        equal &= torch.equal(ours, theirs)
    facts["no bit of an adapter"] = equal
    facts["the policy stays"] = torch.equal(logits_of(policy), before)
    by_rank: list[dict[str, bool]] = [{}] * world.size
    torch.distributed.all_gather_object(by_rank, facts)
    return {fact: all(rank_facts[fact] for rank_facts in by_rank) for fact in facts}


if __name__ == "__main__":
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = distributed.start(ParallelConfig(), seed=0, threads=1)
    shape = ModelShape.from_hf(base)
    documents = make_documents(shape, texts=ODD_LENGTHS)
    if world.is_main:
        write_hf_assets(out / "companions", Processor(base, DataConfig()))
    writer = build("tp=2,sp=1")
    begin = logits_of(writer)
    unchanged = difference(begin, logits_of(build("dp=4", LoraConfig())))
    written_losses = train(writer, STEPS)
    checkpoint = save(writer, "checkpoints")
    adapter = checkpoint / "policy"
    merged = out / "merged"
    theirs, their_gradients, merge_difference = None, {}, 0.0
    if world.is_main:
        export_hf(checkpoint, merged, critic=False, dtype=None, workers=1, force=False, merge=True)
        theirs, their_gradients, merge_difference = peft_reference(adapter, merged)
    torch.distributed.barrier()
    merged_logits = logits_of(build("dp=4", LoraConfig(), merged))
    table, merge_errors = {}, {}
    for layout in LAYOUTS:
        engine = build(layout).load_adapter(WeightFolder(adapter, ADAPTER_WEIGHTS))
        merge_errors[layout] = difference(logits_of(engine), merged_logits)
        table[layout] = row(engine, theirs, their_gradients)
    for name, layout in RECOMPUTED.items():
        engine = build(layout, recompute=name.split()[1].rstrip(","))
        engine.load_adapter(WeightFolder(adapter, ADAPTER_WEIGHTS))
        table[name] = row(engine, theirs, their_gradients)
    results = {
        "table": table,
        "one base": {layout: one_base(layout) for layout in SHARED},
        "unchanged at the start": unchanged,
        "losses": {layout: train(build(layout), STEPS) for layout in ("tp=2,sp=1", "dp=4", "pp=2", "zero=1,cp=2")},
        "written losses": written_losses,
        "merged by PEFT": merge_difference,
        "merged": merge_errors,
        "without adapters": base_without_adapters(adapter),
        "shards": shards_are_merged(adapter, merged),
        "resumed": resumed()["losses"],
        "refused": refused(checkpoint),
        "merged critic": merged_critic(),
        "trained": len(writer.trained_rows),
    }
    if world.is_main:
        (out / "results.json").write_text(json.dumps(results, indent=1))
    distributed.finish()
