"""The head's scores and gradients against a float64 transcription, for every tiling, and the memory they need."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import head as head_benchmark
from ovr_megatron.model import heads
from ovr_megatron.model.heads import BANNED, init_value_head, token_scores

TOKENS, VOCAB, WIDTH = 37, 90, 16


def on_ranks(ranks: int, work: Callable[[dist.ProcessGroup], Any]) -> list[Any]:
    """Results of ``work`` on each rank of a real group, one thread a rank."""
    store = dist.HashStore()

    def rank_works(rank: int) -> Any:
        return work(dist.ProcessGroupGloo(store, rank, ranks, timedelta(seconds=60)))

    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(rank_works, range(ranks)))


def case(dtype: torch.dtype = torch.float32, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    banned = torch.rand(VOCAB, generator=generator) < 0.2
    banned[:9] = True  # a whole tile of the smallest tiling
    allowed = (~banned).nonzero()[:, 0]
    labels = allowed[torch.randint(0, len(allowed), (TOKENS,), generator=generator)]
    return {
        "hidden": normal(TOKENS, WIDTH).to(dtype),
        "weight": (size * normal(VOCAB, WIDTH)).to(dtype),
        "labels": labels,
        "banned": banned,
        "d_logprob": normal(TOKENS),
        "d_entropy": normal(TOKENS),
    }


def backward(scores: tuple[Tensor, Tensor], given: dict[str, Tensor], upstream: str) -> None:
    parts = dict(zip(("logprob", "entropy"), scores, strict=True))
    torch.stack([(parts[name] * given[f"d_{name}"]).sum() for name in upstream.split(" and ")]).sum().backward()


def expected(given: dict[str, Tensor], temperature: float, upstream: str) -> dict[str, Tensor]:
    """What the docstring of `token_scores` says, in float64, gradients by autograd."""
    hidden, weight = (given[name].double().requires_grad_() for name in ("hidden", "weight"))
    logits = (hidden @ weight.t() / temperature).masked_fill(given["banned"], -torch.inf)
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.masked_fill(given["banned"], 0.0)).sum(-1)
    scores = logprobs[torch.arange(len(hidden)), given["labels"]], entropy
    backward(scores, given, upstream)
    return {"logprob": scores[0], "entropy": entropy, "hidden": hidden.grad, "weight": weight.grad}


def computed(given: dict[str, Tensor], temperature: float, upstream: str, ranks: int = 1) -> dict[str, Tensor]:
    """What `token_scores` says, the vocabulary split over ``ranks``."""

    def work(group: dist.ProcessGroup) -> dict[str, Tensor]:
        rows = VOCAB // ranks
        mine = slice(rows * group.rank(), rows * (group.rank() + 1))
        hidden, weight = given["hidden"].clone().requires_grad_(), given["weight"][mine].clone().requires_grad_()
        scores = token_scores(hidden, weight, given["labels"], given["banned"][mine], temperature, group)
        backward(scores, given, upstream)
        return {"logprob": scores[0], "entropy": scores[1], "hidden": hidden.grad, "weight": weight.grad}

    results = on_ranks(ranks, work)
    for other in results[1:]:
        for name in ("logprob", "entropy", "hidden"):
            assert torch.equal(other[name], results[0][name]), name
    return results[0] | {"weight": torch.cat([result["weight"] for result in results])}


def errors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest differences, relative to the largest number."""
    return {k: ((ours[k].double() - theirs[k]).abs().max() / theirs[k].abs().max()).item() for k in theirs}


@pytest.mark.parametrize("tile", [1, 7, 36, 1000])
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_tiles_keep_to_their_bytes(tokens: int, rows: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads._TILE_BYTES, "cpu", 4 * tile)
    high, wide = heads.tile_sides(tokens, rows, torch.device("cpu"))
    assert 1 <= high <= tokens and 1 <= wide <= rows and high * wide <= tile


@pytest.mark.parametrize("tile", [1, 7 * 9, 37 * 90, 1 << 20], ids="tile of {} numbers".format)
@pytest.mark.parametrize("upstream", ["logprob", "entropy", "logprob and entropy"])
@pytest.mark.parametrize(("ranks", "temperature"), [(1, 1.0), (1, 0.7), (2, 1.3)])
def test_equals_the_transcription(
    tile: int, upstream: str, ranks: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(heads._TILE_BYTES, "cpu", 4 * tile)
    given = case()
    found = errors(computed(given, temperature, upstream, ranks), expected(given, temperature, upstream))
    assert max(found.values()) < 3e-6, found


def test_logits_far_apart_and_probabilities_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads._TILE_BYTES, "cpu", 4 * 100)
    given = case(size=300.0)
    theirs = expected(given, 1.0, "logprob")
    assert theirs["logprob"].min() < -1000 and theirs["entropy"].min() < 1e-100
    ours = computed(given, 1.0, "logprob", ranks=2)
    found = errors(ours, {name: theirs[name] for name in ("logprob", "hidden", "weight")})
    assert max(found.values()) < 1e-6, found
    assert (ours["entropy"].double() - theirs["entropy"]).abs().max() < 1e-4


@pytest.mark.parametrize("lift", [-500.0, 500.0])
def test_a_constant_added_to_all_logits_changes_nothing(lift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads._TILE_BYTES, "cpu", 4 * 100)
    given = case()
    given["hidden"][:, 0] = 1.0
    lifted = given | {"weight": given["weight"] + lift * torch.eye(WIDTH)[0]}
    ours, theirs = (computed(which, 1.0, "logprob", ranks=2) for which in (lifted, given))
    for name in ("logprob", "entropy", "weight"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("upstream", ["logprob", "logprob and entropy"])
def test_bfloat16_is_as_good_as_its_rounding(upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads._TILE_BYTES, "cpu", 4 * 100)
    given = case(torch.bfloat16, size=0.3)
    ours = computed(given, 0.9, upstream)
    assert (ours["logprob"].dtype, ours["entropy"].dtype) == (torch.float32, torch.float32)
    assert (ours["hidden"].dtype, ours["weight"].dtype) == (torch.bfloat16, torch.bfloat16)
    found = errors(ours, expected(given, 0.9, upstream))
    assert max(found.values()) < 2**-7, found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("ranks", [1, 2])
def test_bfloat16_weights_have_float32_logits(ranks: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of up to 40: rounded to bfloat16 they would be wrong by 0.06 and more."""
    monkeypatch.setitem(heads._TILE_BYTES, "cpu", 4 * 100)
    given = case(torch.bfloat16, size=2.5)
    theirs = expected(given, temperature, "logprob and entropy")
    assert (given["hidden"].double() @ given["weight"].double().t()).abs().max() > 30
    for kept in (0, 1 << 20):
        monkeypatch.setitem(heads._KEPT_BYTES, "cpu", kept)
        ours = computed(given, temperature, "logprob and entropy", ranks)
        assert (ours["logprob"].double() - theirs["logprob"]).abs().max() < 1e-3
        assert (ours["entropy"].double() - theirs["entropy"]).abs().max() < 1e-3
        gradients = errors(ours, {name: theirs[name] for name in ("hidden", "weight")})
        assert max(gradients.values()) < 2**-7, gradients


def test_confident_rows_keep_their_small_gradient_in_bfloat16() -> None:
    """1 - p of the label is formed before it is rounded: rounding p to bfloat16 would leave 0."""
    hidden = torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    hidden.data[:, 0] = 10.0
    weight = torch.zeros(4, 8, dtype=torch.bfloat16)
    weight[1, 0], weight[2, 1] = 1.0, 1.0
    (group,) = on_ranks(1, lambda group: group)
    logprobs, _ = token_scores(hidden, weight, torch.tensor([1, 1]), torch.zeros(4, dtype=torch.bool), 1.0, group)
    logprobs.sum().backward()
    others = 3 / (3 + torch.tensor(10.0).exp())
    torch.testing.assert_close(hidden.grad[:, 0].float(), others.expand(2), rtol=2**-7, atol=0.0)


def test_banned_ids_have_no_part_in_anything() -> None:
    given, temperature, upstream = case(), 0.7, "logprob and entropy"
    banned = given["banned"].nonzero()[:, 0]
    ours = computed(given | {"weight": given["weight"].index_fill(0, banned, 1e4)}, temperature, upstream)
    for name, value in computed(given, temperature, upstream).items():
        part = ~given["banned"] if name == "weight" else slice(None)
        torch.testing.assert_close(ours[name][part], value[part], rtol=1e-6, atol=1e-6)
    assert not ours["weight"][banned].any()
    result = computed(given | {"labels": banned[torch.arange(TOKENS) % len(banned)]}, temperature, upstream)
    torch.testing.assert_close(result["logprob"], torch.full((TOKENS,), BANNED))
    assert not result["weight"][banned].any()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    given = case()
    theirs = expected(given, 1.0, "logprob")
    (group,) = on_ranks(1, lambda group: group)
    for asked in ("hidden", "weight"):
        leaves = {name: given[name].clone().requires_grad_(name == asked) for name in ("hidden", "weight")}
        scores = token_scores(leaves["hidden"], leaves["weight"], given["labels"], given["banned"], 1.0, group)
        backward(scores, given, "logprob")
        torch.testing.assert_close(leaves.pop(asked).grad.double(), theirs[asked], rtol=1e-5, atol=1e-5)
        assert all(leaf.grad is None for leaf in leaves.values())


def test_no_rows_score_to_nothing_and_still_reach_both_inputs() -> None:
    given = case()
    hidden, weight = given["hidden"][:0].clone().requires_grad_(), given["weight"].clone().requires_grad_()
    (group,) = on_ranks(1, lambda group: group)
    logprobs, entropy = token_scores(hidden, weight, given["labels"][:0], given["banned"], 1.0, group)
    assert (logprobs.shape, entropy.shape, logprobs.dtype) == ((0,), (0,), torch.float32)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == hidden.shape and not weight.grad.any()


def test_memory_stays_far_below_the_logits() -> None:
    tokens, vocab = 2048, 152064
    bound = tokens * vocab * 4 // 16
    # A quarter of the rows is enough to see it fail with the logits in full.
    assert (
        head_benchmark.extra_bytes(head_benchmark.NAIVE, tokens // 4, vocab, 16) > 4 * bound
    )  # a quarter of the rows, and still
    assert head_benchmark.extra_bytes(head_benchmark.TILES, tokens, vocab, 256) < bound


def test_measurement_has_a_row_for_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_benchmark, "extra_bytes", lambda *case: 5)
    before = dist.is_initialized()
    rows = head_benchmark.measure_head(64, 300, 8, "float32", "cpu", repeats=1)
    assert [row["variant"] for row in rows] == list(head_benchmark.VARIANTS)
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["extra_bytes"] == 5 for row in rows)
    assert len(head_benchmark.format_table(rows).splitlines()) == 1 + len(rows)
    assert dist.is_initialized() == before


@pytest.mark.parametrize(
    ("how", "expected"), [("orz", 1 / 3585), ("kaiming", 1 / math.sqrt(3 * 3584)), ("paper", math.sqrt(5 / 3))]
)
def test_a_value_head_begins_with_its_standard_deviation(how: str, expected: float) -> None:
    """Of 7B's width; Open-Reasoner-Zero passes 1 / (hidden_size + 1) to ``normal_`` as the standard deviation."""
    weight = torch.empty(1, 3584)
    init_value_head(weight, how, torch.Generator().manual_seed(1))
    assert float(weight.std()) == pytest.approx(expected, rel=0.05)
    assert abs(float(weight.mean())) < 4 * expected / math.sqrt(3584)
