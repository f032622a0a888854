r"""Readers of chats that others publish: verl's prompts, LLaVA's conversations, Alpaca, ms-swift.

Messages stay as they are, so a set for reinforcement learning should already ask for ``\boxed{}``.  Images and videos
stand in columns of their own, which `ovr_megatron.data.formats.read_row` places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.data.schema import Row, RowError, check_answer, parse_answer, parse_messages, parse_text

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_verl(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of verl or TRL: ``prompt`` (a text, or turns of role and content) and the answer or the reply.

    The answer is verl's ``reward_model.ground_truth``, or ``answer``; the reply, of SFT files, is ``response`` (verl)
    or ``completion`` (TRL).  ``extra_info.index``, if there, becomes the id, ``data_source`` the source.
    """
    turns = _turns(raw.get("prompt"), "user")
    for name in ("response", "completion"):
        if raw.get(name) is not None:
            turns = [*turns, *_turns(raw[name], "assistant")]
    messages = parse_messages(turns, where, "prompt", image_root, roles=_ROLES)
    reward = raw.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, Mapping) else None
    extra = raw.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    if truth is None:
        answer = parse_answer(raw, where, prompt=messages[-1].role == "user")
    else:
        answer = parse_text(truth, where, "reward_model.ground_truth").strip()
    row = Row(
        messages,
        answer=answer,
        source=parse_text(raw.get("data_source") or "", where, "data_source"),
        id=Path(where).name if index is None else parse_text(index, where, "extra_info.index"),
        where=where,
    )
    check_answer(row)
    return row


def read_llava(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of LLaVA or ShareGPT: ``conversations`` (from human or gpt, value), ``id``."""
    turns = raw.get("conversations")
    return _chat_row(raw, turns, where, "conversations", image_root, ("from", "value"))


def read_alpaca(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of Alpaca: ``instruction`` and ``input`` ask, ``output`` replies, ``history`` has earlier pairs."""
    question = raw.get("instruction")
    context = raw.get("input")
    if isinstance(context, str) and context.strip():
        question = f"{question}\n{context}"
    return _pair_row(raw, question, raw.get("output"), where, "instruction", image_root)


def read_query(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of ms-swift's older form: ``query`` asks, ``response`` replies, ``history`` has earlier pairs."""
    return _pair_row(raw, raw.get("query"), raw.get("response"), where, "query", image_root)


def _pair_row(raw: Any, question: Any, reply: Any, where: str, field: str, image_root: Path) -> Row:
    """Read a question and a reply, and the pairs of ``history`` before them."""
    turns: list[Any] = []
    for i, pair in enumerate(raw.get("history") or ()):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise RowError(where, f"history[{i}]", f"is {str(pair)[:60]!r}", "give a pair: a question and its reply")
        turns += _turns(pair[0], "user") + _turns(pair[1], "assistant")
    turns += _turns(question, "user") + _turns(reply, "assistant")
    return _chat_row(raw, turns, where, field, image_root, ("role", "content"))


def _chat_row(raw: Any, turns: Any, where: str, field: str, image_root: Path, keys: tuple[str, str]) -> Row:
    """Read ``turns``, the value of ``field``, and the columns beside them."""
    messages = parse_messages(turns, where, field, image_root, keys, _ROLES)
    row = Row(
        messages,
        answer=parse_answer(raw, where, prompt=messages[-1].role == "user"),
        source=parse_text(raw.get("source") or raw.get("data_source") or "", where, "source"),
        id=Path(where).name if raw.get("id") is None else parse_text(raw["id"], where, "id"),
        where=where,
    )
    check_answer(row)
    return row


def _turns(value: Any, role: str) -> list[Any]:
    """Return a text as one turn of ``role``, turns as they are, and nothing for None."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    return [] if value is None else [{"role": role, "content": value}]
