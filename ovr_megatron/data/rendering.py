"""Chats to token ids: the template's special tokens are ids, everything a row says is plain text.

A chat template is rendered with a slot in place of each text.  What stands between two special tokens of the
rendered template, texts filled in, is tokenised as one stretch in which nothing is special.  For texts that
name no special token the ids are those of the whole rendered chat; for those that do, they are characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ovr_megatron.data.schema import ImagePart, Message, TextPart

# Private-use characters around the index of a text.
_SLOT = "\U000f0000{}\U000f0001"


class ChatTemplate:
    """A Jinja chat template bound to a Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        """Keep both; ``template`` is the Jinja source."""
        self.tokenizer = tokenizer
        self.template = template
        self.special = {
            token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        names = sorted(self.special, key=len, reverse=True)
        self._pieces = re.compile("|".join([_SLOT.format(r"(\d+)"), *(f"({re.escape(name)})" for name in names)]))

    def tokenise(
        self, chats: Sequence[Sequence[Message]], texts: Sequence[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Tokenise in one batch.

        Args:
            chats: Prompts; each is followed by the template's generation prompt.
            texts: Plain texts, taken as they are.

        Returns:
            Ids of each chat, with one placeholder for each image and video, and ids of each text.
        """
        rendered = [list(self._render(chat)) for chat in chats]
        runs = [piece for pieces in rendered for piece in pieces if isinstance(piece, str)]
        plain = self._plain([*runs, *texts])
        ids = iter(plain)
        prompts = [
            [token for piece in pieces for token in (next(ids) if isinstance(piece, str) else (piece,))]
            for pieces in rendered
        ]
        return prompts, plain[len(runs) :]

    def _render(self, messages: Sequence[Message]) -> Iterator[str | int]:
        """Yield, in order, stretches of plain text and ids of the template's special tokens."""
        texts: list[str] = []

        def slot(text: str) -> str:
            texts.append(text)
            return _SLOT.format(len(texts) - 1)

        chat = [{"role": message.role, "content": _content(message, slot)} for message in messages]
        rendered = self.tokenizer.apply_chat_template(
            chat, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        run, end = "", 0
        for match in self._pieces.finditer(rendered):
            run += rendered[end : match.start()]
            end = match.end()
            if match[1] is not None:
                run += texts[int(match[1])]
                continue
            if run:
                yield run
            yield self.special[match[0]]
            run = ""
        if run := run + rendered[end:]:
            yield run

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
