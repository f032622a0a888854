"""Write the texts of a response's card, for the page itself and for the files that browser.js reads."""

from __future__ import annotations

from math import exp
from typing import NotRequired, TypedDict

from ovr_megatron.analysis.samples import LOW_LOGPROB, CardFields, Token


class CardTexts(TypedDict):
    """Texts of a card beside the response; ``badge_kind`` is right or wrong."""

    prompt: str
    badge: str
    badge_kind: str
    facts: str


class CardPiece(TypedDict):
    """A part of a response; ``looks`` are its classes, ``title`` is empty for a part that has none."""

    text: str
    looks: NotRequired[str]
    title: str


class ResponseCard(CardTexts):
    """A card of the template.

    Attributes:
        kind: its layout: image (a small one), photo or text.
        image: its address, None without an image.
        image_kind: small for an image that is drawn larger than it is, else empty.
        missing_image: name of an image that cannot be shown.
        behaviours: titles of those that the response shows.
    """

    kind: str
    image: str | None
    image_kind: str
    missing_image: str | None
    pieces: list[CardPiece]
    behaviours: list[str]


EMPTY_CARD: ResponseCard = {
    "kind": "",
    "prompt": "",
    "badge": "",
    "badge_kind": "",
    "facts": "",
    "image": "",
    "image_kind": "",
    "missing_image": None,
    "pieces": [],
    "behaviours": [""],
}
"""The card that browser.js copies and fills: with an image without address, and one behaviour without name."""


def card_texts(response: CardFields, sample: int | None = None) -> CardTexts:
    """Return prompt, badge and facts of a response.

    ``verdict`` and ``advantage_mean`` may be absent or None, and so may ``sample``, the number of a sampled response:
    the facts then do without them.
    """
    facts = [
        response["source"],
        f"{response['tokens']} tokens",
        f"answer {response['answer']}",
    ]
    if verdict := response.get("verdict"):
        facts.append(verdict)
    if sample is not None:
        facts.append(f"sample {sample}")
    advantage = response.get("advantage_mean")
    if advantage is not None:
        facts.append(f"mean advantage {advantage:.3f}")
    if not response["stopped"]:
        facts.append("cut off")
    reward = response["reward"]
    return {
        "prompt": response["prompt"].strip(),
        "badge": f"reward {reward:.3g}",
        "badge_kind": "right" if reward > 0 else "wrong",
        "facts": " · ".join(facts),
    }


def describe_token(token: Token, level: int) -> CardPiece:
    """Return text, classes and title of a token; ``level`` is its shade from -3 to 3."""
    title = f"probability {exp(token.logprob):.3f}"
    looks = ["unlikely"] if token.logprob < LOW_LOGPROB else []
    if token.advantage is not None:
        title = f"advantage {token.advantage:+.3f}, {title}"
        if level:
            direction = "up" if level > 0 else "down"
            looks.append(f"{direction}{abs(level)}")
    return {"text": token.text, "looks": " ".join(looks), "title": title}
