"""MinHash against the Jaccard similarity itself, and the search against a comparison of all pairs."""

import numpy as np

from ovr_megatron.curation.dedup import first_equal
from ovr_megatron.curation.minhash import near_duplicates, shingles_of, signature
from ovr_megatron.curation.text import ngram_hashes, normalise, word_hashes, words


def test_equal_columns_estimate_the_jaccard_similarity() -> None:
    rng = np.random.default_rng(1)
    for shared in (0, 100, 300, 380):
        pool = rng.integers(0, 2**63, 800 - shared, dtype=np.uint64)
        a, b = pool[:400], pool[400 - shared :]
        jaccard = len(np.intersect1d(a, b)) / len(np.union1d(a, b))
        estimate = (signature(a, 1024) == signature(b, 1024)).mean()
        assert abs(estimate - jaccard) < 4 * np.sqrt(max(jaccard * (1 - jaccard), 0.002) / 1024)


def test_near_duplicates_are_those_of_all_pairs() -> None:
    """Groups of texts with few words exchanged, among others; the estimate itself decides, so both must agree."""
    rng = np.random.default_rng(2)
    vocabulary = [f"w{i}" for i in range(500)]
    texts = []
    for _ in range(60):
        base = list(rng.choice(vocabulary, 80))
        for edits in rng.integers(0, 4, rng.integers(1, 5)):
            text = list(base)
            for place in rng.integers(0, 80, edits):
                text[place] = str(rng.choice(vocabulary))
            texts.append(" ".join(text))
    order = rng.permutation(len(texts))
    rows = [signature(shingles_of(word_hashes(texts[i].split()), 5), 64) for i in order]
    signatures, classes = np.stack(rows), np.zeros(len(rows), np.uint64)
    same = (signatures[:, None] == signatures[None]).mean(axis=2) >= 0.8
    kept: list[int] = []
    for i in range(len(rows)):
        kept += [] if same[i, kept].any() else [i]
    expected = set(range(len(rows))) - set(kept)
    found = near_duplicates(signatures, classes, bands=16, threshold=0.8)
    dropped = set(np.flatnonzero(found >= 0).tolist())
    assert all(same[i, found[i]] and found[i] < i and found[i] not in dropped for i in dropped)
    assert len(expected) > 20
    assert dropped == expected
    apart = near_duplicates(signatures, np.arange(len(rows), dtype=np.uint64), bands=16, threshold=0.8)
    assert (apart < 0).all()


def test_first_equal() -> None:
    assert first_equal(np.array([5, 3, 5, 5, 3, 9], np.uint64)).tolist() == [-1, -1, 0, 0, 1, -1]
    assert first_equal(np.zeros(0, np.uint64)).tolist() == []


def test_words_forget_case_width_separators_and_dress() -> None:
    plain = words(normalise(r"What is \frac{1}{2} of 12000 apples?"))
    assert plain == ["what", "is", "frac", "1", "2", "of", "12000", "apples"]
    assert words(normalise(r"what IS \displaystyle\dfrac{1}{2} of 12{,}000 Apples.")) == plain
    assert words(normalise("\u8ba1\u7b972+3")) == ["\u8ba1", "\u7b97", "2", "3"]


def test_ngrams_are_equal_where_the_words_are() -> None:
    text = word_hashes("a b c a b c d".split())
    grams = ngram_hashes(text, 3)
    assert grams[0] == grams[3]
    assert len(np.unique(grams)) == 4
    assert len(ngram_hashes(text, 8)) == 0
