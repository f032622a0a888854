"""Turn rows to learn from into chats: which replies are learned, and how each follows the generation prompt."""

from __future__ import annotations

from dataclasses import replace

from ovr_megatron.config import DataConfig
from ovr_megatron.data.rendering import Chat
from ovr_megatron.data.schema import Message, Row, RowError, TextPart
from ovr_megatron.data.traces import END_OF_THOUGHT, continuation, convert, convert_instruction, problem_of

NO_THOUGHT = f"\n{END_OF_THOUGHT}\n\n"  # closes an opened thought at once


def converted_row(row: Row) -> Row:
    """Return the row with its reasoning traces in the form that an opened thought continues."""
    messages = [converted_message(message) for message in row.messages]
    return replace(row, messages=tuple(messages))


def converted_message(message: Message) -> Message:
    """Return the message with a trace, or with the request for a trace, in the form of `convert`."""
    rewrites = {"assistant": convert, "system": convert_instruction}
    rewrite = rewrites.get(message.role)
    if rewrite is None:
        return message
    text = rewrite(message.text)
    # Unchanged, it keeps its parts, which else would become one.
    if text == message.text:
        return message
    return replace(message, parts=(TextPart(text),))


def cut_after_learned(row: Row) -> Row:
    """Return the row up to the last message that is learned.

    Raises:
        RowError: there is none.
    """
    if row.is_prompt:
        remedy = "a row to learn from ends with an assistant message; add it or remove the row"
        raise RowError(row.where, "messages", "the last message is the user's", remedy)
    learned = _learned_messages(row)
    if not learned:
        raise RowError(row.where, "messages", "has no message of weight 1 to learn from", "remove the row")
    # The messages after it are no target, and no target depends on them.
    end = learned[-1] + 1
    return replace(row, messages=row.messages[:end])


def supervised_chat(row: Row, config: DataConfig, opens_thought: bool) -> Chat:
    """Return the chat of a row to learn from, each learned reply as it follows the generation prompt.

    Args:
        row: Ends with a message that is learned, see `cut_after_learned`.
        config: Says which replies are learned, and what to do with replies without a thought.
        opens_thought: Whether the generation prompt ends with an opened ``<think>``.

    Raises:
        RowError: the generation prompt opens a thought, and a reply does not close it, or opens another.
    """
    last = len(row.messages) - 1
    replies = {}
    if config.learn == "all":
        for index in _learned_messages(row):
            if index < last:
                replies[index] = _reply_text(row, index, config, opens_thought)
    response = _reply_text(row, last, config, opens_thought)
    return Chat(row.prompt, replies, response)


def _reply_text(row: Row, index: int, config: DataConfig, opens_thought: bool) -> str:
    """Return the text of an assistant message from where the generation prompt ends."""
    reply = row.messages[index].text
    if not opens_thought:
        return reply
    policy = config.without_thought
    text = continuation(reply)
    problem = problem_of(text)
    if policy == "open" or problem is None:
        return text
    # A reply that opens a thought and does not close it is damaged: nothing is put before it.
    if policy == "close" and text == reply and END_OF_THOUGHT not in text:
        return NO_THOUGHT + text
    remedy = "correct the row; for chats without thoughts set data.without_thought=close or data.template=model"
    if index < len(row.messages) - 1:
        remedy += ", or data.learn=last to learn the last reply alone"
    raise RowError(row.where, f"messages[{index}]", problem, remedy)


def _learned_messages(row: Row) -> list[int]:
    """Return the indices of the assistant messages that the row lets a model learn."""
    indices = []
    for index, message in enumerate(row.messages):
        if message.role == "assistant" and message.learn:
            indices.append(index)
    return indices
