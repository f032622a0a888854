"""Chats to token ids: the template's special tokens are ids, everything a row says is plain text.

A chat template is rendered with a slot in place of each text.  What stands between two special tokens of the
rendered template, texts filled in, is tokenised as one stretch in which nothing is special.  For texts that
name no special token the ids are those of the whole rendered chat; for those that do, they are characters.

A reply that is learned is tokenised apart from what stands before it: its ids are those that a model samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ovr_megatron.data.hf_assets import one_sentence
from ovr_megatron.data.hf_files import AssetError
from ovr_megatron.data.schema import ImagePart, Message, TextPart
from ovr_megatron.data.traces import THINK
from ovr_megatron.errors import UserError

# Private-use characters around the index of a text.
_SLOT = "\U000f0000{}\U000f0001"
END = "<|im_end|>"
_LAST_ONLY = "set data.learn=last to learn the last reply alone, or correct the template"


class TemplateError(UserError, ValueError):
    """A chat template that is missing, or that does not place each image, video or reply once and in order."""


@dataclass(frozen=True)
class Chat:
    """What is tokenised: a prompt and maybe a response.

    Attributes:
        messages: The prompt; the template's generation prompt follows.
        replies: Text of those earlier assistant messages that are learned, by index in ``messages``, each as it
            follows the generation prompt.
        response: Text of the response, as it follows the generation prompt; None in a prompt that is to be answered.
    """

    messages: Sequence[Message]
    replies: Mapping[int, str] = field(default_factory=dict)
    response: str | None = None


@dataclass(frozen=True)
class TokenisedChat:
    """Ids of a `Chat`; each image and video is one placeholder.

    Attributes:
        prompt: Ids of the prompt.
        learned: For each id of the prompt, whether it belongs to a reply that is learned.
        response: Ids of the response with the end token; empty where there is none.
    """

    prompt: list[int]
    learned: list[bool]
    response: list[int]


class _Reply(str):
    """Text of an earlier reply that is learned."""


class ChatTemplate:
    """A Jinja chat template bound to a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        """Keep both; ``template`` is the Jinja source.

        Raises:
            TemplateError: the tokenizer has no token that ends a message.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.special = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if END not in self.special:
            raise TemplateError(f"the tokenizer lacks {END}; it is not Qwen2.5-VL's")
        self.end_token = self.special[END]
        names = sorted(self.special, key=len, reverse=True)
        self._pieces = re.compile("|".join([_SLOT.format(r"(\d+)"), *(f"({re.escape(name)})" for name in names)]))

    def tokenise(self, chats: Sequence[Chat]) -> list[TokenisedChat]:
        """Tokenise in one batch.

        Raises:
            TemplateError: an earlier reply is to be learned, and the template does not write it as it asks for one.
        """
        rendered = [list(self._render(chat)) for chat in chats]
        runs = [str(piece) for pieces in rendered for piece in pieces if isinstance(piece, str)]
        responses = [chat.response for chat in chats if chat.response is not None]
        ids = iter(self._plain([*runs, *responses]))
        prompts = [self._prompt(pieces, ids) for pieces in rendered]
        tails = [[*next(ids), self.end_token] if chat.response is not None else [] for chat in chats]
        return [TokenisedChat(*prompt, tail) for prompt, tail in zip(prompts, tails, strict=True)]

    @cached_property
    def opens_thought(self) -> bool:
        """Whether a reply is asked for after an opened ``<think>``."""
        return self._generation_prompt.rstrip().endswith(THINK)

    def check_text(self, folder: str | Path) -> None:
        """Render a chat of one text and see that the text is in it, once.

        Raises:
            AssetError: the template cannot be rendered, or leaves the text out.
        """
        text = "Add 1 and 2."
        pieces = list(self._render(Chat([Message("user", (TextPart(text),))])))
        count = sum(piece.count(text) for piece in pieces if isinstance(piece, str))
        if count != 1:
            raise AssetError(
                f"{folder}: the chat template writes a user's text {count} times; use data.template=think or correct it"
            )

    def _prompt(self, pieces: Sequence[str | int], ids: Iterator[list[int]]) -> tuple[list[int], list[bool]]:
        """Ids of a chat's pieces, and which are learned: earlier replies, each with the token that ends it."""
        tokens: list[int] = []
        learned: list[bool] = []
        after_reply = False  # the token that ends a reply is learned with it
        for i, piece in enumerate(pieces):
            reply = isinstance(piece, _Reply)
            if reply and list(pieces[i + 1 : i + 2]) != [self.end_token]:
                raise TemplateError(f"the chat template does not end an earlier reply with {END}; {_LAST_ONLY}")
            new = [piece] if isinstance(piece, int) else next(ids)
            tokens += new
            learned += [reply or after_reply] * len(new)
            after_reply = reply
        return tokens, learned

    def _render(self, chat: Chat) -> Iterator[str | int]:
        """Yield, in order, stretches of plain text, ids of the template's special tokens, and replies to learn."""
        texts: list[str] = []
        replies: set[int] = set()

        def slot(text: str) -> str:
            texts.append(text)
            return _SLOT.format(len(texts) - 1)

        turns = []
        for i, message in enumerate(chat.messages):
            if i in chat.replies:
                replies.add(len(texts))
            content = slot(chat.replies[i]) if i in chat.replies else _content(message, slot)
            turns.append({"role": message.role, "content": content})
        rendered = self._apply(turns, add_generation_prompt=True)
        run, end, written = "", 0, 0
        for match in self._pieces.finditer(rendered):
            run += rendered[end : match.start()]
            end = match.end()
            if match[1] is None:
                if run:
                    yield run
                yield self.special[match[0]]
                run = ""
            elif int(match[1]) not in replies:
                run += texts[int(match[1])]
            else:
                yield run + self._opening
                yield _Reply(texts[int(match[1])])
                run, written = "", written + 1
        if written != len(replies):
            raise TemplateError(f"the chat template leaves out earlier replies; {_LAST_ONLY}")
        if run := run + rendered[end:]:
            yield run

    @cached_property
    def _generation_prompt(self) -> str:
        """What the template writes to ask for a reply."""
        question = [{"role": "user", "content": "?"}]
        asked = self._apply(question, add_generation_prompt=True)
        return asked.removeprefix(self._apply(question, add_generation_prompt=False))

    @cached_property
    def _opening(self) -> str:
        """What the generation prompt has beyond the head of an earlier reply, as the opened thought of `THINK`."""
        question = [{"role": "user", "content": "?"}]
        reply = [*question, {"role": "assistant", "content": _SLOT.format(0)}]
        written = self._apply(reply, add_generation_prompt=False)
        head = written.removeprefix(self._apply(question, add_generation_prompt=False)).partition(_SLOT.format(0))[0]
        if not self._generation_prompt.startswith(head):
            raise TemplateError(f"the chat template begins an earlier reply otherwise than a new one; {_LAST_ONLY}")
        return self._generation_prompt.removeprefix(head)

    def _apply(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        with one_sentence("the chat template cannot be rendered", "use data.template=think or correct it"):
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=add_generation_prompt
            )

    def _plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return self.tokenizer(texts, verbose=False, **options)["input_ids"]


def _content(message: Message, slot: Callable[[str], str]) -> str | list[dict[str, str]]:
    """A message's content in the form that chat templates read: a text, or a list of typed parts."""
    if len(message.parts) == 1 and isinstance(message.parts[0], TextPart):
        return slot(message.parts[0].text)
    content = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": slot(part.text)})
        else:
            content.append({"type": "image" if isinstance(part, ImagePart) else "video"})
    return content
