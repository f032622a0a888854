"""The plan's simulator beside two engines of this machine: ``tests/soak/tail.py [--iterations N] [--json FILE]``.

Steps of the engines are timed while they generate with a shared queue, and an engine's rates fitted to them.  Then
rounds of each way are measured, with other prompts, and simulated with those rates and the same lengths, which are
decided beforehand as in ``ovr bench tail``.  Exits 1 if a way's seconds differ by more than 15 %, or its idle share by
more than 15 % of it and 3 points.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from benchmarks.tail import LONGEST, force_lengths, make_config, response_lengths
from ovr_megatron.config import ParallelConfig, RLConfig
from ovr_megatron.data.skipped import SkippedRows
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.plan.decoding import DecodeRates
from ovr_megatron.plan.lengths import Problem
from ovr_megatron.plan.modes import Mode, Setup, generate
from ovr_megatron.ppo.rollouts import Rollouts
from ovr_megatron.ppo.timeline import Timeline, gather_timeline
from ovr_megatron.rl.setup import build_models, build_rollouts, open_model_and_prompts
from ovr_megatron.rollout.sampling import Prompt
from ovr_megatron.runtime import distributed

BETWEEN = 0.5
BOUND = 0.15
POINTS = 0.03
RANKS = 2
# Two settings of the queue, so that batches of many sizes are timed.
MODES = (Mode("static"), Mode("shared"), Mode("static", oversample=0.5), Mode("shared", oversample=0.5))


@dataclass
class StepTimes:
    """What an engine's steps worked on, and the seconds from the begin of each to the begin of the next one."""

    begins: list[float] = field(default_factory=list)
    rows: list[tuple[int, int, int]] = field(default_factory=list)  # running, their context, prompts that start
    running: int = 0
    context: int = 0
    started: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)

    def watch(self, rollouts: Rollouts) -> None:
        """Record the steps of ``rollouts.engine`` from now on."""
        engine = rollouts.engine
        enqueue, step = engine._enqueue, engine._llm.llm_engine.step

        def enqueue_and_count(prompt: Prompt) -> list[str]:
            ids = enqueue(prompt)
            lengths = response_lengths(prompt.tokens, len(prompt.seeds), BETWEEN)
            self.started += 1
            self.prompt_tokens.append(len(prompt.tokens))
            for request, length in zip(ids, lengths, strict=True):
                self.sizes[request.partition("-")[0]] = len(prompt.tokens) + length
                self.running += 1
                self.context += len(prompt.tokens)
            return ids

        def step_and_count() -> list:
            self.begins.append(time.perf_counter())
            self.rows.append((self.running, self.context, self.started))
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

    def end_round(self) -> None:
        """Forget what a round that was cut has left, and the step without a successor."""
        self.running = self.context = self.started = 0
        self.sizes.clear()
        self.rows.append((0, 0, 0))
        self.begins.append(float("nan"))


def fit_rates(times: StepTimes) -> DecodeRates:
    """Return the rates of the steps, by least squares over those of all ranks.  A collective."""
    seconds = np.diff(times.begins)
    rows = np.array(times.rows[:-1], dtype=float)
    valid = np.isfinite(seconds) & (rows[:, 0] > 0)
    parts: list = [None] * RANKS
    dist.all_gather_object(parts, (rows[valid], seconds[valid], np.mean(times.prompt_tokens)))
    rows = np.concatenate([part[0] for part in parts])
    seconds = np.concatenate([part[1] for part in parts])
    # Without steps that something else of the machine held up.
    usual = seconds < np.quantile(seconds, 0.99)
    columns = np.column_stack([np.ones(len(rows)), rows])[usual]
    step_s, sequence_s, context_s, prompt_s = np.linalg.lstsq(columns, seconds[usual], rcond=None)[0]
    # The mean of all steps counts: the slow ones take their time as well.
    scale = (
        seconds.sum() / (np.column_stack([np.ones(len(rows)), rows]) @ [step_s, sequence_s, context_s, prompt_s]).sum()
    )
    prompt_tokens = parts[0][2]
    return DecodeRates(scale * step_s, scale * sequence_s, scale * context_s, scale * prompt_s / prompt_tokens)


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


def measure(rollouts: Rollouts, config: RLConfig, iterations: int, skip: int, times: StepTimes) -> dict[str, float]:
    """Return seconds and idle share of the engines over ``iterations``, after one that warms up.  A collective."""
    rollouts.config = config
    stream = open_model_and_prompts(config, SkippedRows())[1]
    stream.draw(skip)
    seconds = idle_s = 0.0
    for iteration in range(iterations + 1):
        dist.barrier()
        timeline = Timeline()
        rollouts.collect(stream, iteration, config.curriculum[0].max_tokens, timeline)
        record = gather_timeline(timeline, [], LONGEST)
        position = record["activities"].index("engine")
        engine_s = [ends[position] - ends[position - 1] for ends in record["ends"]]
        if iteration:
            seconds += max(engine_s)
            idle_s += max(engine_s) - sum(engine_s) / len(engine_s)
        rollouts.engine.sleep()
        times.end_round()
    return {"seconds": seconds, "idle_share": idle_s / seconds}


def run_rank(iterations: int, prompts: int) -> None:
    """Measure and simulate on this rank; the first one prints."""
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    names = [tempfile.mkdtemp() if world.is_main else ""]
    dist.broadcast_object_list(names)
    folder = Path(names[0])
    if world.is_main:
        make_tiny_model(folder / "model", tied=True, seed=1)
    dist.barrier()
    config = make_config(folder, prompts)
    model_folder, stream = open_model_and_prompts(config, SkippedRows())
    models, _ = build_models(config, model_folder, stream.processor, world, training=False)
    rollouts = build_rollouts(config, model_folder, stream.processor, models)
    force_lengths(rollouts.engine, BETWEEN)
    with rollouts.grader:
        shared = replace(config, rollout=replace(config.rollout, schedule="shared"))
        measure(rollouts, shared, 2, 0, StepTimes())
        times = StepTimes()
        times.watch(rollouts)
        for count in (prompts, 3 * prompts):
            measure(rollouts, replace(shared, prompts=count), max(iterations // 4, 2), 300, times)
        rates = fit_rates(times)
        if world.is_main:
            print(json.dumps({"name": "rates", **asdict(rates)}), flush=True)
        for mode in MODES:
            rollout = replace(config.rollout, schedule=mode.schedule, oversample=mode.oversample)
            measured = measure(rollouts, replace(config, rollout=rollout), iterations, 1_000, times)
            setup = Setup(RANKS, 1, rates, 64, 64, prompts, StreamLengths(config, 1_000))
            rounds = [found.round for found in list(generate(setup, mode, iterations + 1))[1:]]
            seconds = sum(found.seconds for found in rounds)
            row = {"name": mode.name, "seconds": measured["seconds"], "simulated_s": seconds}
            row |= {"idle_share": measured["idle_share"]}
            row |= {"simulated_idle": sum(found.idle_s for found in rounds) / seconds}
            if world.is_main:
                print(json.dumps(row), flush=True)
    distributed.finish()


def main() -> int:
    """Start the ranks, print the table, and return 1 where a way is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=18, help="measured of each way")
    parser.add_argument("--prompts", type=int, default=6, help="of an iteration")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        run_rank(arguments.iterations, arguments.prompts)
        return 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", __file__]
    command += ["--rank", "--iterations", str(arguments.iterations), "--prompts", str(arguments.prompts)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    rates, *rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    print("a step: " + ", ".join(f"{name} {1e6 * rates[name]:.2f} us" for name in rates if name != "name"))
    print(f"{'':34}{'seconds':>9}{'simulated':>11}{'idle':>8}{'simulated':>11}")
    failed = False
    for row in rows:
        within = abs(row["simulated_s"] / row["seconds"] - 1) <= BOUND
        difference = abs(row["simulated_idle"] - row["idle_share"])
        within &= difference <= max(BOUND * row["idle_share"], POINTS)
        failed |= not within
        print(
            f"{row['name']:34}{row['seconds']:9.2f}{row['simulated_s']:11.2f}{row['idle_share']:8.1%}"
            f"{row['simulated_idle']:11.1%}{'' if within else '  OUT OF BOUNDS'}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([rates, *rows], indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
