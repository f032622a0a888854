"""Choose a handful of rollouts to read: early, middle and late ones, with and without an image, right and wrong."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import PIL.Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from ovr_megatron.runtime.json_lines import read_json_lines

PER_ITERATION = 4
MAX_TOKENS = 2000  # of one response that is shown token by token
LOW_LOGPROB = log(0.1)  # a token below it is marked as unlikely
MAX_SIDE = 512  # pixels of an embedded image


class RolloutLine(TypedDict):
    """A line of ``rollouts/ITERATION.jsonl``, as far as the report reads it."""

    prompt: str
    response: str
    source: str
    answer: str
    reward: float
    tokens: int
    stopped: bool
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
        iteration = int(files[index].stem)
        rollouts = pick_rollouts(cast(list[RolloutLine], read_json_lines(files[index])))
        result.append(Moment(name, iteration, rollouts, read_tokens(run, iteration, rollouts)))
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
    sources_with_images = {rollout["source"] for rollout in rollouts if rollout.get("image")}
    kinds: dict[tuple[bool, str], list[RolloutLine]] = {}
    for rollout in rollouts:
        if rollout.get("image") or rollout["source"] not in sources_with_images:
            kinds.setdefault((not rollout["reward"], rollout["source"]), []).append(rollout)
    # False sorts before True: the right ones come first, and by source among them.
    queues = [kinds[kind] for kind in sorted(kinds)]
    selected: list[RolloutLine] = []
    while queues and len(selected) < count:
        queue = queues.pop(0)
        problems = {_problem(rollout) for rollout in selected}
        unseen = (index for index, rollout in enumerate(queue) if _problem(rollout) not in problems)
        selected.append(queue.pop(next(unseen, 0)))
        if queue:
            queues.append(queue)  # at the end, so that the kinds take turns
    return selected


def read_tokens(run: Path, iteration: int, rollouts: Sequence[Mapping[str, Any]]) -> list[list[Token]]:
    """Read the tokens of each of ``rollouts``, an empty list where the run folder does not have them.

    Only the part of the iteration's files that belongs to the rollouts is read.
    """
    vocabulary = run / "companions/tokenizer.json"
    keys = [(rollout.get("number"), rollout.get("sample")) for rollout in rollouts]
    tokens: dict[tuple[Any, Any], list[Token]] = {}
    if vocabulary.is_file():
        tokenizer = Tokenizer.from_file(str(vocabulary))
        for path in (run / "rollouts" / f"{iteration:06d}").glob("*.safetensors"):
            try:
                for key, token_columns in _read_columns(path, set(keys)):
                    tokens[key] = _decode(tokenizer, *token_columns)
            except (OSError, SafetensorError):
                continue  # the file is being written, or was cut off
    return [tokens.get(key, []) for key in keys]


def _read_columns(path: Path, keys: Set[tuple[Any, Any]]) -> Iterator[tuple[tuple[Any, Any], list[list[Any]]]]:
    """Yield the key of each rollout of the file that is in ``keys``, and its columns.

    These are the ids of its tokens, their log-probabilities and, where the file has them, their advantages.
    """
    with safe_open(path, "numpy") as file:
        # The rollouts lie one after the other in each column; the index has prompt, sample and length of each.
        names = [name for name in ("tokens", "logprobs", "advantages") if name in file.keys()]
        end = 0
        for prompt, sample, length in file.get_tensor("index").tolist():
            begin = end
            end = begin + length
            if (prompt, sample) in keys:
                yield (prompt, sample), [file.get_slice(name)[begin:end].tolist() for name in names]


def _decode(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[float], advantages: Sequence[float] | None = None
) -> list[Token]:
    """Return the tokens as text; one whose bytes are not a character goes together with those that follow."""
    decoded: list[Token] = []
    pending: list[int] = []
    for index, token_id in enumerate(ids):
        pending.append(token_id)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        # No character of UTF-8 has more than four bytes: after four tokens these are no character at all.
        if not text.endswith("\ufffd") or len(pending) == 4 or index == len(ids) - 1:
            advantage = advantages[index] if advantages else None
            decoded.append(Token(text, logprobs[index], advantage))
            pending = []
    return decoded


def shade(tokens: Sequence[Token]) -> list[int]:
    """Return each token's share of the largest advantage in the response, as a whole number from -3 to 3."""
    largest = max((abs(token.advantage or 0.0) for token in tokens), default=0.0)
    return [round(3 * (token.advantage or 0.0) / largest) if largest else 0 for token in tokens]


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
