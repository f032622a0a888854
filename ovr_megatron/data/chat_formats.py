r"""Readers of chats that others publish: verl's prompts, LLaVA's conversations, Alpaca, ms-swift.

Messages stay as they are, so a set for reinforcement learning should already ask for ``\boxed{}``.  Images and videos
stand in columns of their own, which `ovr_megatron.data.formats.read_row` places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovr_megatron.data.row_parsing import check_answer, parse_answer, parse_id, parse_messages, parse_text
from ovr_megatron.data.schema import Row, RowError

# Our role for each role name of the formats.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def read_verl(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of verl or TRL: ``prompt`` (a text, or turns of role and content) and the answer or the reply.

    The answer is verl's ``reward_model.ground_truth``, or ``answer``; the reply, of SFT files, is ``response`` (verl)
    or ``completion`` (TRL).  ``extra_info.index``, if there, becomes the id, ``data_source`` the source.
    """
    turns = _turns(raw.get("prompt"), "user")
    for name in ("response", "completion"):
        turns += _turns(raw.get(name), "assistant")
    messages = parse_messages(turns, where, "prompt", image_root, roles=_ROLES)
    is_prompt = messages[-1].role == "user"
    truth = _nested(raw, "reward_model", "ground_truth")
    if truth is None:
        answer = parse_answer(raw, where, prompt=is_prompt)
    else:
        answer = parse_text(truth, where, "reward_model.ground_truth").strip()
    index = _nested(raw, "extra_info", "index")
    row = Row(
        messages,
        answer=answer,
        source=parse_text(raw.get("data_source") or "", where, "data_source"),
        id=parse_id(index, where, "extra_info.index"),
        where=where,
    )
    check_answer(row)
    return row


def _nested(raw: Any, column: str, key: str) -> Any:
    """Return the field ``key`` of the object in a column; None where the column holds no object."""
    value = raw.get(column)
    if not isinstance(value, Mapping):
        return None
    return value.get(key)


def read_llava(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of LLaVA or ShareGPT: ``conversations`` (from human or gpt, value), ``id``."""
    turns = raw.get("conversations")
    return _chat_row(raw, turns, where, "conversations", image_root, ("from", "value"))


def read_alpaca(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of Alpaca: ``instruction`` and ``input`` ask, ``output`` replies, ``history`` has earlier pairs."""
    question = raw.get("instruction")
    reply = raw.get("output")
    context = raw.get("input")
    if isinstance(context, str) and context.strip():
        question = f"{question}\n{context}"
    return _pair_row(raw, question, reply, where, "instruction", image_root)


def read_query(raw: Any, where: str, image_root: Path) -> Row:
    """Read one row of ms-swift's older form: ``query`` asks, ``response`` replies, ``history`` has earlier pairs."""
    question = raw.get("query")
    reply = raw.get("response")
    return _pair_row(raw, question, reply, where, "query", image_root)


def _pair_row(
    raw: Any,
    question: Any,
    reply: Any,
    where: str,
    field: str,
    image_root: Path,
) -> Row:
    """Read a question and a reply, and the pairs of ``history`` before them."""
    turns: list[Any] = []
    history = raw.get("history") or ()
    for i, pair in enumerate(history):
        # A text of two characters is no pair.
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            problem = f"is {str(pair)[:60]!r}"
            raise RowError(where, f"history[{i}]", problem, "give a pair: a question and its reply")
        turns += _turns(pair[0], "user")
        turns += _turns(pair[1], "assistant")
    turns += _turns(question, "user")
    turns += _turns(reply, "assistant")
    return _chat_row(raw, turns, where, field, image_root, ("role", "content"))


def _chat_row(
    raw: Any,
    turns: Any,
    where: str,
    field: str,
    image_root: Path,
    keys: tuple[str, str],
) -> Row:
    """Read ``turns``, the value of ``field``, and the columns beside them."""
    messages = parse_messages(turns, where, field, image_root, keys, _ROLES)
    is_prompt = messages[-1].role == "user"
    answer = parse_answer(raw, where, prompt=is_prompt)
    source = raw.get("source") or raw.get("data_source") or ""
    row = Row(
        messages,
        answer=answer,
        source=parse_text(source, where, "source"),
        id=parse_id(raw.get("id"), where, "id"),
        where=where,
    )
    check_answer(row)
    return row


def _turns(value: Any, role: str) -> list[Any]:
    """Return a text as one turn of ``role``, turns as they are, and nothing for None."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    if value is None:
        return []
    # Any other value is refused with the name of its field, as the content of a turn.
    return [{"role": role, "content": value}]
