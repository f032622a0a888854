"""Choose a handful of rollouts to read: early, middle and late ones, with and without an image, right and wrong."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import PIL.Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from ovr_megatron.runtime.json_lines import read_json_lines

PER_ITERATION = 4
MAX_TOKENS = 2000  # of one response that is shown token by token
LOW_LOGPROB = log(0.1)  # a token below it is marked as unlikely
MAX_SIDE = 512  # pixels of an embedded image


RolloutKey = tuple[int | None, int | None]
"""Index of the prompt in the iteration and of the response to it; None where its line does not have one."""


class CardFields(TypedDict):
    """What a card says of a response beside the response itself (`ovr_megatron.analysis.response_card`)."""

    prompt: str
    source: str
    answer: str | None
    reward: float
    tokens: int
    stopped: bool
    verdict: NotRequired[str | None]
    advantage_mean: NotRequired[float | None]


class RolloutLine(CardFields):
    """A line of ``rollouts/ITERATION.jsonl``, as far as the report reads it."""

    response: str
    image: NotRequired[str | None]
    number: NotRequired[int]
    sample: NotRequired[int]


@dataclass(frozen=True)
class Picture:
    """A PNG of ``width`` pixels."""

    png: bytes
    width: int


@dataclass(frozen=True)
class Token:
    """A token of a response, with its log-probability and advantage.

    Several tokens stand together where the bytes of a single one are no text; the numbers are then the last one's.
    ``advantage`` is None if nothing was learnt from the response.
    """

    text: str
    logprob: float
    advantage: float | None


@dataclass(frozen=True)
class TokenColumns:
    """The arrays of one response, an entry a token; ``advantages`` is None if nothing was learnt from it."""

    ids: list[int]
    logprobs: list[float]
    advantages: list[float] | None


@dataclass(frozen=True)
class Moment:
    """Some rollouts of one iteration; ``name`` says where in the run the iteration lies.

    ``tokens`` holds the tokens of each rollout, an empty list where the run folder does not have them.
    """

    name: str
    iteration: int
    rollouts: list[RolloutLine]
    tokens: list[list[Token]]


def pick_moments(run: Path) -> list[Moment]:
    """Pick rollouts of the first, the middle and the last iteration of the RL run folder ``run``.

    Only three files are read, whatever the length of the run.
    """
    files = sorted((run / "rollouts").glob("*.jsonl"))
    result = []
    for index, name in _moment_names(len(files)).items():
        file = files[index]
        iteration = int(file.stem)
        lines = cast(list[RolloutLine], read_json_lines(file))
        rollouts = pick_rollouts(lines)
        tokens = read_tokens(run, iteration, rollouts)
        result.append(Moment(name, iteration, rollouts, tokens))
    return result


def _moment_names(count: int) -> dict[int, str]:
    """Return which of ``count`` iterations to show, and the name of each."""
    if count < 2:
        return dict.fromkeys(range(count), "So far")
    names = {0: "Early"}
    if count > 2:
        names[count // 2] = "Middle"
    names[count - 1] = "Late"
    return names


def pick_rollouts(rollouts: list[RolloutLine], count: int = PER_ITERATION) -> list[RolloutLine]:
    """Choose ``count`` rollouts: each source in turn, right and wrong ones, of different prompts where possible.

    Of a source whose prompts have images only those rollouts are taken whose image is in the run folder.
    """
    kinds: dict[tuple[bool, str], list[RolloutLine]] = {}
    for rollout in _rollouts_to_show(rollouts):
        is_wrong = not rollout["reward"]
        kind = (is_wrong, rollout["source"])
        kinds.setdefault(kind, []).append(rollout)
    # False sorts before True: the right ones come first, and by source among them.
    queues = [kinds[kind] for kind in sorted(kinds)]
    selected: list[RolloutLine] = []
    while queues and len(selected) < count:
        queue = queues.pop(0)
        index = _first_unseen(queue, selected)
        selected.append(queue.pop(index))
        if queue:
            queues.append(queue)  # at the end, so that the kinds take turns
    return selected


def _rollouts_to_show(rollouts: list[RolloutLine]) -> Iterator[RolloutLine]:
    """Yield the rollouts that have an image, and those of sources without images."""
    # A run saves the images of a few prompts only; without its image such a prompt cannot be understood.
    sources_with_images = {rollout["source"] for rollout in rollouts if rollout.get("image")}
    for rollout in rollouts:
        if rollout.get("image") or rollout["source"] not in sources_with_images:
            yield rollout


def _first_unseen(queue: Sequence[RolloutLine], selected: Sequence[RolloutLine]) -> int:
    """Return the index of the first rollout of a problem that is not among the selected ones, 0 if there is none."""
    problems = {_problem(rollout) for rollout in selected}
    for index, rollout in enumerate(queue):
        if _problem(rollout) not in problems:
            return index
    return 0


def read_tokens(run: Path, iteration: int, rollouts: Sequence[RolloutLine]) -> list[list[Token]]:
    """Read the tokens of each of ``rollouts``, an empty list where the run folder does not have them.

    Only the part of the iteration's files that belongs to the rollouts is read.
    """
    vocabulary = run / "companions/tokenizer.json"
    if not vocabulary.is_file():
        return [[] for _ in rollouts]
    tokenizer = Tokenizer.from_file(str(vocabulary))
    keys = [_key(rollout) for rollout in rollouts]
    tokens: dict[RolloutKey, list[Token]] = {}
    folder = run / "rollouts" / f"{iteration:06d}"
    for path in folder.glob("*.safetensors"):
        try:
            for key, columns in _read_columns(path, set(keys)):
                tokens[key] = _decode(tokenizer, columns)
        except (OSError, SafetensorError):
            continue  # the file is being written, or was cut off
    return [tokens.get(key, []) for key in keys]


def _key(rollout: RolloutLine) -> RolloutKey:
    return rollout.get("number"), rollout.get("sample")


def _read_columns(path: Path, keys: Set[RolloutKey]) -> Iterator[tuple[RolloutKey, TokenColumns]]:
    """Yield the key of each rollout of the file that is in ``keys``, and its arrays."""
    with safe_open(path, "numpy") as file:
        has_advantages = "advantages" in file.keys()
        # The rollouts lie one after the other in each column; the index has prompt, sample and length of each.
        end = 0
        for prompt, sample, length in file.get_tensor("index").tolist():
            begin = end
            end = begin + length
            key = (prompt, sample)
            if key not in keys:
                continue
            # A slice reads only its own bytes of the file, which has the tokens of all rollouts of a rank.
            ids = file.get_slice("tokens")[begin:end].tolist()
            logprobs = file.get_slice("logprobs")[begin:end].tolist()
            advantages = None
            if has_advantages:
                advantages = file.get_slice("advantages")[begin:end].tolist()
            yield key, TokenColumns(ids, logprobs, advantages)


def _decode(tokenizer: Tokenizer, columns: TokenColumns) -> list[Token]:
    """Return the tokens as text; one whose bytes are not a character goes together with those that follow."""
    decoded: list[Token] = []
    pending: list[int] = []
    last = len(columns.ids) - 1
    for index, token_id in enumerate(columns.ids):
        pending.append(token_id)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        is_incomplete = text.endswith("\ufffd")
        # No character of UTF-8 has more than four bytes: after four tokens these are no character at all.
        if not is_incomplete or len(pending) == 4 or index == last:
            advantage = None
            if columns.advantages:
                advantage = columns.advantages[index]
            decoded.append(Token(text, columns.logprobs[index], advantage))
            pending = []
    return decoded


def shade(tokens: Sequence[Token]) -> list[int]:
    """Return each token's share of the largest advantage in the response, as a whole number from -3 to 3."""
    advantages = [token.advantage or 0.0 for token in tokens]
    largest = max(map(abs, advantages), default=0.0)
    if not largest:
        return [0] * len(advantages)
    return [round(3 * advantage / largest) for advantage in advantages]


def read_picture(run: Path, name: str) -> Picture | None:
    """Return the image ``name`` of the run folder, at most `MAX_SIDE` pixels wide or high.

    None if it is missing, unreadable, or outside the run folder: ``name`` comes from a file, not from us.
    """
    path = (run / name).resolve()
    if not path.is_relative_to(run.resolve()):
        return None
    try:
        with PIL.Image.open(path) as image:
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
    # Pillow raises `SyntaxError` for some damaged PNGs, and refuses images that would take too much memory.
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError):
        return None
    return Picture(buffer.getvalue(), image.width)


def _problem(rollout: RolloutLine) -> tuple[str, str | None]:
    """Return what two rollouts of one problem have in common."""
    return rollout["prompt"], rollout.get("image")
