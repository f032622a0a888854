"""Make what the page's browser shows of a response: its row in the index, and the content of its card in pieces."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote

from ovr_megatron.analysis.experiment import Stage
from ovr_megatron.analysis.response_card import CardTexts, card_texts
from ovr_megatron.analysis.samples import MAX_TOKENS, CardFields, RolloutLine, Token, read_tokens, shade
from ovr_megatron.evaluation import lexical
from ovr_megatron.evaluation.behaviours import BEHAVIOURS
from ovr_megatron.evaluation.response_cache import StoredResponse

MAX_CHARACTERS = 20_000  # of one response
_BITS = {name: 1 << index for index, name in enumerate(BEHAVIOURS)}

IndexRow = tuple[str, float, int, int]
"""Source, reward, tokens and behaviours of a response, a bit each; a list where it was read from ``index.json``."""


class EvaluationLine(StoredResponse):
    """A line of ``SET.responses.jsonl``, as far as the page shows it."""

    source: str
    question: str
    reference: str
    correct: bool
    reason: str


class TextPieces(TypedDict, total=False):
    """The text of a response in pieces, see `_pieces`; ``cut`` is the number of characters that were left out."""

    x: list[str]
    p: list[float]
    a: list[float | None]
    s: list[int]
    b: list[int]
    cut: int


class ImageAddress(TypedDict, total=False):
    """The address of the prompt's image, nothing without one."""

    image: str


class CardContent(TextPieces, CardTexts, ImageAddress):
    """What a script holds of a response."""


@dataclass(frozen=True)
class ResponseItem:
    """A response: its row in the index, and the content of its card, which is in a script."""

    row: IndexRow
    content: CardContent


def rollout_items(
    stage: Stage,
    root: Path,
    iteration: int,
    rollouts: Sequence[RolloutLine],
    indices: Sequence[int],
) -> list[ResponseItem]:
    """Return the rollouts ``indices`` of an iteration, for a page in the folder ``root``."""
    rows = [rollouts[index] for index in indices]
    # Long responses are shown as text: a page with an element for each of their tokens is slow.
    short_rows = [row for row in rows if row["tokens"] <= MAX_TOKENS]
    tokens_of_short = iter(read_tokens(stage.dir, iteration, short_rows))
    items = []
    for row in rows:
        tokens: list[Token] = []
        if row["tokens"] <= MAX_TOKENS:
            tokens = next(tokens_of_short)
        address = None
        if image := row.get("image"):
            address = _image_address(stage.dir, image, root)
        texts = card_texts(row)
        items.append(_item(row, texts, row["response"], tokens, image=address))
    return items


def _image_address(run: Path, name: str, root: Path) -> str | None:
    """Return the address of the image ``name`` of the run folder, relative to the page in ``root``.

    None if the image lies outside the run folder.
    """
    path = (run / name).resolve()
    if not path.is_relative_to(run.resolve()):
        return None
    address = os.path.relpath(path, root.resolve())
    return quote(address)


def evaluation_items(
    judge_counts: Sequence[Mapping[str, int | None]],
    rows: Sequence[EvaluationLine],
    indices: Sequence[int],
) -> list[ResponseItem]:
    """Return the responses ``indices`` of an evaluation; ``judge_counts`` are those of its greedy responses."""
    # A judge reads the greedy responses in their order, without the prompts over the limit, which have none.
    greedy = [index for index, row in enumerate(rows) if row["sample"] is None and row["response"] is not None]
    counts_by_row = dict(zip(greedy, judge_counts, strict=False))  # a judge may have read only the first ones
    items = []
    for index in indices:
        row = rows[index]
        fields: CardFields = {
            "prompt": row["question"],
            "source": row["source"],
            "answer": row["reference"],
            "reward": float(row["correct"]),
            "tokens": row["tokens"],
            "stopped": row["stopped"],
            "verdict": row["reason"],
        }
        texts = card_texts(fields, row["sample"])
        response = row["response"] or ""
        items.append(_item(fields, texts, response, judge_counts=counts_by_row.get(index)))
    return items


def _item(
    fields: CardFields,
    texts: CardTexts,
    response: str,
    tokens: Sequence[Token] = (),
    judge_counts: Mapping[str, int | None] | None = None,
    image: str | None = None,
) -> ResponseItem:
    """Return the row and the content of a response, from its ``fields`` and the card's other ``texts``.

    The text is marked by wording in any case; which behaviours the response counts for, the judge decides if it has
    read the response.
    """
    text = "".join(token.text for token in tokens) if tokens else response
    characters_cut = len(text) - MAX_CHARACTERS
    text = text[:MAX_CHARACTERS]
    acts = lexical.acts(text)
    pieces = _pieces(text, tokens, acts)
    if characters_cut > 0:
        pieces["cut"] = characters_cut
    if judge_counts:
        behaviours = {name for name, count in judge_counts.items() if count}
    else:
        behaviours = {act.behaviour for act in acts}
    bits = sum(bit for name, bit in _BITS.items() if name in behaviours)
    row = (fields["source"], fields["reward"], fields["tokens"], bits)
    address: ImageAddress = {}
    if image is not None:
        address["image"] = image
    return ResponseItem(row, {**pieces, **texts, **address})


def _pieces(text: str, tokens: Sequence[Token], acts: Sequence[lexical.Act]) -> TextPieces:
    """Split ``text`` into its tokens, or, if there are none, at the ends of ``acts``.

    Keys have one letter, as files hold thousands of responses.

    Returns:
        ``x``: the pieces.  ``b``: for each piece one bit for each behaviour that it overlaps; absent if all are 0.  If
        there are tokens, ``p``: their probabilities.  If the policy learned from them, ``a``: their advantages, and
        ``s``: their shades, -3 to 3.
    """
    if tokens:
        pieces = _token_pieces(_tokens_within(tokens, len(text)))
    else:
        pieces = {"x": _split_at_acts(text, acts)}
    bits = _behaviour_bits(pieces["x"], acts)
    if any(bits):
        pieces["b"] = bits
    return pieces


def _split_at_acts(text: str, acts: Iterable[lexical.Act]) -> list[str]:
    # A set, as acts of two behaviours may begin or end at one place.
    cuts = {0, len(text)}
    for act in acts:
        cuts |= {act.begin, act.end}
    spans = itertools.pairwise(sorted(cuts))
    return [text[begin:end] for begin, end in spans]


def _token_pieces(tokens: Sequence[Token]) -> TextPieces:
    # Three digits are as many as the page shows.
    pieces: TextPieces = {
        "x": [token.text for token in tokens],
        "p": [round(exp(token.logprob), 3) for token in tokens],
    }
    advantages: list[float | None] = []
    for token in tokens:
        advantages.append(None if token.advantage is None else round(token.advantage, 3))
    if any(advantage is not None for advantage in advantages):
        pieces["a"] = advantages
        pieces["s"] = shade(tokens)
    return pieces


def _tokens_within(tokens: Sequence[Token], characters: int) -> list[Token]:
    """Return the first tokens, as many as lie within so many characters altogether."""
    within: list[Token] = []
    length = 0
    for token in tokens:
        length += len(token.text)
        if length > characters:
            break
        within.append(token)
    return within


def _behaviour_bits(parts: Sequence[str], acts: Sequence[lexical.Act]) -> list[int]:
    """Return for each part one bit for each behaviour that it overlaps."""
    bits = []
    begin = 0
    for part in parts:
        # A token that crosses the end of an act belongs to it if its middle does.
        middle = begin + len(part) / 2
        behaviours = [act.behaviour for act in acts if act.begin <= middle < act.end]
        # A sum is a union here: acts of one behaviour do not overlap.
        bits.append(sum(_BITS[behaviour] for behaviour in behaviours))
        begin += len(part)
    return bits
