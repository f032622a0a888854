"""Rules that look at one row alone: no answer, a thought cut off, loops, a wrong language, leaked template tokens.

A row is dropped for the first rule that it breaks, in the order of `RULES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ovr_megatron.curation.repetition import repeatness
from ovr_megatron.curation.reward_rules import check_sources
from ovr_megatron.curation.settings import PatternsConfig, PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work
from ovr_megatron.curation.text import prompt_text, response_text
from ovr_megatron.rewards.choice import verifiable
from ovr_megatron.rewards.latex import END_OF_THOUGHT, clean, last_box
from ovr_megatron.rewards.rules import is_plain

Check = Callable[[PatternsConfig, bool, dict[str, Any], str], str | None]

# What a template puts around turns; a model that writes it would end or open turns of its own.
_TEMPLATE = re.compile(
    r"<\|[\w ]{2,40}\|>|<\uff5c[^<>\uff5c]{2,40}\uff5c>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|^(?:Human|User|Assistant|System)\s*:", re.MULTILINE,
)  # fmt: skip
_LETTER = re.compile(r"[^\W\d_]")
_SCRIPTS = {
    "en": re.compile(r"[A-Za-z\u00c0-\u024f\u0370-\u03ff]"),  # Greek letters are mathematics
    "zh": re.compile(r"[A-Za-z\u0370-\u03ff\u3400-\u9fff\uf900-\ufaff]"),
}
_HAN = re.compile(r"[\u3400-\u9fff]")
_ENGLISH = frozenset(
    "the of and to a in is that we so for it this are be as with on by have if or from then which an i not but can let"
    .split()
)  # fmt: skip
_FEW_WORDS = 50  # of fewer words nothing is said about the language


def too_short(config: PatternsConfig, think: bool, row: dict[str, Any], response: str) -> str | None:
    """The response has fewer than ``min_characters`` or more than ``max_characters``."""
    if len(response.strip()) < max(config.min_characters, 1):
        return "response too short"
    return "response too long" if config.max_characters and len(response) > config.max_characters else None


def leaked_template(config: PatternsConfig, think: bool, row: dict[str, Any], response: str) -> str | None:
    """The response holds what only a chat template writes."""
    if not config.template_tokens:
        return None
    return "leaked template token" if _TEMPLATE.search(response) or "<think>" in response else None


def truncated(config: PatternsConfig, think: bool, row: dict[str, Any], response: str) -> str | None:
    """The thought never ends, ends twice, or nothing follows it."""
    if not (config.need_thought and think):
        return None
    thought, end, rest = response.partition(END_OF_THOUGHT)
    if not end:
        return "thought without end"
    if END_OF_THOUGHT in rest:
        return "several ends of thought"
    if not thought.strip():
        return "empty thought"
    return None if rest.strip() else "nothing after the thought"


def without_box(config: PatternsConfig, think: bool, row: dict[str, Any], response: str) -> str | None:
    r"""No closed and filled ``\boxed{}`` after the thought (anywhere, where there is no thought)."""
    if not config.need_box:
        return None
    box = last_box(response)
    return "no box" if box is None or not clean(box) else None


def repeated(config: PatternsConfig, think: bool, row: dict[str, Any], response: str) -> str | None:
    """The response repeats itself (`ovr_megatron.curation.repetition`)."""
    if config.max_repetition == 1 or len(response) < config.repetition_min_characters:
        return None
    return "repetition" if repeatness(response) > config.max_repetition else None


def foreign(config: PatternsConfig, think: bool, row: dict[str, Any], response: str) -> str | None:
    """Letters of another script, or too few function words of the language."""
    if config.language == "any":
        return None
    letters = _LETTER.findall(response)
    own = sum(1 for letter in letters if _SCRIPTS[config.language].match(letter))
    if letters and 1 - own / len(letters) > config.max_foreign:
        return "foreign script"
    if config.language == "zh":
        return None if not letters or _HAN.search(response) else "other language"
    told = re.findall(r"[a-z]+", response.lower())
    if len(told) < _FEW_WORDS:
        return None
    share = sum(1 for word in told if word in _ENGLISH) / len(told)
    return "other language" if share < config.min_function_words else None


def own_pattern(config: PatternsConfig, think: bool, row: dict[str, Any], response: str) -> str | None:
    """One of the regular expressions of ``patterns.drop`` occurs."""
    return next((f"pattern {name}" for name, text in config.drop.items() if re.search(text, response)), None)


RULES: tuple[Check, ...] = (too_short, leaked_template, truncated, without_box, foreign, own_pattern, repeated)


def unverifiable(config: PatternsConfig, row: dict[str, Any]) -> str | None:
    """The answer has no form that a grader can verify: a proof, prose, none of the options."""
    if not config.verifiable or row.get("answer") is None:
        return None
    if not prompt_text(row).strip() and not any(not isinstance(m["content"], str) for m in row["messages"]):
        return "empty prompt"
    return "unverifiable answer" if verifiable(row["answer"], tuple(row.get("options", ()))) else None


def broken_rule(
    config: PatternsConfig, think: bool, row: dict[str, Any], rewards: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """Return the first rule that ``row`` breaks, or None; rules on the response pass over prompt rows.

    ``rewards``: by source, how responses are graded.  A function of the user's takes any answer and needs no box.
    """
    response = response_text(row)
    if not is_plain(rewards.get(row.get("source", ""), "auto")):
        config = replace(config, verifiable=False, need_box=False)
    if reason := unverifiable(config, row):
        return reason
    if response is None:
        return None
    return next((reason for rule in RULES if (reason := rule(config, think, row, response))), None)


def run(work: Work) -> None:
    """Keep the rows that break no rule."""
    check_sources(work.config)
    think = work.config.data.template == "think"
    rules = work.config.reward.rules
    for mapped in work.map(partial(broken_rule, work.config.patterns, think, rewards=rules)):
        if mapped.result is None:
            work.keep(mapped.line, mapped.source)
        else:
            work.drop(mapped.line, mapped.source, mapped.result)


def settings(config: PrepareConfig) -> list[Any]:
    """What decides the outcome."""
    return [config.patterns, config.data.template, config.reward.rules]


STAGE = PrepareStage("patterns", run, settings)
