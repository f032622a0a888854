"""Behaviours counted by their wording: an approximation for those who have no judge at hand.

A sentence has a behaviour if it holds one of its phrases; consecutive sentences count once.  The visual behaviours want
a word for the image, or for looking at it, in the same sentence or in one beside it.

What the project's own puzzles plant in cold-start texts it counts.  Free prose has a thousand other ways: of texts that
were written without knowledge of the phrases it finds about a third (``tests/evaluation/test_behaviours.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from ovr_megatron.evaluation.behaviours import PAIRS

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")


def _any(*words: str) -> str:
    """A pattern for any of the words, each a piece of pattern itself."""
    return rf"(?:{'|'.join(words)})"


_IMAGE = _any(
    *(
        "images?",
        "pictures?",
        "figures?",
        "diagrams?",
        "charts?",
        "graphs?",
        "plots?",
        "photo(?:graph)?s?",
        "drawings?",
    ),
    *("illustrations?", "screenshots?", "maps?", "sketch(?:es)?", "scene", "poster"),
)
_PART = _any(
    "row", "column", "panel", "region", "quadrant", "corner", "cell", "half", "side", "section", "strip", "shelf"
)
_REGION = _any(
    rf"(?:top|bottom|upper|lower|left|right|middle|each)[- ](?:\w+ )?{_PART}",
    rf"{_PART} (?:by {_PART}|\d)",
    *("on the (?:left|right)", "(?:upper|lower|top|bottom)[- ](?:left|right)", "from (?:left|top) to (?:right|bottom)"),
)
_LOOK = _any(
    *(
        "look(?:ing|s|ed)?",
        "(?:re-?)?inspect\\w*",
        "(?:re-?)?examin\\w*",
        "zoom\\w*",
        "glanc\\w*",
        "scan\\w*",
        "gaz\\w*",
    ),
    *("revisit\\w*", "trac(?:e|ing)", "peer\\w*", "hunt\\w*", "search\\w*", "spot"),
)
_WRONG = _any("wrong", "incorrect", "not right", "mistaken", "off", "impossible", "a mistake", "an error", "a dead end")
_GOAL = _any("goal", "target", "answer", "end", "conclusion", "result", "wanted", "desired", "sought")

CUES = {
    "backtracking": (
        _any("wait", "hold on", "hang on", "oops", "whoops", "scra(?:tch|p) that", "on second thought", "never ?mind"),
        r"(?:no|nope),? (?:that|this|it)(?:'s| is| was| can't| cannot| doesn't| does not| won't)",
        rf"(?:that|this|it|which|something|the \w+) (?:is|was|were|must be|might be|may be|seems|looks) {_WRONG}",
        r"(?:cannot|can't) be (?:right|correct)",
        _any("misread\\w*", "miscount\\w*", "misjudg\\w*", "misinterpret\\w*", "mixed up", "overlooked", "my mistake"),
        _any("go(?:ing)? back", "start(?:ing)? (?:over|again|afresh)", "try(?:ing)? (?:again|another|a different)"),
        _any(
            "rethink", "reconsider", "backtrack\\w*", "abandon\\w*", "hopeless", "leads nowhere", "dead end", "no good"
        ),
        _any("(?:doesn't|does not|won't) (?:work|add up|fit)", "contradict\\w*", "switch(?:ing)? to"),
    ),
    "subgoal_setting": (
        r"step (?:1|one|2|two)",
        r"(?:break|split|divid|decompos|partition)\w* (?:\w+ ){0,4}?(?:in|into|by)",
        _any(
            "(?:my|the|a) (?:plan|strategy|roadmap|agenda)", "here's how I(?:'ll| will)", "sub-?(?:goal|problem|task)s?"
        ),
        r"(?:first|next|second|third|intermediate|final) (?:goal|task|target|stage|milestone|objective)s?",
        r"(?:two|three|four|several) (?:parts|steps|stages|pieces|tasks|targets|cases)",
        r"(\w+) by \1",
        r"first,? (?:I|we|let me|let's|find|get|compute|determine|figure)[^.]*(?:then|after|next|second|finally)",
        _any("from top to bottom:", "from left to right:", "in turn", "by cases"),
    ),
    "verification": (
        r"(?:check(?!er| mark|out)|double[- ]check|re-?check|cross[- ]check|verif|confirm|validat)\w*",
        r"(?:re-?comput|recalculat|recount)\w*",
        r"(?:plug|substitut|put)\w* (?:\w+ ){0,4}?back",
        r"(?:to be|to make) (?:sure|certain|safe)",
        _any(
            "as required", "that matches", "which matches", "tallies", "supports the (?:result|answer)", "a quick test"
        ),
        r"indeed,? .*=",
    ),
    "backward_chaining": (
        _any("work(?:ing|ed)? (?:\\w+ )?back(?:wards?)?", "in reverse", "backwards?", "reverse the"),
        r"(?:to|in order to) (?:get|reach|obtain|have|end|arrive|make|prove|show|conclude|land|finish|win|know)"
        r"[^.;]{1,90}"
        r"(?:need|must|have to|has to|require|enough)\w*",
        rf"(?:start|begin)\w* (?:from|with|at) (?:the|what) (?:\w+ )?{_GOAL}",
        rf"(?:the|our|my) (?:{_GOAL}|desired \w+|wanted \w+) (?:is|must be|should be)",
        r"for (?:that|this|it|which|\w+(?: \w+){0,4}) to (?:be|hold|work|happen|equal)[^.]*(?:must|need|has to)\w*",
        r"if the (?:answer|result|final \w+) (?:is|were|was|is to be)[^.]*(?:must|need|would)\w*",
        _any("what is sought", "is the target", "it would be enough", "(?:calls for|requires)[^.]*so"),
        rf"so (?:I|we)(?:'ll| will)? {_LOOK} (?:for|in|the)",
    ),
}
VISUAL_CUES = {
    "visual_reflection": (
        _IMAGE,
        rf"{_LOOK}[^.]*(?:again|once more|closer|anew|a second time)",
        "re-?(?:examin|inspect|read)\\w*",
    ),
    "visual_divide_and_conquer": (_IMAGE, _REGION),
    "visual_verification": (_IMAGE, _LOOK),
    "goal_driven_visual_tracing": (_IMAGE, _LOOK),
}


def _compiled(table: dict[str, tuple[str, ...]]) -> dict[str, list[re.Pattern[str]]]:
    return {name: [re.compile(rf"\b{cue}(?!\w)", re.IGNORECASE) for cue in cues] for name, cues in table.items()}


_CUES, _VISUAL = _compiled(CUES), _compiled(VISUAL_CUES)


@dataclass(frozen=True)
class Act:
    """The sentences ``[begin, end)`` of a text, in characters, that show ``behaviour`` once."""

    begin: int
    end: int
    behaviour: str


def acts(reasoning: str) -> list[Act]:
    """Where each behaviour occurs, by wording, in the order of the behaviours and then of the text."""
    places = [place for place in _sentences(reasoning) if reasoning[slice(*place)].strip()]
    sentences = [reasoning[slice(*place)] for place in places]
    found: list[Act] = []
    for linguistic, visual in PAIRS:
        hits = [any(cue.search(sentence) for cue in _CUES[linguistic]) for sentence in sentences]
        found += _runs(linguistic, hits, places)
        if any(hits):
            seen = [any(cue.search(sentence) for cue in _VISUAL[visual]) for sentence in sentences]
            near = [any(seen[max(at - 1, 0) : at + 2]) for at in range(len(seen))]
            found += _runs(visual, [hit and close for hit, close in zip(hits, near, strict=True)], places)
    return found


def count(reasoning: str) -> dict[str, int]:
    """How often each behaviour occurs, by wording."""
    occurs = Counter(act.behaviour for act in acts(reasoning))
    return {name: occurs[name] for pair in PAIRS for name in pair}


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    begin = 0
    for gap in _SENTENCE.finditer(text):
        yield begin, gap.start()
        begin = gap.end()
    yield begin, len(text)


def _runs(behaviour: str, hits: Sequence[bool], places: Sequence[tuple[int, int]]) -> Iterator[Act]:
    """Maximal runs of hits."""
    for hit, run in groupby(zip(hits, places, strict=True), key=itemgetter(0)):
        if hit:
            among = [place for _, place in run]
            yield Act(among[0][0], among[-1][1], behaviour)
