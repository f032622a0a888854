"""A handful of rollouts to read: early, middle and late ones, with and without an image, right and wrong."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import PIL.Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from ovr_megatron.runtime.json_lines import read_json_lines

PER_ITERATION = 4
MAX_TOKENS = 2000  # of one response that is shown token by token
LOW = log(0.1)  # a token under this log-probability is marked
MAX_SIDE = 512  # pixels of an embedded image


@dataclass(frozen=True)
class Picture:
    """A PNG of ``width`` pixels."""

    png: bytes
    width: int


@dataclass(frozen=True)
class Token:
    """A token of a response, or several where one alone is no text, with the last one's log-probability and advantage.

    ``advantage`` is missing where nothing was learnt from the response.
    """

    text: str
    logprob: float
    advantage: float | None


@dataclass(frozen=True)
class Moment:
    """Some rollouts of one iteration; ``name`` says where in the run it lies.

    ``tokens`` has those of each rollout, none where the run has not kept them.
    """

    name: str
    iteration: int
    rollouts: list[dict[str, Any]]
    tokens: list[list[Token]]


def moments(run: Path) -> list[Moment]:
    """Pick rollouts of the first, the middle and the last iteration of the RL run folder ``run``.

    Only three files are read, whatever the length of the run.
    """
    files = sorted((run / "rollouts").glob("*.jsonl"))
    names = {0: "Early"} | ({len(files) // 2: "Middle"} if len(files) > 2 else {}) | {len(files) - 1: "Late"}
    if len(files) < 2:
        names = dict.fromkeys(range(len(files)), "So far")
    found = []
    for at, name in names.items():
        chosen = pick(read_json_lines(files[at]))
        found.append(Moment(name, int(files[at].stem), chosen, tokens(run, int(files[at].stem), chosen)))
    return found


def pick(rollouts: list[dict[str, Any]], count: int = PER_ITERATION) -> list[dict[str, Any]]:
    """Choose ``count`` rollouts: each source in turn, right and wrong ones, of other prompts where possible.

    Of a source whose prompts have images only those are taken whose image the run has kept.
    """
    pictured = {rollout["source"] for rollout in rollouts if rollout.get("image")}
    kinds: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for rollout in rollouts:
        if rollout.get("image") or rollout["source"] not in pictured:
            kinds.setdefault((not rollout["reward"], rollout["source"]), []).append(rollout)
    queues = [kinds[kind] for kind in sorted(kinds)]
    chosen: list[dict[str, Any]] = []
    while queues and len(chosen) < count:
        queue = queues.pop(0)
        asked = {_problem(rollout) for rollout in chosen}
        chosen.append(queue.pop(next((i for i, rollout in enumerate(queue) if _problem(rollout) not in asked), 0)))
        queues += [queue] if queue else []
    return chosen


def tokens(run: Path, iteration: int, rollouts: Sequence[dict[str, Any]]) -> list[list[Token]]:
    """The tokens of each of ``rollouts``; only their part of the iteration's files is read."""
    vocabulary = run / "companions/tokenizer.json"
    found: dict[tuple[Any, Any], list[Token]] = {}
    if vocabulary.is_file():
        tokenizer = Tokenizer.from_file(str(vocabulary))
        wanted = {(rollout.get("number"), rollout.get("sample")) for rollout in rollouts}
        for path in (run / "rollouts" / f"{iteration:06d}").glob("*.safetensors"):
            try:
                with safe_open(path, "numpy") as file:
                    end = 0
                    for prompt, sample, length in file.get_tensor("index").tolist():
                        begin, end = end, end + length
                        if (prompt, sample) in wanted:
                            names = [name for name in ("tokens", "logprobs", "advantages") if name in file.keys()]
                            parts = [file.get_slice(name)[begin:end].tolist() for name in names]
                            found[prompt, sample] = _spell(tokenizer, *parts)
            except (OSError, SafetensorError):
                continue  # is being written, or was cut off
    return [found.get((rollout.get("number"), rollout.get("sample")), []) for rollout in rollouts]


def _spell(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float], advantages: Sequence[float] | None = None
) -> list[Token]:
    """Tokens as text; bytes that are no character of their own go with those that follow."""
    spelled: list[Token] = []
    pending: list[int] = []
    for place, token in enumerate(ids):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        if not text.endswith("\ufffd") or len(pending) == 4 or place == len(ids) - 1:
            advantage = advantages[place] if advantages else None
            spelled.append(Token(text, logprobs[place], advantage))
            pending = []
    return spelled


def shade(tokens: Sequence[Token]) -> list[int]:
    """Each token's share of the largest advantage in the response, from -3 to 3."""
    largest = max((abs(token.advantage or 0.0) for token in tokens), default=0.0)
    return [round(3 * (token.advantage or 0.0) / largest) if largest else 0 for token in tokens]


def read_picture(run: Path, name: str) -> Picture | None:
    """Return the image ``name`` of the run folder, at most `MAX_SIDE` pixels wide or high.

    None if it is missing, unreadable, or outside the run folder.
    """
    path = (run / name).resolve()
    if not path.is_relative_to(run.resolve()):
        return None
    try:
        with PIL.Image.open(path) as image:
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return None
    return Picture(buffer.getvalue(), image.width)


def _problem(rollout: dict[str, Any]) -> tuple[str, str | None]:
    return rollout["prompt"], rollout.get("image")
