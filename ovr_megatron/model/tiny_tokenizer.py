"""A byte-level BPE tokenizer, trained on a few lines: the tokenizer of `ovr_megatron.model.tiny`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from ovr_megatron.families import Family, default_family

PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "system\nYou are a helpful assistant.\nuser\nassistant\n<think>\n</think>\n\n",
    "List: red1 green2 blue3 white4. Take red:5,6. Add 7+8=15. Let me check: 15. So \\boxed{15}",
    "list red green blue white. take green: 9. add 9+0=9. Wait, 9. Let me check. So \\boxed{9}",
    "Describe the picture. Name the blue digits. Add the white digits. Take the red ones.",
    "Which colour is it? (A) red (B) green (C) blue (D) white. How many digits are there in the image?",
    "Put the final answer in \\boxed{}. The answer is \\boxed{A}.",
)


class LearnedVocabulary(TypedDict):
    """What byte-level BPE has learned: ids by token, and the merged pairs as texts or as two tokens each."""

    vocab: dict[str, int]
    merges: list[str | list[str]]


def write_tokenizer(
    out: Path,
    corpus: Iterable[str],
    bpe_vocab: int,
    max_length: int,
    family: Family | None = None,
) -> dict[str, int]:
    """Train a tokenizer on ``corpus`` and write its files to ``out``.

    Args:
        out: An existing folder.
        corpus: Texts.
        bpe_vocab: Bounds the learned vocabulary, the 256 bytes included; the added tokens follow it.
        max_length: The longest text that the tokenizer takes without a warning.
        family: Whose added tokens it has; default: the miniature's.

    Returns:
        The ids of the added tokens.
    """
    family = family or default_family()
    tiny = family.tiny
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=bpe_vocab,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    learned: LearnedVocabulary = json.loads(tokenizer.to_str())["model"]
    special = [AddedToken(token, normalized=False, special=True) for token in tiny.special_tokens]
    plain = [AddedToken(token, normalized=False) for token in tiny.added_tokens]
    # Ids go on from the learned vocabulary in this order.
    tokenizer.add_tokens(special + plain)
    added = (*tiny.special_tokens, *tiny.added_tokens)
    ids: dict[str, int] = {}
    for token in added:
        index = tokenizer.token_to_id(token)
        if index is not None:
            ids[token] = index

    tokenizer.save(str(out / "tokenizer.json"))
    _write_vocabulary(out, learned)
    _write_config(out, ids, max_length, family)
    return ids


def _write_vocabulary(out: Path, learned: LearnedVocabulary) -> None:
    """Write ``vocab.json`` and ``merges.txt``, which tokenizers written in Python read."""
    _write_json(out / "vocab.json", learned["vocab"])
    lines = ["#version: 0.2"]
    for pair in learned["merges"]:
        # Versions of the tokenizers library write a pair as a text or as a list.
        lines.append(pair if isinstance(pair, str) else " ".join(pair))
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_config(out: Path, ids: dict[str, int], max_length: int, family: Family) -> None:
    tiny = family.tiny
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": tiny.tokenizer_class,
            "added_tokens_decoder": {
                str(index): {"content": token, **plain, "special": token in tiny.special_tokens}
                for token, index in ids.items()
            },
            "additional_special_tokens": list(tiny.special_tokens[1:]),
            "bos_token": None,
            "eos_token": family.tokens.end_of_turn,
            "pad_token": family.tokens.end_of_text,
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": max_length,
            "split_special_tokens": False,
            "chat_template": tiny.chat_template,
        },
    )


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
