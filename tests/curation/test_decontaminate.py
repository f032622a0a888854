"""Planted evaluation problems are found, others are not: by hand, against a literal count, and on MATH500."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ovr_megatron.config import DataConfig, SourceConfig
from ovr_megatron.curation.decontaminate import MASKED_MATCH, PLAIN_MATCH, Problems, build_index, load_problems
from ovr_megatron.curation.settings import DecontaminateConfig, PrepareConfig
from ovr_megatron.curation.text import normalise, word_hashes, words
from ovr_megatron.data.sources import open_source

MATH500 = Path(__file__).resolve().parents[2] / "../shared/data/text/math500.json"
TRAIN = DataConfig(sources=[SourceConfig(path="puzzle:digits")])


def row(text: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "5"}]}


def problems(texts: list[str], root: Path = Path("."), **settings: Any) -> Problems:
    told = DecontaminateConfig(**settings)
    masked = build_index(texts, told, True) if told.masked_threshold else None
    config = PrepareConfig(dir=str(root), stages=["collect"], data=TRAIN, decontaminate=told)
    none: list[frozenset[str]] = [frozenset()] * len(texts)
    return Problems([str(i) for i in range(len(texts))], none, build_index(texts, told, False), masked, config)


def test_shares_are_those_of_a_literal_count() -> None:
    rng = random.Random(3)
    vocabulary = [f"w{i}" for i in range(12)]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(5, 40))) for _ in range(50)]
    index = build_index(texts, DecontaminateConfig(n=3, threshold=0.3, min_words=3), False)

    def grams(text: str) -> set[tuple[str, ...]]:
        told = text.split()
        return {tuple(told[i : i + 3]) for i in range(len(told) - 2)}

    for _ in range(50):
        text = " ".join(rng.choices(vocabulary, k=30)) + " " + rng.choice(texts)[:60]
        shares = {
            number: len(grams(text) & grams(problem)) / len(grams(problem)) for number, problem in enumerate(texts)
        }
        expected = {number: share for number, share in shares.items() if share >= 0.3}
        found = {number: share for share, number in index.find(word_hashes(words(text)))}
        assert found == pytest.approx(expected)


def test_other_numbers_are_found_with_masked_numbers_only() -> None:
    problem = "A train leaves Boston at 60 miles per hour and another at 75; when do the two trains meet each other?"
    other = row(problem.replace("60", "4,500").replace("75", "82"))
    assert problems([problem]).contamination(other) is None
    assert problems([problem], masked_threshold=0.9).contamination(other) == (MASKED_MATCH, "0", 1.0)


def test_very_short_problems_must_make_half_of_the_prompt() -> None:
    found = problems(["Compute $2^{10}$."])
    for text in ("compute 2^10", "Please solve: compute $2^10$."):
        assert found.contamination(row(text)) == (PLAIN_MATCH, "0", 1.0)
    assert found.contamination(row("Compute 2^10 in base 7 and add the digits of the result.")) is None


def test_a_problem_with_images_is_found_by_its_pixels(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "same.bmp")
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "other.png")
    text = "How many corners does the shape in the picture have in all?"
    asked = [{"type": "image", "image": "a.png"}, {"type": "text", "text": text}]
    line = {"messages": [{"role": "user", "content": asked}], "answer": "4"}
    (tmp_path / "eval.jsonl").write_text(json.dumps(line))
    told = DecontaminateConfig(sources=[SourceConfig(path=str(tmp_path / "eval.jsonl"))])
    found = load_problems(PrepareConfig(dir=str(tmp_path), stages=["collect"], data=TRAIN, decontaminate=told))
    reasons = []
    for name in ("same.bmp", "other.png"):
        reasons.append(found.contamination(row([{"type": "image", "image": name}, {"type": "text", "text": text}])))
    assert [reason and reason[0] for reason in reasons] == [PLAIN_MATCH, None]
    assert found.contamination(row(text)) is None


def planted(text: str, rng: random.Random) -> list[str]:
    """The problem verbatim, re-cased and re-spaced, with small edits, and inside a longer prompt."""
    places = [match.span() for match in re.finditer(r"(?<![\\{$])\b[a-zA-Z]{2,}\b(?!\})", text)] or [(0, 0)]
    start, end = rng.choice(places)
    edited = text[:start] + rng.choice(["so", "given", "actual", ""]) + text[end:]
    recased = re.sub(r"\s+", "  ", text).upper() if "\\" not in text else re.sub(r"\s+", "\n", text).swapcase()
    longer = (
        f"You are a careful tutor. Solve this exercise of an old book:\n\n{text}\n\nThink step by step, then answer."
    )
    return [text, recased, edited, longer]


@pytest.mark.skipif(not MATH500.is_file(), reason=f"{MATH500} is not there")
def test_planted_math500_problems_are_found_and_the_others_are_not() -> None:
    """Half of MATH500 is the evaluation set; the other half is what must stay."""
    source = open_source(SourceConfig(path=str(MATH500)))
    texts = [source[i].messages[0].text.removesuffix("\nPut your final answer in \\boxed{}.") for i in range(500)]
    rng = random.Random(5)
    held_out, others = texts[::2], texts[1::2]
    found = problems(held_out)
    missed: list[list[str]] = [[], [], [], []]
    for text in held_out:
        for form, changed in enumerate(planted(text, rng)):
            if found.contamination(row(changed)) is None:
                missed[form].append(changed)
    wrong = [(text, hit) for text in others if (hit := found.contamination(row(text)))]
    assert missed[0] == missed[1] == wrong == []
    # Problems of few words, "Compute $a$.", most of which an edit changes and which must make half of the prompt.
    assert all(len(words(normalise(text))) <= 12 for text in missed[2])
    assert len(missed[2]) <= 5
    assert len(missed[3]) <= 1
