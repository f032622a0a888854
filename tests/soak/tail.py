"""The plan's simulator beside two engines of this machine: ``tests/soak/tail.py [--blocks N] [--json FILE]``.

Steps of the engines are timed in rounds of several sizes, and an engine's rates fitted to them.  Rounds of each way are
measured in turns with these, on other prompts, and simulated with those rates and the same lengths, which are decided
beforehand as in ``ovr bench tail``.  Exits 1 if a way's seconds differ by more than 15 %, or its idle share by
more than 15 % of it and 3 points.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tail import LONGEST, force_lengths, make_config, response_lengths
from ovr_megatron.config import ParallelConfig, RLConfig
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.plan.decoding import DecodeRates
from ovr_megatron.plan.lengths import Problem
from ovr_megatron.plan.modes import Mode, Setup, generate
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.ppo.timeline import Timeline, gather_timeline
from ovr_megatron.ppo.unfinished import UnfinishedResponses
from ovr_megatron.rl.setup import build_models, build_rollouts, open_model_and_prompts
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime import distributed

BETWEEN = 0.5
BOUND = 0.15
POINTS = 0.03
RANKS = 2
# Schedules and multiples of the prompts to which rates are fitted, so that batches of all sizes are timed.
FITTED: tuple[tuple[Literal["static", "shared"], int], ...] = (("static", 1), ("static", 2), ("shared", 2))
BLOCK = 6  # iterations: two cycles of two short rounds and a long one
QUEUE_SEQS, ENGINE_SEQS = 8, 64
MODES = (
    Mode("static"),
    Mode("shared"),
    Mode("static", oversample=0.5),
    Mode("shared", oversample=0.5),
    Mode("static", oversample=0.5, staleness=1),
    Mode("shared", oversample=0.5, staleness=1),
)


@dataclass
class StepTimes:
    """What an engine's steps worked on, and the seconds from the begin of each to the begin of the next one."""

    rows: list[tuple[int, int, int]] = field(default_factory=list)  # running, their context, prompts that start
    seconds: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._begin_round()

    def clear(self) -> None:
        """Forget the steps so far."""
        for values in (self.rows, self.seconds, self.prompt_tokens):
            values.clear()
        self._begin_round()

    def _begin_round(self) -> None:
        self.running = self.context = self.started = 0
        self.sizes: dict[str, int] = {}
        self.begins: list[float] = []
        self.round_rows: list[tuple[int, int, int]] = []

    def end_round(self, counts: bool) -> None:
        """Add the steps of the round, but for the last one, which has no successor."""
        if counts:
            self.seconds += np.diff(self.begins).tolist()
            self.rows += self.round_rows[:-1]
        self._begin_round()

    def watch(self, engine: RolloutEngine) -> None:
        """Record the steps of ``engine`` from now on."""
        enqueue, step = engine._enqueue, engine._llm.llm_engine.step

        def enqueue_and_count(prompt: Prompt) -> list[tuple[str, int]]:
            requests = enqueue(prompt)
            lengths = response_lengths(prompt.tokens, len(prompt.seeds), BETWEEN)
            self.started += 1
            self.prompt_tokens.append(len(prompt.tokens))
            for (request, _), length in zip(requests, lengths, strict=True):
                self.sizes[request.partition("-")[0]] = len(prompt.tokens) + length
                self.running += 1
                self.context += len(prompt.tokens)
            return requests

        def step_and_count() -> list:
            self.begins.append(time.perf_counter())
            self.round_rows.append((self.running, self.context, self.started))
            self.started = 0
            outputs = step()
            self.context += self.running
            for output in outputs:
                if output.finished:
                    self.running -= 1
                    self.context -= self.sizes.pop(output.request_id)
            return outputs

        engine._enqueue = enqueue_and_count
        engine._llm.llm_engine.step = step_and_count


def fit_rates(times: StepTimes) -> DecodeRates:
    """Return the rates of the steps, by least squares over those of all ranks.  A collective."""
    parts: list = [None] * RANKS
    dist.all_gather_object(parts, (times.rows, times.seconds, times.prompt_tokens))
    rows = np.array([row for part in parts for row in part[0]], dtype=float)
    seconds = np.array([value for part in parts for value in part[1]])
    prompt_tokens = float(np.mean([tokens for part in parts for tokens in part[2]]))
    return rates_of(rows, seconds, prompt_tokens)


def rates_of(rows: np.ndarray, seconds: np.ndarray, prompt_tokens: float) -> DecodeRates:
    """Return the rates of steps by least squares.

    Args:
        rows: [n, 3], as of `StepTimes`.
        seconds: [n].
        prompt_tokens: of a prompt, on average.
    """
    columns = np.column_stack([np.ones(len(rows)), rows])
    step_s, sequence_s, context_s, prompt_s = np.linalg.lstsq(columns, seconds, rcond=None)[0]
    return DecodeRates(step_s, sequence_s, context_s, prompt_s / prompt_tokens)


class StreamLengths:
    """The prompts of a run's stream with the lengths that the engines are forced to."""

    basis = "forced"

    def __init__(self, config: RLConfig, skip: int):
        self.stream = open_model_and_prompts(config, SkippedRows())[1]
        self.stream.draw(skip)
        self.problems: list[Problem] = []

    def problem(self, index: int) -> Problem:
        while len(self.problems) <= index:
            (row,) = self.stream.draw(1)
            (sample,) = self.stream.processor.encode([row], generation=True)
            lengths = response_lengths(sample.prompt_tokens, 4, BETWEEN)
            self.problems.append(Problem(len(sample.prompt_tokens), tuple(lengths)))
        return self.problems[index]


@dataclass
class Measured:
    """Seconds of rounds: of the last engine, and of all engines on average."""

    seconds: float = 0.0
    busy_s: float = 0.0

    def add(self, engine_s: Sequence[float]) -> None:
        self.seconds += max(engine_s)
        self.busy_s += sum(engine_s) / len(engine_s)

    @property
    def idle_share(self) -> float:
        return 1 - self.busy_s / self.seconds


def measure(rollouts: Rollouts, config: RLConfig, skip: int, times: StepTimes, fits: bool, measured: Measured) -> None:
    """Add `BLOCK` iterations, after one that warms up, with the prompts after the first ``skip``.  A collective.

    Their steps are added to ``times`` where ``fits`` says so.
    """
    rollouts.config = config
    rollouts.unfinished = UnfinishedResponses()
    stream = open_model_and_prompts(config, SkippedRows())[1]
    stream.draw(skip)
    for iteration in range(BLOCK + 1):
        dist.barrier()
        timeline = Timeline()
        rollouts.collect(stream, iteration, config.curriculum[0].max_tokens, timeline)
        record = gather_timeline(timeline, [], LONGEST)
        position = record["activities"].index("engine")
        if iteration:
            measured.add([ends[position] - ends[position - 1] for ends in record["ends"]])
        rollouts.engine.sleep()
        times.end_round(counts=fits and iteration > 0)


def run_rank(blocks: int, prompts: int) -> None:
    """Measure and simulate on this rank; the first one prints."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    names = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(names)
    folder = Path(names[0])
    if world.is_main:
        make_tiny_model(folder / "model", tied=True, seed=1)
    dist.barrier()
    config = make_config(folder, prompts)
    # Few for each engine, so that both have work from the begin on, and the queue decides.
    config = replace(config, rollout=replace(config.rollout, max_num_seqs=QUEUE_SEQS))
    model_folder, stream = open_model_and_prompts(config, SkippedRows())
    models, _ = build_models(config, model_folder, stream.processor, world, training=False)
    engine_rollout = replace(config.rollout, max_num_seqs=ENGINE_SEQS)
    rollouts = build_rollouts(replace(config, rollout=engine_rollout), model_folder, stream.processor, models)
    force_lengths(rollouts.engine, config.responses, BETWEEN)
    times = StepTimes()
    measured = {mode: Measured() for mode in MODES}
    simulated = {mode: Measured() for mode in MODES}
    with rollouts.grader:
        times.watch(rollouts.engine)
        # In turns, and each block with rates of its own: the machine may be faster at one time than at another.
        for block in range(blocks):
            times.clear()
            modes = list(MODES)
            for schedule, count in FITTED:
                rollout = replace(config.rollout, schedule=schedule)
                fitted = replace(config, rollout=rollout, prompts=count * prompts)
                measure(rollouts, fitted, 200 * block, times, True, Measured())
                for mode in modes[: len(MODES) // len(FITTED)]:
                    modes.remove(mode)
                    rollout = replace(
                        config.rollout,
                        schedule=mode.schedule,
                        oversample=mode.oversample,
                        max_staleness=mode.staleness,
                    )
                    settings = replace(config, rollout=rollout)
                    measure(rollouts, settings, 5_000 + 200 * block, times, False, measured[mode])
            rates = fit_rates(times)
            if world.is_main:
                print(json.dumps({"name": "rates", **asdict(rates)}), flush=True)
            lengths = StreamLengths(config, 5_000 + 200 * block)
            setup = Setup(RANKS, 1, rates, ENGINE_SEQS, QUEUE_SEQS, prompts, lengths)
            for mode in MODES:
                for generated in list(generate(setup, mode, BLOCK + 1))[1:]:
                    simulated[mode].add(generated.round.engine_s)
    if world.is_main:
        for mode in MODES:
            row = {"name": mode.name, "seconds": measured[mode].seconds, "simulated_s": simulated[mode].seconds}
            row |= {"idle_share": measured[mode].idle_share, "simulated_idle": simulated[mode].idle_share}
            print(json.dumps(row), flush=True)
        shutil.rmtree(folder)
    distributed.finish()


def main() -> int:
    """Start the ranks, print the table, and return 1 where a way is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3, help=f"of {BLOCK} iterations of each way")
    parser.add_argument("--prompts", type=int, default=6, help="of an iteration")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments.blocks, arguments.prompts)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    command += ["--rank", "--blocks", str(arguments.blocks), "--prompts", str(arguments.prompts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    blocks = [row for row in rows if row["name"] == "rates"]
    rows = rows[len(blocks) :]
    for name in blocks[0].keys() - {"name"}:
        print(f"{name}: " + ", ".join(f"{1e6 * block[name]:.2f}" for block in blocks) + " us")
    print(f"{'':46}{'seconds':>9}{'simulated':>11}{'idle':>8}{'simulated':>11}")
    failed = False
    for row in rows:
        within = abs(row["simulated_s"] / row["seconds"] - 1) <= BOUND
        difference = abs(row["simulated_idle"] - row["idle_share"])
        within &= difference <= max(BOUND * row["idle_share"], POINTS)
        failed |= not within
        print(
            f"{row['name']:46}{row['seconds']:9.2f}{row['simulated_s']:11.2f}{row['idle_share']:8.1%}"
            f"{row['simulated_idle']:11.1%}{'' if within else '  OUT OF BOUNDS'}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([*blocks, *rows], indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
