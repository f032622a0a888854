"""Write the texts of a response's card, for the page itself and for the files that browser.js reads."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import Any

from ovr_megatron.analysis.samples import LOW_LOGPROB, Token

EMPTY_CARD = {
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


def card_texts(response: Mapping[str, Any], sample: int | None = None) -> dict[str, str]:
    """Return prompt, badge and facts of a rollout's row, or of one with the same keys.

    ``verdict`` and ``advantage_mean`` may be absent or None, and so may ``sample``, the number of a sampled response:
    the facts then do without them.
    """
    facts = [response["source"], f"{response['tokens']} tokens", f"answer {response['answer']}"]
    if response.get("verdict"):
        facts.append(response["verdict"])
    if sample is not None:
        facts.append(f"sample {sample}")
    if response.get("advantage_mean") is not None:
        facts.append(f"mean advantage {response['advantage_mean']:.3f}")
    if not response["stopped"]:
        facts.append("cut off")
    return {
        "prompt": response["prompt"].strip(),
        "badge": f"reward {response['reward']:.3g}",
        "badge_kind": "right" if response["reward"] > 0 else "wrong",
        "facts": " · ".join(facts),
    }


def describe_token(token: Token, level: int) -> dict[str, str]:
    """Return text, classes and title of a token; ``level`` is its shade from -3 to 3."""
    title = f"probability {exp(token.logprob):.3f}"
    looks = ["unlikely"] if token.logprob < LOW_LOGPROB else []
    if token.advantage is not None:
        title = f"advantage {token.advantage:+.3f}, {title}"
        if level:
            looks.append(f"{'up' if level > 0 else 'down'}{abs(level)}")
    return {"text": token.text, "looks": " ".join(looks), "title": title}
