"""The plan's simulator beside a rank that trains and one that generates: ``tests/soak/tail_split.py [--iterations N]``.

Engine steps and training are timed in a run that takes turns and in one that generates ahead, and rates fitted to each:
those of an engine's step (`tests/soak/tail.py`), seconds of training for a token, and of an iteration beside it.  Two
processes that are at work slow each other down on most CPUs, as two GPUs do not: a way has the rates of the run that is
like it.  Runs on other prompts are measured, and simulated with those rates and the same lengths, which are decided
beforehand.  Exits 1 if the seconds of an iteration differ by more than 15 %, or the share of time in which the ranks do
nothing by more than 15 % of it and 3 points.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tail import force_lengths, make_config
from ovr_megatron.config import ParallelConfig, RLConfig
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.plan.decoding import DecodeRates
from ovr_megatron.plan.modes import Mode, Setup, generate
from ovr_megatron.plan.simulation import summarise_mode
from ovr_megatron.ppo.rollouts import Rollout, Rollouts
from ovr_megatron.rl import serving, training
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.distributed import World
from tests.soak.tail import BETWEEN, BOUND, POINTS, StepTimes, StreamLengths, rates_of

FIRST = 3  # iterations that start a run, which are not compared
ENGINE_SEQS = 64
FITTED_SEED, MEASURED_SEED = 11, 12
MODES = (
    Mode("static", generators=1),
    Mode("static", staleness=1, generators=1),
    Mode("static", oversample=0.5, staleness=2, generators=1),
    Mode("static", generators=1, parts=3),
)


@dataclass
class Side:
    """What this rank does in a run, and how long.

    Attributes:
        times: of the engine's steps.
        engine_s: of each iteration, seconds of the engine; the rank that trains has none.
        begins: seconds at which each iteration began on the rank that trains, and the end of the last.
        waited_s: of each iteration, what this rank waited for responses.
        tokens: of each iteration, those of prompts and responses that are trained on.
    """

    times: StepTimes
    engine_s: list[float]
    begins: list[float]
    waited_s: list[float]
    tokens: list[int]

    def clear(self) -> None:
        """Begin another run."""
        self.times.clear()
        for values in (self.engine_s, self.begins, self.waited_s, self.tokens):
            values.clear()


def watch(side: Side) -> None:
    """Record what this process does from now on, and decide the lengths of responses beforehand."""
    start_engine, collect, iterate = serving.start_engine, Rollouts.collect, training.iterate_split

    def start_and_force(config: RLConfig, *rest: Any) -> RolloutEngine:
        engine = start_engine(config, *rest)
        force_lengths(engine, config.responses, BETWEEN)
        side.times.watch(engine)
        return engine

    def collect_and_time(rollouts: Rollouts, *rest: Any) -> Rollout:
        rollout = collect(rollouts, *rest)
        position = rollout.timeline.activities.index("engine")
        side.engine_s.append(rollout.timeline.ends[position] - rollout.timeline.ends[position - 1])
        side.times.end_round(counts=True)
        return rollout

    def iterate_and_time(*rest: Any) -> Any:
        side.begins.append(time.perf_counter())
        result = iterate(*rest)
        side.waited_s.append(result.metrics["timing/generate"])
        side.tokens.append(sum(result.rollout.train_prompts.values()))
        return result

    vars(serving)["start_engine"] = start_and_force
    Rollouts.collect = collect_and_time  # type: ignore[method-assign]
    vars(training)["iterate_split"] = iterate_and_time


def run(world: World, config: RLConfig, mode: Mode, seed: int, name: str, side: Side, folder: Path) -> dict[str, Any]:
    """Run ``mode`` on both ranks; return what they did.  A collective of all ranks."""
    assert world.job is not None
    side.clear()
    rollout = replace(
        config.rollout,
        ranks=1,
        schedule=mode.schedule,
        oversample=mode.oversample,
        max_staleness=mode.staleness,
        stream_parts=mode.parts,
    )
    run_folder = str(folder / name)
    config = replace(config, rollout=rollout, run=replace(config.run, seed=seed, dir=run_folder))
    sides = world if world.job.generates else replace(world, layout=world.arrange(config.parallel))
    training.train(config, sides)
    side.begins.append(time.perf_counter())
    own = {"engine_s": side.engine_s, "begins": side.begins, "waited_s": side.waited_s, "tokens": side.tokens}
    trainer = world.job.broadcast(own, 0)
    generator = world.job.broadcast(own, 1)
    return trainer | {"engine_s": generator["engine_s"]}


@dataclass(frozen=True)
class Rates:
    """What is fitted to a run.

    Attributes:
        decode: of an engine's step.
        train_s: seconds of training for a token.
        update_s: those of an iteration that do not depend on its tokens.
    """

    decode: DecodeRates
    train_s: float
    update_s: float


def fit(world: World, record: dict[str, Any], side: Side) -> Rates:
    """Return the rates of a run.  A collective of all ranks."""
    assert world.job is not None
    rows, step_s, prompt_tokens = world.job.broadcast(
        (side.times.rows, side.times.seconds, side.times.prompt_tokens), 1
    )
    decode = rates_of(np.array(rows, dtype=float), np.array(step_s), float(np.mean(prompt_tokens)))
    seconds = (np.diff(record["begins"]) - record["waited_s"])[FIRST:-1]
    columns = np.column_stack([record["tokens"][FIRST:-1], np.ones(len(seconds))])
    token_s, iteration_s = np.linalg.lstsq(columns, seconds, rcond=None)[0]
    return Rates(decode, float(token_s), float(iteration_s))


def measured_row(record: dict[str, Any]) -> tuple[float, float]:
    """Return the seconds of an iteration and the share of both ranks' time in which they do nothing."""
    # Without the last one, in which nothing is generated ahead and a checkpoint is written.
    walls = np.diff(record["begins"])[FIRST:-1]
    waited = np.array(record["waited_s"])[FIRST:-1]
    engine = np.array(record["engine_s"])[FIRST:-1]
    busy = (walls - waited).sum() + engine.sum()
    return float(walls.mean()), float(1 - busy / (2 * walls.sum()))


def simulated_row(config: RLConfig, mode: Mode, rates: Rates, tokens: list[int]) -> tuple[float, float]:
    """Return the same, simulated; ``tokens`` are those that the iterations of the run trained on."""
    lengths = StreamLengths(replace(config, run=replace(config.run, seed=MEASURED_SEED)), 0)
    # That of both ranks, of which one trains.
    train_s = rates.train_s / 2
    setup = Setup(2, 1, rates.decode, ENGINE_SEQS, ENGINE_SEQS, config.prompts, lengths, train_s, rates.update_s)
    rounds = list(generate(setup, mode, len(tokens) - 1))
    # No clock decides what a round has, so that the simulator must have the same prompts in each.
    assert [generated.tokens for generated in rounds] == tokens[:-1], mode.name
    summary = summarise_mode(setup, mode, rounds)
    return summary["iteration_s"], summary["gpu_idle"]


def run_rank(iterations: int, prompts: int) -> None:
    """Measure and simulate on this rank; the first one prints."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1, generators=1)
    assert world.job is not None
    folder = Path(world.job.broadcast(tempfile.mkdtemp() if world.job.rank == 0 else "", 0))
    if world.job.rank == 0:
        make_tiny_model(folder / "model", tied=True, seed=1)
    world.job.broadcast(None, 0)
    config = make_config(folder, prompts)
    rollout = replace(config.rollout, max_num_seqs=ENGINE_SEQS)
    settings = replace(config.run, save_every=10_000, peak_tflops=1.0)
    config = replace(config, rollout=rollout, run=settings, iterations=iterations)
    side = Side(StepTimes(), [], [], [], [])
    watch(side)
    # Parts are without a critic, whose values would have training wait for all responses.
    algorithm = replace(config.algorithm, estimator="grpo", critic_warmup_iterations=0)
    grpo = replace(config, algorithm=algorithm)
    turns, ahead, *_ = MODES
    fitted = []
    for k, (mode, settings) in enumerate(((turns, config), (ahead, config), (ahead, grpo))):
        fitted.append(fit(world, run(world, settings, mode, FITTED_SEED, f"fitted{k}", side, folder), side))
    for k, mode in enumerate(MODES):
        settings = grpo if mode.parts else config
        record = run(world, settings, mode, MEASURED_SEED, f"measured{k}", side, folder)
        if world.job.rank == 0:
            iteration_s, idle = measured_row(record)
            rates = fitted[2 if mode.parts else min(mode.staleness, 1)]
            simulated_s, simulated_idle = simulated_row(config, mode, rates, record["tokens"])
            row = {"name": mode.name, "seconds": iteration_s, "simulated_s": simulated_s}
            row |= {"idle_share": idle, "simulated_idle": simulated_idle, **asdict(rates)}
            print(json.dumps(row), flush=True)
    world.job.broadcast(None, 0)
    if world.job.rank == 0:
        shutil.rmtree(folder)
    distributed.finish()


def main() -> int:
    """Start the ranks, print the table, and return 1 where a way is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=16, help="of each run")
    parser.add_argument("--prompts", type=int, default=6, help="of an iteration")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments.iterations, arguments.prompts)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--rank"]
    command += ["--iterations", str(arguments.iterations), "--prompts", str(arguments.prompts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name"')]
    for name, row in (("in turns", rows[0]), ("at the same time", rows[1])):
        decode = ", ".join(f"{key} {1e6 * value:.2f} us" for key, value in row["decode"].items())
        print(f"{name}: training {1e6 * row['train_s']:.1f} us a token and {row['update_s']:.3f} s, a step {decode}")
    print(f"{'':42}{'seconds':>9}{'simulated':>11}{'idle':>8}{'simulated':>11}")
    failed = len(rows) < len(MODES)
    for row in rows:
        within = abs(row["simulated_s"] / row["seconds"] - 1) <= BOUND
        difference = abs(row["simulated_idle"] - row["idle_share"])
        within &= difference <= max(BOUND * row["idle_share"], POINTS)
        failed |= not within
        print(
            f"{row['name']:42}{row['seconds']:9.3f}{row['simulated_s']:11.3f}{row['idle_share']:8.1%}"
            f"{row['simulated_idle']:11.1%}{'' if within else '  OUT OF BOUNDS'}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
