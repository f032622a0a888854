"""Rules on a single row: no answer, a thought cut off, loops, a wrong language, leaked template tokens.

A row is dropped for the first rule that it breaks, in the order of `RULES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from ovr_megatron.curation.reward_rules import check_sources
from ovr_megatron.curation.settings import PatternsConfig, PrepareConfig
from ovr_megatron.curation.stage import PrepareStage, Work
from ovr_megatron.curation.text import prompt_text, response_text
from ovr_megatron.data.row_json import RowJson
from ovr_megatron.rewards.combination import any_part, weights_of
from ovr_megatron.rewards.latex import END_OF_THOUGHT, clean, last_box
from ovr_megatron.rewards.repetition import repeatness
from ovr_megatron.rewards.rules import answer_problem, is_verifying, reads_box
from ovr_megatron.rewards.verdict import RewardRule

Check = Callable[[PatternsConfig, bool, RowJson, str], str | None]

# Tokens with which chat templates delimit turns; a model that learns to write them would end or open turns itself.
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
# The most frequent function words: any English prose of some length has many of them.
_ENGLISH = frozenset(
    "the of and to a in is that we so for it this are be as with on by have if or from then which an i not but can let"
    .split()
)  # fmt: skip
_FEW_WORDS = 50  # a text of fewer words says too little about its language


def too_short(config: PatternsConfig, think: bool, row: RowJson, response: str) -> str | None:
    """Refuse a response of fewer than ``min_characters`` or more than ``max_characters``."""
    if len(response.strip()) < max(config.min_characters, 1):
        return "response too short"
    if config.max_characters and len(response) > config.max_characters:
        return "response too long"
    return None


def leaked_template(config: PatternsConfig, think: bool, row: RowJson, response: str) -> str | None:
    """Refuse a response with tokens that only a chat template writes."""
    if not config.template_tokens:
        return None
    if "<think>" in response or _TEMPLATE.search(response):
        return "leaked template token"
    return None


def truncated(config: PatternsConfig, think: bool, row: RowJson, response: str) -> str | None:
    """Refuse a thought that never ends, ends twice, is empty, or is followed by nothing."""
    if not (config.need_thought and think):
        return None
    # The template opens the thought, so the response has no opening tag.
    thought, end, rest = response.partition(END_OF_THOUGHT)
    if not end:
        return "thought without end"
    if END_OF_THOUGHT in rest:
        return "several ends of thought"
    if not thought.strip():
        return "empty thought"
    if not rest.strip():
        return "nothing after the thought"
    return None


def without_box(config: PatternsConfig, think: bool, row: RowJson, response: str) -> str | None:
    r"""Refuse a response without a closed and filled ``\boxed{}`` after the thought (anywhere, if there is none)."""
    if not config.need_box:
        return None
    box = last_box(response)
    if box is None or not clean(box):
        return "no box"
    return None


def repeated(config: PatternsConfig, think: bool, row: RowJson, response: str) -> str | None:
    """Refuse a response that repeats itself (`ovr_megatron.rewards.repetition`)."""
    if config.max_repetition == 1 or len(response) < config.repetition_min_characters:
        return None
    if repeatness(response) > config.max_repetition:
        return "repetition"
    return None


def foreign(config: PatternsConfig, think: bool, row: RowJson, response: str) -> str | None:
    """Refuse letters of another script, and a text with too few function words of the language."""
    if config.language == "any":
        return None
    letters = _LETTER.findall(response)
    script = _SCRIPTS[config.language]
    native = sum(1 for letter in letters if script.match(letter))
    if letters:
        foreign_share = 1 - native / len(letters)
        if foreign_share > config.max_foreign:
            return "foreign script"
    if config.language == "zh":
        # Latin letters count as native, because formulas have them; so at least one Chinese character is required.
        return None if not letters or _HAN.search(response) else "other language"
    words = re.findall(r"[a-z]+", response.lower())
    if len(words) < _FEW_WORDS:
        return None
    function_words = sum(1 for word in words if word in _ENGLISH)
    share = function_words / len(words)
    if share < config.min_function_words:
        return "other language"
    return None


def user_pattern(config: PatternsConfig, think: bool, row: RowJson, response: str) -> str | None:
    """Refuse a response in which one of the regular expressions of ``patterns.drop`` occurs."""
    for name, pattern in config.drop.items():
        if re.search(pattern, response):
            return f"pattern {name}"
    return None


# The cheap rules first: repeatness sorts every suffix of the response.
RULES: tuple[Check, ...] = (
    too_short,
    leaked_template,
    truncated,
    without_box,
    foreign,
    user_pattern,
    repeated,
)


def unverifiable(config: PatternsConfig, row: RowJson, rule: RewardRule) -> str | None:
    """Refuse an answer in a form that no grader can verify: a proof, prose, none of the options.

    Functions of the user's, judges and rules of style take any answer.
    """
    verifying = [name for name in weights_of(rule) if is_verifying(name)]
    if not config.verifiable or row.get("answer") is None or not verifying:
        return None
    # Content in parts may hold an image, which is a prompt without any text.
    has_media = any(not isinstance(message["content"], str) for message in row["messages"])
    if not has_media and not prompt_text(row).strip():
        return "empty prompt"
    options = tuple(row.get("options", ()))
    if any(answer_problem(name, row["answer"], options) for name in verifying):
        return "unverifiable answer"
    return None


def broken_rule(
    config: PatternsConfig,
    think: bool,
    row: RowJson,
    rewards: Mapping[str, RewardRule] = MappingProxyType({}),
) -> str | None:
    """Return the first rule that ``row`` breaks, or None; prompt rows are not checked by the rules on the response.

    ``rewards`` maps sources to the rules by which their responses are graded.  Only rules that read a box need one.
    """
    response = response_text(row)
    source = row.get("source", "")
    reward_rule = rewards.get(source, "auto")
    if not any_part(reward_rule, reads_box):
        config = replace(config, need_box=False)
    if reason := unverifiable(config, row, reward_rule):
        return reason
    if response is None:
        return None
    for rule in RULES:
        if reason := rule(config, think, row, response):
            return reason
    return None


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


def settings(config: PrepareConfig) -> list[object]:
    """Return the settings on which the kept rows depend."""
    return [config.patterns, config.data.template, config.reward.rules]


STAGE = PrepareStage("patterns", run, settings)
