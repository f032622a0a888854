"""What both sides of ``ovr bench peers`` are given: a task, a model, and rows of known lengths.  No torch."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIGMA = 1.0  # of log-normal lengths
IMAGE_SIDE = 112  # pixels
VISUAL_TOKENS = 16  # of such an image
MIN_PIXELS = 784
MAX_PIXELS = IMAGE_SIDE**2  # images keep their size
QUESTION = "Which digits follow?"
# That of GRPO is TRL's default: with it the lengths of responses hardly change during the benchmark.
LEARNING_RATES = {"sft": 1e-4, "grpo": 1e-6}
BETA2 = 0.95
PACK_TOKENS = 2048  # of SFT: of our packs, and of TRL's where it packs
PROMPT_TOKENS = 47  # of a row with an image: the limit of both sides holds for the response alone then
MODEL = "model"
ROWS = "rows.jsonl"
RULE = f"{__name__}:score"

OURS = "ours"
PADDING = "TRL"
SINGLE_ROWS = "TRL, row by row"
PACKING = "TRL, packing"
TRANSFORMERS = "TRL, Transformers generates"


@dataclass(frozen=True, kw_only=True)
class PeerTask:
    """One measurement of one side.

    Attributes:
        kind: ``sft`` or ``grpo``.
        who: `OURS`, `PADDING`, `SINGLE_ROWS`, `PACKING` or `TRANSFORMERS`.
        equal: Whether all replies have ``max_tokens``; else their lengths are log-normal.
        images: Whether each prompt has an image.
        replay: Whether GRPO learns from `replayed_texts` in place of responses that it generates.
        rows: Rows, or prompts, of a step.
        tokens: Mean length of a reply; of GRPO the most tokens of a response.
        responses: To each prompt of GRPO.
        steps: Measured steps, after one that warms up; TRL measures one more where `ahead` is set.
        processes: Of each side.
        ahead: Whether of our two processes one generates while the other one learns, an iteration ahead.
        threads: Of each process.
    """

    kind: str
    who: str
    equal: bool = False
    images: bool = True
    replay: bool = False
    rows: int
    tokens: int
    responses: int = 1
    steps: int
    processes: int = 1
    ahead: bool = False
    threads: int = 2

    @property
    def learning_rate(self) -> float:
        """Constant rate of the optimizer."""
        return LEARNING_RATES[self.kind]

    @property
    def row_count(self) -> int:
        """Rows of all steps, of that which warms up, too."""
        return self.rows * self.step_count

    @property
    def step_count(self) -> int:
        """Steps that are taken: those measured, one before, and where generation runs ahead one after.

        While the last one learns, nothing is left to generate.
        """
        return self.steps + 1 + self.ahead


def reply_lengths(task: PeerTask) -> list[int]:
    """Return the tokens of each reply, without the token that ends it."""
    if task.equal:
        return [task.tokens] * task.row_count
    generator = np.random.default_rng(0)
    # The mean of a log-normal is exp(mu + sigma^2 / 2).
    lengths = generator.lognormal(np.log(task.tokens) - SIGMA**2 / 2, SIGMA, task.row_count)
    return [int(length) for length in lengths.clip(4, 8 * task.tokens)]


def random_digits(lengths: Sequence[int], seed: int) -> Iterator[str]:
    """Yield texts of digits; each digit is one token."""
    generator = random.Random(seed)
    for length in lengths:
        yield "".join(generator.choices("0123456789", k=length))


def write_rows(task: PeerTask, folder: Path) -> None:
    """Write the rows of ``task`` and their images into ``folder``; a prompt of GRPO has an answer and no reply."""
    pixels = np.random.default_rng(0)
    (folder / "images").mkdir()
    lines = []
    for index, digits in enumerate(random_digits(reply_lengths(task), seed=0)):
        content: list[dict[str, str]] = []
        if task.images:
            name = f"images/{index}.png"
            noise = pixels.integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
            content.append({"type": "image", "image": name})
        content.append({"type": "text", "text": QUESTION})
        messages: list[dict[str, object]] = [{"role": "user", "content": content}]
        row: dict[str, object] = {"messages": messages}
        if task.kind == "sft":
            messages.append({"role": "assistant", "content": digits})
        else:
            row["answer"] = "1"
        lines.append(json.dumps(row))
    (folder / ROWS).write_text("\n".join(lines) + "\n")


def replayed_texts(task: PeerTask) -> list[str]:
    """Return the responses that a replayed iteration learns from, prompt by prompt; each ends below the limit."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(4, task.tokens - 1, task.rows * task.responses)
    return list(random_digits(lengths.tolist(), seed=1))


def score(response: str, answer: str, options: Sequence[str]) -> float:
    """Return a reward that differs from response to response: the rule of both sides."""
    return len(response) % 9 / 8


class StepClock:
    """Records the ends of steps, by the wall and by the processor, which other load of the machine does not change."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.processor: list[float] = []

    def end_step(self) -> None:
        """Record that a step has ended."""
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def columns(self) -> dict[str, list[float]]:
        """Return ``seconds`` and ``cpu_seconds``, of all threads, of each step after the first."""
        return {"seconds": _differences(self.wall), "cpu_seconds": _differences(self.processor)}


def _differences(ends: Sequence[float]) -> list[float]:
    return [end - start for start, end in itertools.pairwise(ends)]
