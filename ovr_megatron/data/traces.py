r"""Reasoning traces: a thought inside ``<think>`` and ``</think>``, then the answer.

Traces are published in several forms.  `convert` rewrites those that are known to the one form that a template with
an opened thought continues, `continuation` takes off what that template writes itself, and `problem_of` says why a
reply cannot be learned after it.
"""

from __future__ import annotations

import re

THINK = "<think>"
END_OF_THOUGHT = "</think>"

# Opening and closing marks of a thought: OpenThoughts, and tags that stand for <think>.
_THOUGHTS = (
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
)
_SOLUTION = re.compile(r"\s*<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>\s*|$)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*)</answer>\s*$", re.DOTALL)
_SHORT_ANSWER = 64  # characters of one line that is a final answer rather than a sentence about it


def with_thought(thought: str, answer: str) -> str:
    """Return the trace of a thought and an answer."""
    thought = thought.strip()
    answer = answer.strip()
    return f"{THINK}\n{thought}\n{END_OF_THOUGHT}\n\n{answer}"


def convert(reply: str) -> str:
    r"""Rewrite a reply in a known form of traces; return any other reply unchanged.

    The thought may stand inside OpenThoughts' tokens, ``<thinking>``, ``<reasoning>`` or ``<thought>``; the answer
    inside OpenThoughts' tokens or ``<answer>``.  A short answer without a box gets one, since only ``\boxed{}`` is
    graded: ``<answer>6</answer>`` becomes ``\boxed{6}``.
    """
    text = reply.lstrip()
    for opening, closing in _THOUGHTS:
        if text.startswith(opening):
            text = text.removeprefix(opening)
            thought, end, rest = text.partition(closing)
            # Cut off within the thought: there is no answer to set apart.
            if not end:
                return reply
            answer = _SOLUTION.sub(lambda match: match[1].strip(), rest)
            reply = with_thought(thought, answer)
            break
    # The last end of a thought: an <answer> inside the thought stays as it is.
    before, end, answer = reply.rpartition(END_OF_THOUGHT)
    boxed = _ANSWER.sub(lambda match: _box(match[1].strip()), answer)
    return before + end + boxed


def convert_instruction(text: str) -> str:
    """Rewrite OpenThoughts' tokens in a system message that asks for them, as `convert` does in the reply."""
    opening, closing = _THOUGHTS[0]
    text = text.replace(opening, THINK)
    text = text.replace(closing, END_OF_THOUGHT)
    return _SOLUTION.sub(lambda match: match[1], text)


def continuation(reply: str) -> str:
    """Return what follows an opened ``<think>`` and its line break: the reply without an opening of its own."""
    text = reply.lstrip()
    if not text.startswith(THINK):
        return reply
    # One line break alone: the template writes one, further ones are the model's.
    return text.removeprefix(THINK).removeprefix("\n")


def problem_of(text: str) -> str | None:
    """Say why a `continuation` is no thought with an answer after it; None if it is."""
    thought, end, answer = text.partition(END_OF_THOUGHT)
    if THINK in thought or answer.lstrip().startswith(THINK):
        return f"has {THINK} after its beginning"
    if not end:
        return f"has no {END_OF_THOUGHT}, so that all of it would be learned as a thought"
    return None


def _box(answer: str) -> str:
    """Put a short answer without a box into one; return any other answer unchanged."""
    is_short = 0 < len(answer) <= _SHORT_ANSWER and "\n" not in answer
    if not is_short or "\\boxed" in answer:
        return answer
    return f"\\boxed{{{answer}}}"
