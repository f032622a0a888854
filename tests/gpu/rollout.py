"""vLLM in the trainer's process: whose log-probabilities it has, what it remembers over sleep, whose weights it runs.

`test_rollout.py` runs this in a process for each dtype, DTYPE: an engine that sleeps wants one of its own.
Called as a program, ``-m tests.gpu.rollout FOLDER``, it prints the greedy responses of an engine that reads FOLDER.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ovr_megatron.coldstart.step_trainer import cross_entropy
from ovr_megatron.config import DataConfig, ParallelConfig, RolloutConfig, Sampling, SourceConfig
from ovr_megatron.data.packing import pack
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.sources import open_source
from ovr_megatron.engine import Engine
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from ovr_megatron.weights.folder import WeightWriter, copy_hf_assets
from tests.gpu.test_model import build

PUZZLES = ("puzzle:digits?form=text&task=sum&answered=0", "puzzle:digits?form=image&task=sum&answered=0")
CLOSE = {"float32": 1e-3, "bfloat16": 0.15}  # of one token's log-probability; the random model's spread is about 1
LENGTH = 256
DTYPE = os.environ.get("DTYPE", "bfloat16")
ROOT = Path(__file__).resolve().parents[2]


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
        return [found.tokens for [found] in self.engine.generate(self.prompts)]


def start(folder: Path, empty: bool) -> tuple[RolloutEngine, Processor, list[Prompt]]:
    torch.backends.cuda.matmul.allow_tf32 = False
    processor = Processor(folder, DataConfig(min_pixels=784, max_pixels=12544))
    config = RolloutConfig(max_num_seqs=32, gpu_memory_utilization=0.2, check_updates=True)
    engine = RolloutEngine(folder, config, processor, DTYPE, LENGTH, empty=empty)
    rows = [open_source(SourceConfig(path=path))[number] for path in PUZZLES for number in range(8)]
    samples = processor.encode(rows, generation=True)
    greedy = Sampling(temperature=0.0, max_tokens=24)
    prompts = [Prompt(s.prompt_tokens, s.images, s.videos, [n], greedy) for n, s in enumerate(samples)]
    return engine, processor, prompts


@pytest.fixture(scope="module")
def both(folders: dict[str, Path], world: World) -> Both:
    folder = folders["untied"]
    trainer = build(folder, world, dtype=DTYPE)
    engine, processor, prompts = start(folder, empty=True)
    engine.update(trainer.held())
    trainer.sample_from(engine.banned, 1.0)
    return Both(folder, trainer, engine, processor, prompts)


def supervised(processor: Processor) -> list[Sample]:
    rows = [open_source(SourceConfig(path="puzzle:digits?form=text&task=sum"))[number] for number in range(8)]
    return processor.encode(rows, generation=False)


def test_log_probabilities_are_the_trainers(both: Both) -> None:
    worst = 0.0
    for sample in supervised(both.processor):
        prompt = Prompt(sample.tokens.tolist())
        [theirs] = both.engine.score([prompt])
        [ours] = both.trainer.scores([pack([sample])])
        found = torch.from_numpy(theirs)[ours.rows]
        allowed = torch.isfinite(found)  # a special token can be in a text, and is never sampled
        assert allowed.any()
        worst = max(worst, float((ours.logprobs.float().cpu() - found)[allowed].abs().max()))
    print(f"{DTYPE}: largest difference of a log-probability {worst:.2e}")
    assert worst < CLOSE[DTYPE]


@pytest.mark.parametrize("deep", [False, True], ids=["level 1", "level 2"])
def test_sleep(both: Both, world: World, deep: bool) -> None:
    """A known output after each wake: with the weights that were asleep, and with those of an update meanwhile.

    The update's trainer holds the tower still, whose weights a deep sleep loses like all others.
    """
    frozen = build(both.folder, world, dtype=DTYPE, freeze_vision=True, freeze_merger=True)
    known = both.greedy()
    both.engine.update(frozen.held())
    awake = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    both.engine.sleep(deep)
    asleep = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if not deep:
        assert both.greedy() == known
        both.engine.sleep()
    both.engine.update(frozen.held())
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
    copy_hf_assets(both.folder, tmp_path / "export")
    command = [sys.executable, "-m", "tests.gpu.rollout", str(tmp_path / "export")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads(done.stdout.splitlines()[-1]) == after


if __name__ == "__main__":
    distributed.start(ParallelConfig(), seed=1)
    fresh, _, asked = start(Path(sys.argv[1]), empty=False)
    print(json.dumps([found.tokens for [found] in fresh.generate(asked)]), flush=True)
    distributed.finish()
