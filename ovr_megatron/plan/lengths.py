"""Lengths of responses for a simulation: from a file, from the rollouts of a run, or log-normal by mean and longest."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ovr_megatron.config import ConfigError
from ovr_megatron.runtime.json_lines import read_json_lines

_LATEST = 8  # iterations of a run whose lengths are read
_TAIL_QUANTILE = 2.326  # of the normal distribution, 1 % from its end: the share of responses at the limit
_BETWEEN = 0.5  # share of the logarithms' variance that all responses to a prompt have in common


@dataclass(frozen=True)
class Problem:
    """A prompt: its tokens, and those of each response to it."""

    prompt_tokens: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all responses, the prompt counted with each, as a trainer has them."""
        return len(self.lengths) * self.prompt_tokens + sum(self.lengths)


class LengthSource(Protocol):
    """Gives the prompts of a simulation; the same index has the same lengths again."""

    @property
    def basis(self) -> str:
        """Where the lengths are known from, in words."""
        ...

    def problem(self, index: int) -> Problem:
        """Return prompt ``index``."""
        ...


@dataclass(frozen=True)
class MeasuredLengths:
    """Lengths as they were measured, each prompt drawn at random from ``groups``.

    Attributes:
        groups: lengths of the responses to each prompt, or of one response each where nothing groups them.
        responses: to a prompt.
        prompt_tokens: of a prompt.
        limit: most tokens of a prompt and its response together; longer responses are cut, as an engine cuts them.
        seed: of the draw.
        basis: where the lengths are known from, in words.
    """

    groups: Sequence[Sequence[int]]
    responses: int
    prompt_tokens: int
    limit: int
    seed: int
    basis: str

    def problem(self, index: int) -> Problem:
        """Return a prompt of ``groups``; responses that the group lacks are drawn from it once more."""
        draw = random.Random(f"{self.seed} {index}")
        longest = max(self.limit - self.prompt_tokens, 1)
        if all(len(group) == 1 for group in self.groups):
            lengths = [draw.choice(self.groups)[0] for _ in range(self.responses)]
        else:
            group = draw.choice(self.groups)
            lengths = draw.sample(group, min(self.responses, len(group)))
            lengths += [draw.choice(group) for _ in range(self.responses - len(lengths))]
        return Problem(self.prompt_tokens, tuple(min(length, longest) for length in lengths))


@dataclass(frozen=True)
class LogNormalLengths:
    """Log-normal lengths of which one in a hundred reaches the limit.

    Attributes:
        mean: tokens of a response.
        longest: tokens at which a response is cut.
        responses: to a prompt.
        prompt_tokens: of a prompt.
        seed: of the draw.
    """

    mean: float
    longest: int
    responses: int
    prompt_tokens: int
    seed: int

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm, with which a hundredth of the responses reaches ``longest``."""
        # log(longest / mean) = z sigma - sigma^2 / 2 has no solution for a limit far beyond the mean.
        square = _TAIL_QUANTILE**2 - 2 * math.log(self.longest / self.mean)
        return _TAIL_QUANTILE - math.sqrt(max(square, 0.0))

    @property
    def basis(self) -> str:
        """Where the lengths are known from, in words."""
        return f"log-normal responses, mean {self.mean:,.0f}, one in a hundred cut at {self.longest:,} tokens"

    def problem(self, index: int) -> Problem:
        """Return a prompt whose responses have half of the variance in common, as a hard prompt has long ones."""
        draw = random.Random(f"{self.seed} {index}")
        sigma = self.sigma
        common = draw.gauss(math.log(self.mean) - sigma**2 / 2, sigma * math.sqrt(_BETWEEN))
        lengths = []
        for _ in range(self.responses):
            length = round(math.exp(common + draw.gauss(0, sigma * math.sqrt(1 - _BETWEEN))))
            lengths.append(min(max(length, 1), self.longest))
        return Problem(self.prompt_tokens, tuple(lengths))


def read_lengths(path: Path) -> tuple[list[list[int]], int | None]:
    """Return the lengths of responses, a list for each prompt, and the mean tokens of a prompt where these are known.

    Args:
        path: a run folder, whose latest rollouts are read; a JSON file with a list of lengths, or of such lists, one
            for each prompt; or a text file of one length a line.

    Raises:
        ConfigError: nothing is there, or something in it is no length.
    """
    if path.is_dir():
        return _read_run(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--lengths {path} cannot be read ({error}); give a file of lengths or a run folder"
        ) from None
    groups: list[list[int]] = []
    for number, entry in enumerate(_entries(path, text), 1):
        values = entry if isinstance(entry, list) else [entry]
        group = [value for value in values if type(value) is int and value > 0]
        if not group or len(group) < len(values):
            raise ConfigError(
                f"--lengths {path}: entry {number} is {json.dumps(entry)[:60]}, and not a whole number of tokens above "
                "0 or a list of them; correct it"
            )
        groups.append(group)
    if not groups:
        raise ConfigError(f"--lengths {path} is empty; give the tokens of a response a line")
    return groups, None


def _entries(path: Path, text: str) -> list[object]:
    """Return the entries of a file: those of a JSON list, or the lines as numbers where they are ones."""
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"--lengths {path} is not JSON ({error}); correct it, or write one length a line"
            ) from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [int(line) if line.isdecimal() else line for line in lines]


def _read_run(run: Path) -> tuple[list[list[int]], int | None]:
    """Read the latest iterations of ``run``; a prompt's own tokens are the difference to those that were trained on."""
    paths = sorted((run / "rollouts").glob("*.jsonl"))[-_LATEST:]
    groups: list[list[int]] = []
    prompt_tokens: list[float] = []
    for path in paths:
        by_prompt: dict[int, list[int]] = defaultdict(list)
        for line in read_json_lines(path, "number", "tokens"):
            if line["tokens"] > 0:  # of a prompt that was given up there are none
                by_prompt[line["number"]].append(line["tokens"])
        groups += by_prompt.values()
        summary = path.with_suffix("") / "iteration.json"
        if summary.is_file():
            for prompt, tokens in json.loads(summary.read_text(encoding="utf-8"))["kept"]:
                if lengths := by_prompt.get(prompt):
                    prompt_tokens.append((tokens - sum(lengths)) / len(lengths))
    if not groups:
        raise ConfigError(
            f"--lengths {run}: there are no responses in {run / 'rollouts'}; give a run of ovr rl or a file"
        )
    mean = round(sum(prompt_tokens) / len(prompt_tokens)) if prompt_tokens else None
    return groups, mean
