"""Every correction of docs/algorithms.md against its equation, written out in float64: loss, gradient, statistics."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from ovr_megatron.config import AlgorithmConfig, ConfigError
from ovr_megatron.config.writing import as_yaml
from ovr_megatron.errors import UserError
from ovr_megatron.launch import compose
from ovr_megatron.ppo import corrections
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.corrections import CORRECTIONS, Correction, register_correction
from ovr_megatron.ppo.losses import ResponseSegments
from ovr_megatron.ppo.staleness import token_staleness
from ovr_megatron.ppo.update import effective_sample_size
from ovr_megatron.replay import load as load_settings
from ovr_megatron.rl.setup import check_names
from ovr_megatron.runtime.registry import RegistryError
from tests.ppo.off_policy import LENGTHS, OffPolicy, chunked_rows

CLIP = 0.2
# Name, lower bound, upper bound; each masks or truncates some of the tokens and not all.
CASES = [
    ("token_truncate", 0.0, 1.3),
    ("token_mask", 0.0, 1.3),
    ("sequence_truncate", 0.0, 1.5),
    ("sequence_mask", 0.0, 1.5),
    ("geometric_mask", 0.95, 1.05),
    ("icepop", 0.7, 1.4),
    ("decoupled", 0.0, 0.0),
]
ON_SEQUENCES = [case for case in CASES if case[0].startswith(("sequence", "geometric"))]
cases = pytest.mark.parametrize(("name", "low", "high"), CASES)


def settings(name: str | None, low: float = 0.0, high: float = 0.0, **more: object) -> AlgorithmConfig:
    return AlgorithmConfig(correction=name, correction_low=low, correction_high=high, clip=CLIP, **more)


def paper_weight(name: str, low: float, high: float, response: list[float], token: int) -> float:
    """The weight of a token whose response has these ratios pi_old / mu, from the papers' equations.

    TIS (Yao et al. 2025): min(r, C).  MIS and the sequence-level forms (Liu, Li et al. 2025): r 1{r <= C}, and the same
    of the product.  Geometric rejection (verl, rollout_corr_math.md, 3.3.3): 1{low <= product^(1/n) <= high}.  IcePop:
    M(r) = r if alpha <= r <= beta, else 0.  AReaL (Fu et al. 2025): r.
    """
    ratio = response[token]
    product = 1.0
    for other in response:
        product *= other
    if name == "token_truncate":
        return min(ratio, high)
    if name == "token_mask":
        return ratio if ratio <= high else 0.0
    if name == "sequence_truncate":
        return min(product, high)
    if name == "sequence_mask":
        return product if product <= high else 0.0
    if name == "geometric_mask":
        return 1.0 if low <= product ** (1 / len(response)) <= high else 0.0
    if name == "icepop":
        return ratio if low <= ratio <= high else 0.0
    assert name == "decoupled"
    return ratio


def paper_weights(problem: OffPolicy, name: str, low: float, high: float) -> Tensor:
    weights = []
    for old, mu in zip(problem.old.split(LENGTHS), problem.mu.split(LENGTHS), strict=True):
        response = [math.exp(a) / math.exp(b) for a, b in zip(old.tolist(), mu.tolist(), strict=True)]
        weights += [paper_weight(name, low, high, response, i) for i in range(len(response))]
    return torch.tensor(weights, dtype=torch.float64)


def paper_loss(problem: OffPolicy, weights: Tensor, new: Tensor) -> Tensor:
    """-sum of w min(u A, clip(u, 1 - eps, 1 + eps) A), u = pi / pi_old, w a constant (AReaL; verl, 1.3)."""
    total = torch.zeros((), dtype=torch.float64)
    for i, advantage in enumerate(problem.advantages.tolist()):
        ratio = new[i].exp() / problem.old[i].exp()
        bounded = min(max(ratio.item(), 1 - CLIP), 1 + CLIP) * advantage
        surrogate = ratio * advantage
        total = total - weights[i] * (surrogate if surrogate.item() <= bounded else bounded)
    return total


@cases
def test_a_correction_is_its_papers_weight(name: str, low: float, high: float) -> None:
    problem = OffPolicy()
    weights = paper_weights(problem, name, low, high)
    new = problem.new.clone().requires_grad_()
    expected = paper_loss(problem, weights, new)
    expected.backward()
    loss, gradient, sums = problem.objective(settings(name, low, high))
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, new.grad, rtol=1e-12, atol=1e-14)
    assert sums["importance"] == pytest.approx(float(weights.sum()), rel=1e-12)
    size = effective_sample_size({key: sums[key] / len(weights) for key in ("importance", "importance_square")})
    assert size == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum()) / len(weights), rel=1e-12)


@cases
def test_a_strictly_on_policy_step_takes_the_current_policy_for_the_proximal_one(
    name: str, low: float, high: float
) -> None:
    """Without stored log-probabilities the gradient is that of w A log pi, w from the current policy and detached."""
    problem = OffPolicy()
    problem.old = problem.new
    weights = paper_weights(problem, name, low, high)
    loss, gradient, _ = problem.objective(settings(name, low, high), extras=())
    assert loss == pytest.approx(float(-(weights * problem.advantages).sum()), rel=1e-12)
    torch.testing.assert_close(gradient, -weights * problem.advantages, rtol=1e-12, atol=1e-14)


@cases
def test_the_log_has_the_share_of_tokens_that_a_bound_touched(name: str, low: float, high: float) -> None:
    problem = OffPolicy()
    weights = paper_weights(problem, name, low, high)
    _, _, sums = problem.objective(settings(name, low, high))
    if name == "decoupled":
        assert not {"rollout/masked", "rollout/truncated"} & sums.keys()
        return
    statistic = "truncated" if "truncate" in name else "masked"
    touched = int((weights == (high if "truncate" in name else 0.0)).sum())
    assert sums[f"rollout/{statistic}"] == touched
    assert 0 < touched < len(weights)


@cases
@pytest.mark.parametrize("extras", [(), ("old_logprobs",), ("old_logprobs", "staleness")])
@pytest.mark.parametrize("loss", ["clip", "gspo"])
def test_where_all_policies_agree_no_bit_changes(
    name: str, low: float, high: float, extras: tuple[str, ...], loss: str
) -> None:
    problem = OffPolicy()
    problem.mu = problem.old = problem.new
    problem.staleness = torch.zeros_like(problem.staleness)
    plain = problem.objective(settings(None, loss=loss), extras=extras)
    corrected = problem.objective(settings(name, loss=loss), extras=extras)
    assert corrected[0] == plain[0] and torch.equal(corrected[1], plain[1])
    assert corrected[2]["importance"] == corrected[2]["importance_square"] == sum(LENGTHS)
    assert corrected[2].get("rollout/masked", 0) == corrected[2].get("rollout/truncated", 0) == 0


def test_areals_bound_is_the_token_mask() -> None:
    """AReaL, ``ppo_actor_loss_fn``: tokens whose behaviour weight exceeds the cap are left out of the loss."""
    problem = OffPolicy()
    weight = (problem.old - problem.mu).exp()
    weight = torch.where(weight > 1.3, 0.0, weight)
    expected = float(paper_loss(problem, weight, problem.new))
    assert problem.objective(settings("token_mask", high=1.3))[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("name", "low", "high"), ON_SEQUENCES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_responses_that_ranks_share(name: str, low: float, high: float, ranks: int) -> None:
    """Every rank gives its own tokens the weight of the entire response; a last one has no token at all."""
    problem = OffPolicy()
    weights = paper_weights(problem, name, low, high)
    log_ratio = problem.old - problem.mu
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    parts = [chunked_rows(rank, ranks) for rank in range(ranks)] + [torch.zeros(0, dtype=torch.int64)]
    totals = torch.zeros(2, len(LENGTHS), dtype=torch.float64)
    for rows in parts:
        ResponseSegments(ids[rows], len(LENGTHS), totals.add_).sum(log_ratio[rows])
    for rows in parts:
        segments = ResponseSegments(ids[rows], len(LENGTHS), lambda _: totals)
        batch = corrections.CorrectionInput(log_ratio[rows], segments, None, low, high)
        found, _ = CORRECTIONS.rows[name].weigh(batch)
        torch.testing.assert_close(found, weights[rows], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [name for name, row in CORRECTIONS.rows.items() if row.high])
def test_a_bound_holds_where_the_engine_gave_a_token_no_probability(name: str) -> None:
    problem = OffPolicy()
    problem.mu = problem.mu.clone()
    problem.mu[3] = -math.inf
    loss, gradient, sums = problem.objective(settings(name))
    assert math.isfinite(loss) and bool(gradient.isfinite().all())
    assert math.isfinite(sums["importance_square"])


def test_a_step_whose_tokens_are_all_masked_has_no_samples() -> None:
    assert effective_sample_size({"importance": 0.0, "importance_square": 0.0}) == 0


# Settings ------------------------------------------------------------------------------------------------


def test_bounds_that_are_not_set_are_those_of_the_row() -> None:
    problem = OffPolicy()
    for name, correction in CORRECTIONS.rows.items():
        own = problem.objective(settings(name))
        same = problem.objective(settings(name, correction.low or 0.0, correction.high or 0.0))
        assert own[0] == same[0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["correction_high=2"], "algorithm.correction_high=2 needs algorithm.correction, which is null"),
        (["correction_low=0.5"], "algorithm.correction_low=0.5 needs algorithm.correction, which is null"),
        (["correction=icepop", "correction_high=-1"], "must be 0 .that of the correction. or more"),
        (["importance_cap=2"], "no setting algorithm.importance_cap any more; .*correction=token_truncate"),
    ],
)
def test_what_no_correction_can_have_is_refused_with_the_settings(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose("tiny_rl", ["model.path=m", *(f"algorithm.{override}" for override in overrides)])


@pytest.mark.parametrize(
    ("name", "low", "high", "says"),
    [
        ("token_trunkate", 0, 0, r"'token_trunkate' is not known \(did you mean token_truncate\?\)"),
        ("json:loads", 0, 0, "json:loads is of type function; make it an ovr_megatron.ppo.corrections.Correction"),
        ("token_mask", 0.5, 0, "token_mask has no lower bound; .* icepop"),
        ("decoupled", 0, 5, "decoupled has no upper bound; .* token_mask"),
        ("icepop", 6, 0, "correction_low=6 must be below correction_high=5"),
        ("sequence_mask", 0, 0.5, "masks every token on which engine and trainer agree"),
        ("geometric_mask", 1.0005, 0, "bounds 1.0005 and 1.001 masks every token"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(name: str, low: float, high: float, says: str) -> None:
    changes = [f"algorithm.correction={name}", f"algorithm.correction_low={low}", f"algorithm.correction_high={high}"]
    with pytest.raises(UserError, match=says):
        check_names(compose("tiny_rl", ["model.path=m", *changes]))


def test_the_former_setting_is_named_in_python_too() -> None:
    with pytest.raises(ConfigError, match=r"algorithm.importance_cap any more"):
        AlgorithmConfig(importance_cap=2.0)


@pytest.mark.parametrize(("cap", "correction", "high"), [(0.0, None, 0.0), (1.5, "token_truncate", 1.5)])
def test_the_settings_of_an_earlier_run_are_read(
    tmp_path: Path, cap: float, correction: str | None, high: float
) -> None:
    settings = yaml.safe_load(as_yaml(compose("tiny_rl", ["model.path=m"])))
    for name in ("correction", "correction_low", "correction_high"):
        del settings["algorithm"][name]
    settings["algorithm"]["importance_cap"] = cap
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    algorithm = load_settings(tmp_path, []).algorithm
    assert (algorithm.correction, algorithm.correction_high) == (correction, high)


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    rows = dict(CORRECTIONS.rows)
    monkeypatch.setattr(corrections, "CORRECTIONS", replace(CORRECTIONS, rows=rows))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # as PYTHONPATH
    yield


def test_a_correction_of_a_users_module_knows_the_staleness(own_table: None) -> None:
    problem = OffPolicy()
    config = compose("tiny_rl", ["model.path=m", "algorithm.correction=outside_rows:HALVED"]).algorithm
    loss, _, sums = problem.objective(replace(config, clip=CLIP), extras=("old_logprobs", "staleness"))
    weights = torch.tensor([0.5 ** (i % 3) for i in range(sum(LENGTHS))], dtype=torch.float64)
    assert loss == pytest.approx(float(paper_loss(problem, weights, problem.new)), rel=1e-12)
    assert sums["rollout/halved"] == float((problem.staleness > 0).sum())


def test_a_correction_that_a_program_registers(own_table: None) -> None:
    register_correction("plain", Correction(lambda batch: (torch.ones_like(batch.log_ratio), {})))
    problem = OffPolicy()
    assert problem.objective(settings("plain"))[0] == problem.objective(settings(None))[0]
    with pytest.raises(RegistryError, match="'plain' is registered already"):
        register_correction("plain", CORRECTIONS.rows["icepop"])


# Staleness -----------------------------------------------------------------------------------------------


def test_staleness_is_counted_from_the_iteration_that_learns() -> None:
    def response(versions: list[int] | None, tokens: int) -> Response:
        array = None if versions is None else np.array(versions, np.int32)
        return Response(0, 0, [1] * tokens, np.zeros(tokens, np.float32), True, "", versions=array)

    arrays = token_staleness([response([3, 3, 4, 5], 4), response(None, 2), response([], 0)], 5)
    assert [array.tolist() for array in arrays] == [[2, 2, 1, 0], [0, 0], []]


def test_the_documentation_has_a_row_for_each() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/algorithms.md"
    table = page.read_text().split("| `correction` |")[1].split("\n\n")[0]
    rows = [line.split("|")[1].strip().strip("`") for line in table.splitlines()[2:]]
    assert rows == list(CORRECTIONS.rows)
    for name, line in zip(rows, table.splitlines()[2:], strict=True):
        correction = CORRECTIONS.rows[name]
        for bound in (correction.low, correction.high):
            assert bound is None or f"{bound:g}" in line.split("|")[3]
