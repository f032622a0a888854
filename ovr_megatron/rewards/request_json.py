"""Requests as JSON, between a pool and its grader processes.

A program that only grades loads neither images nor NumPy, so that what rows need is imported with the first of them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ovr_megatron.rewards.verdict import GradeRequest


def request_to_json(request: GradeRequest, with_row: bool) -> dict[str, Any]:
    """Return the object from which `request_from_json` makes an equal request; without ``with_row`` it has no row."""
    fields: dict[str, Any] = {
        "response": request.response,
        "answer": request.answer,
        "options": request.options,
        "rule": request.rule,
        "thinking": request.thinking,
    }
    if request.image is not None:
        fields["image"] = asdict(request.image)
    if with_row and request.row is not None:
        from ovr_megatron.rewards.row_transfer import encode_row  # noqa: PLC0415

        fields["row"] = encode_row(request.row)
    return fields


def request_from_json(raw: dict[str, Any]) -> GradeRequest:
    """Return the request of an object of `request_to_json`; all fields but response and answer may be missing."""
    row = None
    image = None
    if "row" in raw:
        from ovr_megatron.rewards.row_transfer import decode_row  # noqa: PLC0415

        row = decode_row(raw["row"])
    if "image" in raw:
        from ovr_megatron.data.schema import ImageSize  # noqa: PLC0415

        image = ImageSize(**raw["image"])
    return GradeRequest(
        raw["response"],
        raw["answer"],
        tuple(raw.get("options") or ()),
        raw.get("rule", "auto"),
        raw.get("thinking", False),
        row=row,
        image=image,
    )
