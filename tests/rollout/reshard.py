"""Ranks of `test_reshard`: engines whose weights come from trainers in many layouts; ``reshard.py FOLDER``.

An engine that was just built from a folder says what to expect.  A trainer then takes it to other weights and back.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ovr_megatron.config import ModelConfig, ParallelConfig, RolloutConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.engine import Engine
from ovr_megatron.families import ModelShape
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.reshard import TransferError
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightFolder
from tests.model.matrix import WHOLE

LAYOUTS = {
    "dp": ParallelConfig(),
    "tp": ParallelConfig(tp=2),
    "pp": ParallelConfig(pp=2),
    "vpp": ParallelConfig(pp=2, vpp=2),
    "cp": ParallelConfig(cp=2),
    "tp, pp": ParallelConfig(tp=2, pp=2),
    "zero": ParallelConfig(distributed_optimizer=True, overlap=True),
}
UNTIED = ("vpp", "tp, pp", "zero")  # the layouts that are enough where the head has weights of its own
if not WHOLE:  # nor are those of a tied head met again without it
    LAYOUTS, UNTIED = {name: LAYOUTS[name] for name in ("dp", "tp", "tp, pp", "zero")}, ("tp, pp",)


def same(found: list, expected: list) -> bool:
    """Whether all tokens and log-probabilities are those, bit for bit."""
    return all(
        a.tokens == b.tokens and a.logprobs.tobytes() == b.logprobs.tobytes()
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def main(folder: Path) -> None:
    """Read ``job.pickle``, write ``rank_N.pickle``."""
    job = pickle.loads((folder / "job.pickle").read_bytes())
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    report: dict[str, object] = {}
    for tied, (old, new) in job["models"].items():
        processor = Processor(new, job["data"])
        config = RolloutConfig(tp=job["tp"], max_num_seqs=16, bucket_mib=0.25, check_updates=True)
        engine = RolloutEngine(new, config, processor, "float32", 256)
        expected = engine.generate(job["prompts"])
        report[f"{tied} fresh"] = expected
        for name, parallel in LAYOUTS.items():
            if not tied and name not in UNTIED:
                continue
            if job["layouts"] and name not in job["layouts"] and not WHOLE:
                continue
            trainer = Engine(ModelShape.from_hf(new), ModelConfig(path=str(new)), parallel, world)
            engine.update(trainer.load(WeightFolder(old)).held())
            other = engine.generate(job["prompts"])
            traffic = engine.update(trainer.load(WeightFolder(new)).held())
            again = engine.generate(job["prompts"])
            largest = max(sum(p.padded_bytes for p in step.sends + step.receives) for step in engine._reshard._plans[0])
            steps = len(engine._reshard._plans[0])
            report[f"{tied} {name}"] = (same(other, expected), same(again, expected), traffic, largest, steps)
        frozen = ModelConfig(path=str(new), freeze_vision=True)
        trainer = Engine(ModelShape.from_hf(new), frozen, ParallelConfig(pp=2), world).load(WeightFolder(new))
        whole, later = engine.update(trainer.held()), engine.update(trainer.held())
        lose_memory(engine, processor.shape)
        woken = engine.update(trainer.held())
        # Texts first: what a batch with images writes must not hide what the sleep has left.
        texts = [i for i, prompt in enumerate(job["prompts"]) if not prompt.images and not prompt.videos]
        first = engine.generate([job["prompts"][i] for i in texts])
        all_same = same(first, [expected[i] for i in texts]) and same(engine.generate(job["prompts"]), expected)
        report[f"{tied} frozen"] = (whole, later, woken, bool(texts) and all_same)
        report[f"{tied} damage"] = damaged(engine, trainer, world.rank)
        if tied:
            report[f"{tied} bfloat16 tp"] = update_bfloat16(job, old, new, world)
    (folder / f"rank_{world.rank}.pickle").write_bytes(pickle.dumps(report))
    dist.barrier()
    distributed.finish()


def lose_memory(engine: RolloutEngine, shape: ModelShape) -> None:
    """Put an engine to a deep sleep; on a GPU the sleep itself would take its weights and the model's other memory."""
    engine.sleep(deep=True)
    memory = [parameter.parameter.data for parameter in engine._reshard._targets]
    # Features for the first layers, where the model has them: a list, which is neither parameters nor buffers.
    features = getattr(engine._model, "deepstack_input_embeds", None) or []
    assert len(features) == shape.vision.layer_features
    memory += features
    for tensor in memory:
        tensor.fill_(float("nan"))


def update_bfloat16(job: dict[str, Any], old: Path, new: Path, world: World) -> tuple[object, ...]:
    """Update an engine of bfloat16 weights, whose head makes float32 logits from the embedding, over a deep sleep."""
    config = RolloutConfig(tp=job["tp"], max_num_seqs=16, bucket_mib=0.125, check_updates=True)
    processor = Processor(new, job["data"])
    engine = RolloutEngine(new, config, processor, "bfloat16", 256)
    expected = engine.generate(job["prompts"])
    model = ModelConfig(path=str(new), dtype="bfloat16")
    trainer = Engine(ModelShape.from_hf(new), model, ParallelConfig(tp=2), world)
    engine.update(trainer.load(WeightFolder(old)).held())
    other = engine.generate(job["prompts"])
    lose_memory(engine, processor.shape)
    traffic = engine.update(trainer.load(WeightFolder(new)).held())
    again = engine.generate(job["prompts"])
    steps = engine._reshard._plans[0]
    largest = max(sum(p.padded_bytes for p in step.sends + step.receives) for step in steps)
    return same(other, expected), same(again, expected), traffic, largest, len(steps)


def damaged(engine: RolloutEngine, trainer: Engine, rank: int) -> str:
    """What the checksums say of a bucket that changes on its way to the last rank."""
    arrived = torch.Tensor.copy_
    held = trainer.held()
    addresses = {one.parameter.untyped_storage().data_ptr() for one in held}

    def copy(self: torch.Tensor, source: torch.Tensor, *rest: object) -> torch.Tensor:
        arrived(self, source, *rest)
        if source.untyped_storage().data_ptr() not in addresses and source.numel() > 1 and rank == 3:
            self[(0,) * self.ndim] += 1  # a place that a message fills
        return self

    torch.Tensor.copy_ = copy  # type: ignore[method-assign, assignment]
    try:
        engine.update(held)
    except TransferError as error:
        return str(error)
    finally:
        torch.Tensor.copy_ = arrived  # type: ignore[method-assign]
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
