"""Show a few rollouts of the early, the middle and the late run in the page itself, token by token where it can."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import TypedDict

from ovr_megatron.analysis.experiment import Experiment, Stage
from ovr_megatron.analysis.page import data_uri
from ovr_megatron.analysis.response_card import CardPiece, ResponseCard, card_texts, describe_token
from ovr_megatron.analysis.samples import (
    LOW_LOGPROB,
    MAX_TOKENS,
    Moment,
    RolloutLine,
    Token,
    pick_moments,
    read_picture,
    shade,
)

MAX_CHARACTERS = 6000  # of one response in the page
SMALL_WIDTH = 112  # pixels; browser.js knows it, too


class MomentCards(TypedDict):
    """The cards of one moment of the run."""

    title: str
    cards: list[ResponseCard]


class MomentsSection(TypedDict):
    """The section with a note about the rollouts that it shows."""

    note: str
    moments: list[MomentCards]


def show_moments(experiment: Experiment) -> MomentsSection | None:
    """Return the cards of a few rollouts, by the moment of the run, below a note about them; None without rollouts."""
    stage = experiment.stages.get("rl")
    samples = pick_moments(stage.dir) if stage else []
    if not stage or not samples:
        return None
    count = sum(len(moment.rollouts) for moment in samples)
    note = f"{count} of all rollouts; the others are in {stage.name}/rollouts, one file an iteration."
    has_tokens = any(any(moment.tokens) for moment in samples)
    if has_tokens:
        note += (
            " Green tokens were made more likely and red ones less, the darker the more; a dotted line marks those of a"
            f" probability under {exp(LOW_LOGPROB):.0%} (point at one for its numbers)."
        )
    return {"note": note, "moments": [_moment_cards(stage, moment) for moment in samples]}


def _moment_cards(stage: Stage, moment: Moment) -> MomentCards:
    cards = []
    for rollout, tokens in zip(moment.rollouts, moment.tokens, strict=True):
        cards.append(_rollout_card(stage, rollout, tokens))
    return {"title": f"{moment.name}: iteration {moment.iteration}", "cards": cards}


def _rollout_card(stage: Stage, rollout: RolloutLine, tokens: Sequence[Token]) -> ResponseCard:
    """Return the content of a card whose image and tokens are in the page itself."""
    name = rollout.get("image")
    picture = read_picture(stage.dir, name) if name else None
    # The puzzles' images are this small: drawn larger, without smoothing, and beside the text.
    is_small = picture is not None and picture.width <= SMALL_WIDTH
    kind = "text"
    if picture:
        kind = "image" if is_small else "photo"
    pieces = _token_pieces(tokens)
    if not pieces:
        pieces = [{"text": _shorten(rollout["response"]), "title": ""}]
    fields: RolloutLine = {**rollout, "prompt": _shorten(rollout["prompt"])}
    return {
        **card_texts(fields),
        "kind": kind,
        "image": data_uri(picture.png) if picture else None,
        "image_kind": "small" if is_small else "",
        "missing_image": name if name and not picture else None,
        "pieces": pieces,
        "behaviours": [],
    }


def _token_pieces(tokens: Sequence[Token]) -> list[CardPiece]:
    """Return a response with its tokens shaded by advantage and the unlikely ones underlined.

    The title of each token has its numbers.  The list is empty where there are no tokens, or too many for a page.
    """
    if len(tokens) > MAX_TOKENS:
        return []
    pieces = []
    for token, level in zip(tokens, shade(tokens), strict=True):
        pieces.append(describe_token(token, level))
    return pieces


def _shorten(text: str) -> str:
    """Return ``text`` without its middle if it is long: the end has the answer."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    characters_cut = len(text) - 2 * half
    return f"{text[:half]}\n[... {characters_cut:,} characters left out ...]\n{text[-half:]}"
