"""Count behaviours by the wording of a text: an approximation for users without a judge model.

A sentence shows a behaviour if it contains one of its phrases; consecutive sentences count once.  The visual behaviours
also need a word for the image, or for looking at it, in the same sentence or a neighbouring one.

The phrases cover the behaviours that the project's own puzzles put into cold-start texts.  Free prose has many other
ways to express them: in texts written without knowledge of the phrases about a third is found
(``tests/evaluation/test_behaviours.py``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from ovr_megatron.evaluation.behaviours import PAIRS

_SENTENCE_GAP = re.compile(r"(?<=[.!?;])\s+|\n+")


def _any(*patterns: str) -> str:
    """Return a pattern that matches any of the patterns."""
    return rf"(?:{'|'.join(patterns)})"


_IMAGE = _any(
    *"images? pictures? figures? diagrams? charts? graphs? plots? photo(?:graph)?s? drawings?".split(),
    *"illustrations? screenshots? maps? sketch(?:es)? scene poster".split(),
)
_PART = _any(*"row column panel region quadrant corner cell half side section strip shelf".split())
_REGION = _any(
    rf"(?:top|bottom|upper|lower|left|right|middle|each)[- ](?:\w+ )?{_PART}",
    rf"{_PART} (?:by {_PART}|\d)",
    "on the (?:left|right)",
    "(?:upper|lower|top|bottom)[- ](?:left|right)",
    "from (?:left|top) to (?:right|bottom)",
)
_LOOK = _any(
    *r"look(?:ing|s|ed)? (?:re-?)?inspect\w* (?:re-?)?examin\w* zoom\w* glanc\w* scan\w* gaz\w*".split(),
    *r"revisit\w* trac(?:e|ing) peer\w* hunt\w* search\w* spot".split(),
)
_WRONG = _any("wrong", "incorrect", "not right", "mistaken", "off", "impossible", "a mistake", "an error", "a dead end")
_GOAL = _any("goal", "target", "answer", "end", "conclusion", "result", "wanted", "desired", "sought")

# Patterns of phrases, by linguistic behaviour. Each is matched at word boundaries, in any case.
CUES = {
    "backtracking": (
        _any("wait", "hold on", "hang on", "oops", "whoops", "scra(?:tch|p) that", "on second thought", "never ?mind"),
        r"(?:no|nope),? (?:that|this|it)(?:'s| is| was| can't| cannot| doesn't| does not| won't)",  # "no, this won't"
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
        r"(?:break|split|divid|decompos|partition)\w* (?:\w+ ){0,4}?(?:in|into|by)",  # "split the figure into"
        _any(
            "(?:my|the|a) (?:plan|strategy|roadmap|agenda)", "here's how I(?:'ll| will)", "sub-?(?:goal|problem|task)s?"
        ),
        r"(?:first|next|second|third|intermediate|final) (?:goal|task|target|stage|milestone|objective)s?",
        r"(?:two|three|four|several) (?:parts|steps|stages|pieces|tasks|targets|cases)",
        r"(\w+) by \1",  # "row by row"
        r"first,? (?:I|we|let me|let's|find|get|compute|determine|figure)[^.]*(?:then|after|next|second|finally)",
        _any("from top to bottom:", "from left to right:", "in turn", "by cases"),
    ),
    "verification": (
        # Not "checker", "check mark" and "checkout".
        r"(?:check(?!er| mark|out)|double[- ]check|re-?check|cross[- ]check|verif|confirm|validat)\w*",
        r"(?:re-?comput|recalculat|recount)\w*",
        r"(?:plug|substitut|put)\w* (?:\w+ ){0,4}?back",  # "putting 4 back"
        r"(?:to be|to make) (?:sure|certain|safe)",
        _any(
            "as required", "that matches", "which matches", "tallies", "supports the (?:result|answer)", "a quick test"
        ),
        r"indeed,? .*=",  # "indeed, 3 + 5 = 8"
    ),
    "backward_chaining": (
        _any("work(?:ing|ed)? (?:\\w+ )?back(?:wards?)?", "in reverse", "backwards?", "reverse the"),
        # "to end with 24, the numbers before it must be"
        r"(?:to|in order to) (?:get|reach|obtain|have|end|arrive|make|prove|show|conclude|land|finish|win|know)"
        r"[^.;]{1,90}"
        r"(?:need|must|have to|has to|require|enough)\w*",
        rf"(?:start|begin)\w* (?:from|with|at) (?:the|what) (?:\w+ )?{_GOAL}",  # "start from the final result"
        rf"(?:the|our|my) (?:{_GOAL}|desired \w+|wanted \w+) (?:is|must be|should be)",
        # "for the sum to be even, both must"
        r"for (?:that|this|it|which|\w+(?: \w+){0,4}) to (?:be|hold|work|happen|equal)[^.]*(?:must|need|has to)\w*",
        r"if the (?:answer|result|final \w+) (?:is|were|was|is to be)[^.]*(?:must|need|would)\w*",
        _any("what is sought", "is the target", "it would be enough", "(?:calls for|requires)[^.]*so"),
        rf"so (?:I|we)(?:'ll| will)? {_LOOK} (?:for|in|the)",
    ),
}
# Patterns that the sentence or a neighbour has to contain as well, by visual behaviour.
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


def _compile(cues: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(rf"\b{cue}(?!\w)", re.IGNORECASE) for cue in cues]


_CUES = {name: _compile(cues) for name, cues in CUES.items()}
_VISUAL_CUES = {name: _compile(cues) for name, cues in VISUAL_CUES.items()}


@dataclass(frozen=True)
class Act:
    """One occurrence of ``behaviour``: the sentences at characters ``[begin, end)`` of a text."""

    begin: int
    end: int
    behaviour: str


def acts(reasoning: str) -> list[Act]:
    """Return where each behaviour occurs, by wording, in the order of the behaviours and then of the text."""
    spans = [(begin, end) for begin, end in _sentences(reasoning) if reasoning[begin:end].strip()]
    sentences = [reasoning[begin:end] for begin, end in spans]
    occurrences: list[Act] = []
    for linguistic, visual in PAIRS:
        hits = [_matches(sentence, _CUES[linguistic]) for sentence in sentences]
        occurrences += _runs(linguistic, hits, spans)
        if any(hits):  # a visual behaviour is its linguistic counterpart, about the image
            has_cue = [_matches(sentence, _VISUAL_CUES[visual]) for sentence in sentences]
            visual_hits = []
            for index, hit in enumerate(hits):
                # A sentence on either side may name the image that this one is about.
                neighbourhood = has_cue[max(index - 1, 0) : index + 2]
                visual_hits.append(hit and any(neighbourhood))
            occurrences += _runs(visual, visual_hits, spans)
    return occurrences


def count(reasoning: str) -> dict[str, int]:
    """Count how often each behaviour occurs, by wording."""
    counts = Counter(act.behaviour for act in acts(reasoning))
    result: dict[str, int] = {}
    for linguistic, visual in PAIRS:
        result[linguistic] = counts[linguistic]
        result[visual] = counts[visual]
    return result


def _matches(sentence: str, cues: Sequence[re.Pattern[str]]) -> bool:
    return any(cue.search(sentence) for cue in cues)


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    """Yield the characters ``[begin, end)`` of each sentence."""
    begin = 0
    for gap in _SENTENCE_GAP.finditer(text):
        yield begin, gap.start()
        begin = gap.end()
    yield begin, len(text)


def _runs(behaviour: str, hits: Sequence[bool], spans: Sequence[tuple[int, int]]) -> Iterator[Act]:
    """Yield an act for each maximal run of hits."""
    for is_hit, run in groupby(zip(hits, spans, strict=True), key=itemgetter(0)):
        if is_hit:
            run_spans = [span for _, span in run]
            yield Act(run_spans[0][0], run_spans[-1][1], behaviour)
