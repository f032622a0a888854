"""Turn chats into token ids: the template's special tokens are ids, the texts of a row are plain text.

A chat template is rendered with a slot in place of each text.  The text between two special tokens of the rendered
template, slots filled in, is tokenised as one stretch in which nothing is special.  For texts that name no special
token the ids are those of the whole rendered chat; the name of a special token in a text becomes characters.

A reply that is learned is tokenised apart from the text before it: its ids are those that a model samples.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ovr_megatron.data.hf_assets import one_sentence
from ovr_megatron.data.hf_files import AssetError
from ovr_megatron.data.schema import ImagePart, Message, TextPart
from ovr_megatron.data.traces import THINK
from ovr_megatron.errors import UserError
from ovr_megatron.families import Family

# Private-use characters around the index of a text.
_SLOT = "\U000f0000{}\U000f0001"
_LAST_ONLY = "set data.learn=last to learn the last reply alone, or correct the template"

_Content = str | list[dict[str, str]]  # of a turn, as templates read it: a text, or typed parts


class TemplateError(UserError, ValueError):
    """A chat template that is missing, or that does not place each image, video or reply once and in order."""


@dataclass(frozen=True)
class Chat:
    """A prompt and maybe a response, to be tokenised.

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

    def __init__(self, tokenizer: Any, template: str, family: Family) -> None:
        """Bind the Jinja source ``template`` to ``tokenizer`` of a model of ``family``.

        Raises:
            TemplateError: the tokenizer has no token that ends a message.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.special: dict[str, int] = {}
        for index, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                self.special[token.content] = index
        self._end = family.tokens.end_of_turn
        if self._end not in self.special:
            raise TemplateError(f"the tokenizer lacks {self._end}; it is not {family.title}'s")
        self.end_token = self.special[self._end]
        # Longest first: a name may begin with another name.
        names = sorted(self.special, key=len, reverse=True)
        alternatives = [_SLOT.format(r"(\d+)")]
        for name in names:
            alternatives.append(f"({re.escape(name)})")
        self._slot_or_special = re.compile("|".join(alternatives))

    def tokenise(self, chats: Sequence[Chat]) -> list[TokenisedChat]:
        """Tokenise in one batch.

        Raises:
            TemplateError: an earlier reply is to be learned, and the template writes it in another form than a new one.
        """
        rendered = [list(self._render(chat)) for chat in chats]
        texts: list[str] = []
        for pieces in rendered:
            texts += _texts_of(pieces)
        for chat in chats:
            if chat.response is not None:
                texts.append(chat.response)
        # One call for all texts, whose ids are taken in the same order: of the prompts, then of the responses.
        ids = iter(self._tokenise_plain(texts))
        prompts = [self._join_pieces(pieces, ids) for pieces in rendered]
        tokenised = []
        for chat, (prompt, learned) in zip(chats, prompts, strict=True):
            response: list[int] = []
            if chat.response is not None:
                response = [*next(ids), self.end_token]
            tokenised.append(TokenisedChat(prompt, learned, response))
        return tokenised

    @cached_property
    def opens_thought(self) -> bool:
        """Whether the generation prompt ends with an opened ``<think>``."""
        return self._generation_prompt.rstrip().endswith(THINK)

    def check_text(self, folder: str | Path) -> None:
        """Render a chat of one text and check that the text is in it, once.

        Raises:
            AssetError: the template cannot be rendered, or leaves the text out.
        """
        text = "Add 1 and 2."
        message = Message("user", (TextPart(text),))
        pieces = self._render(Chat([message]))
        count = sum(piece.count(text) for piece in _texts_of(pieces))
        if count != 1:
            raise AssetError(
                f"{folder}: the chat template writes a user's text {count} times; use data.template=think or correct it"
            )

    def _join_pieces(
        self,
        pieces: Sequence[str | int],
        ids: Iterator[list[int]],
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a chat's pieces, and which are learned: earlier replies, each with the token that ends it.

        Args:
            pieces: As `_render` yields them.
            ids: Yields the ids of each text among the pieces.
        """
        tokens: list[int] = []
        learned: list[bool] = []
        after_reply = False  # the token that ends a reply is learned with it
        for i, piece in enumerate(pieces):
            is_reply = isinstance(piece, _Reply)
            next_pieces = list(pieces[i + 1 : i + 2])  # empty after the last piece
            if is_reply and next_pieces != [self.end_token]:
                raise TemplateError(f"the chat template does not end an earlier reply with {self._end}; {_LAST_ONLY}")
            # The template's special token is an id already; a text takes the next ids.
            piece_ids = [piece] if isinstance(piece, int) else next(ids)
            tokens += piece_ids
            learned += [is_reply or after_reply] * len(piece_ids)
            after_reply = is_reply
        return tokens, learned

    def _render(self, chat: Chat) -> Iterator[str | int]:
        """Yield, in order, stretches of plain text, ids of the template's special tokens, and replies to learn."""
        texts: list[str] = []  # by number of the slot
        reply_slots: set[int] = set()

        def add_slot(text: str) -> str:
            texts.append(text)
            return _SLOT.format(len(texts) - 1)

        turns = []
        for i, message in enumerate(chat.messages):
            content: _Content
            if i in chat.replies:
                reply_slots.add(len(texts))
                content = add_slot(chat.replies[i])
            else:
                content = _content(message, add_slot)
            turns.append({"role": message.role, "content": content})
        rendered = self._apply(turns, add_generation_prompt=True)
        run = ""  # plain text since the last special token or reply
        end = 0
        reply_count = 0
        for match in self._slot_or_special.finditer(rendered):
            run += rendered[end : match.start()]
            end = match.end()
            if match[1] is None:
                if run:
                    yield run
                yield self.special[match[0]]
                run = ""
                continue
            slot = int(match[1])
            if slot not in reply_slots:
                run += texts[slot]
                continue
            yield run + self._opening
            yield _Reply(texts[slot])
            run = ""
            reply_count += 1
        if reply_count != len(reply_slots):
            raise TemplateError(f"the chat template leaves out earlier replies; {_LAST_ONLY}")
        if run := run + rendered[end:]:
            yield run

    @cached_property
    def _generation_prompt(self) -> str:
        """The text that the template appends for a new reply."""
        question = [{"role": "user", "content": "?"}]
        prompt = self._apply(question, add_generation_prompt=True)
        return prompt.removeprefix(self._apply(question, add_generation_prompt=False))

    @cached_property
    def _opening(self) -> str:
        """The end of the generation prompt that an earlier reply does not begin with, as an opened ``<think>``."""
        question = {"role": "user", "content": "?"}
        slot = _SLOT.format(0)
        answer = {"role": "assistant", "content": slot}
        dialogue = self._apply([question, answer], add_generation_prompt=False)
        rendered_question = self._apply([question], add_generation_prompt=False)
        reply = dialogue.removeprefix(rendered_question)
        head, _, _ = reply.partition(slot)
        if not self._generation_prompt.startswith(head):
            raise TemplateError(f"the chat template begins an earlier reply otherwise than a new one; {_LAST_ONLY}")
        return self._generation_prompt.removeprefix(head)

    def _apply(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        with one_sentence("the chat template cannot be rendered", "use data.template=think or correct it"):
            # Text and no ids: the special tokens of the template and those in texts are told apart by the slots.
            return self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, in which a special token's name is characters."""
        (ids,) = self._tokenise_plain([text])
        return ids

    def _tokenise_plain(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, in which a special token's name is characters."""
        if not texts:
            return []
        encoding = self.tokenizer(
            texts,
            verbose=False,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
        )
        return encoding["input_ids"]


def _texts_of(pieces: Iterable[str | int]) -> list[str]:
    """Return the texts among the pieces of a rendered chat, without the ids."""
    return [str(piece) for piece in pieces if isinstance(piece, str)]


def _content(message: Message, add_slot: Callable[[str], str]) -> _Content:
    """Return a message's content in the form that chat templates read: a text, or a list of typed parts."""
    if len(message.parts) == 1:
        part = message.parts[0]
        # Some templates take no list for a text.
        if isinstance(part, TextPart):
            return add_slot(part.text)
    content = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": add_slot(part.text)})
        elif isinstance(part, ImagePart):
            content.append({"type": "image"})
        else:
            content.append({"type": "video"})
    return content
