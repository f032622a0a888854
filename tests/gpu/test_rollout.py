"""vLLM in the trainer's process: whose log-probabilities it has, what it remembers over sleep, whose weights it runs.

Nothing here needs a GPU but the last assertions of `test_sleep`: ``ANYWHERE=1 pytest tests/gpu/test_rollout.py``.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ovr_megatron.coldstart import cross_entropy
from ovr_megatron.config import DataConfig, RolloutConfig, SourceConfig
from ovr_megatron.data.packing import pack
from ovr_megatron.data.processing import Processor, Sample
from ovr_megatron.data.sources import open_source
from ovr_megatron.engine import Engine
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightWriter, copy_companions
from tests.gpu.test_model import build

PUZZLES = ("puzzle:digits?form=text&task=sum&answered=0", "puzzle:digits?form=image&task=sum&answered=0")
CLOSE = {"float32": 1e-3, "bfloat16": 0.15}  # of one token's log-probability; the random model's spread is about 1
LENGTH = 256


@dataclass
class Both:
    """Trainer and engine with the same weights, and prompts with and without images."""

    folder: Path
    trainer: Engine
    engine: RolloutEngine
    processor: Processor
    prompts: list[Prompt]

    def greedy(self) -> list[list[int]]:
        """Tokens of the greedy responses."""
        return [found.tokens for [found] in self.engine.generate(self.prompts, 0.0)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def both(request: pytest.FixtureRequest, folders: dict[str, Path], world: World) -> Both:
    folder, dtype = folders["untied"], request.param
    torch.backends.cuda.matmul.allow_tf32 = False
    processor = Processor(folder, DataConfig(min_pixels=784, max_pixels=12544))
    trainer = build(folder, world, dtype=dtype, layers="local" if not torch.cuda.is_available() else "auto")
    config = RolloutConfig(max_num_seqs=32, gpu_memory_utilization=0.2, check_updates=True)
    engine = RolloutEngine(folder, config, processor, dtype, LENGTH)
    engine.update(trainer.held())
    trainer.sample_from(engine.banned, 1.0)
    rows = [open_source(SourceConfig(path=path))[number] for path in PUZZLES for number in range(8)]
    samples = processor.encode(rows, generation=True)
    prompts = [Prompt(s.prompt_tokens, s.images, s.videos, [n], 24) for n, s in enumerate(samples)]
    return Both(folder, trainer, engine, processor, prompts)


def supervised(processor: Processor) -> list[Sample]:
    rows = [open_source(SourceConfig(path="puzzle:digits?form=text&task=sum"))[number] for number in range(8)]
    return processor.encode(rows, generation=False)


def test_log_probabilities_are_the_trainers(both: Both) -> None:
    worst = 0.0
    for sample in supervised(both.processor):
        prompt = Prompt(sample.tokens.tolist(), seeds=[0], max_tokens=1)
        [theirs] = both.engine.score([prompt])
        [ours] = both.trainer.scores([pack([sample])])
        found = torch.from_numpy(theirs)[ours.rows]
        allowed = torch.isfinite(found)  # a special token can be in a text, and is never sampled
        assert allowed.any()
        worst = max(worst, float((ours.logprobs.float().cpu() - found)[allowed].abs().max()))
    dtype = str(both.trainer.config.params_dtype).removeprefix("torch.")
    print(f"{dtype}: largest difference of a log-probability {worst:.2e}")
    assert worst < CLOSE[dtype]


@pytest.mark.parametrize("deep", [False, True], ids=["level 1", "level 2"])
def test_sleep(both: Both, deep: bool) -> None:
    """A known output after each wake: with the weights that were asleep, and with those of an update meanwhile."""
    known = both.greedy()
    awake = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    both.engine.sleep(deep)
    asleep = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if not deep:
        assert both.greedy() == known
        both.engine.sleep()
    both.engine.update(both.trainer.held())
    assert both.greedy() == known
    if torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1]
        print(f"sleep gives back {(asleep - awake) / 2**30:.2f} GiB")
        assert asleep - awake > 0.1 * total


def test_an_update_reaches_the_engine(both: Both, tmp_path: Path) -> None:
    """After steps that change every tensor the engine answers as a fresh one that reads the trainer's export."""
    before = both.greedy()
    packs = [pack(supervised(both.processor))]
    for _ in range(10):
        both.trainer.train(packs, cross_entropy)
    both.engine.sleep()
    both.engine.update(both.trainer.held())
    after = both.greedy()
    assert after != before
    both.engine.sleep()
    with WeightWriter(tmp_path / "export") as writer:
        for name, tensor in both.trainer.weights():
            writer.add(name, tensor)
    copy_companions(both.folder, tmp_path / "export")
    config = RolloutConfig(max_num_seqs=32, gpu_memory_utilization=0.2)
    dtype = str(both.trainer.config.params_dtype).removeprefix("torch.")
    fresh = RolloutEngine(tmp_path / "export", config, both.processor, dtype, LENGTH)
    assert [found.tokens for [found] in fresh.generate(both.prompts, 0.0)] == after
    fresh.sleep()
