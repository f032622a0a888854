"""vLLM in a process of its own: losses against Transformers, answers of a local teacher, resume."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from ovr_megatron.config import DataConfig, RewardConfig, RolloutConfig, SourceConfig
from ovr_megatron.curation.engines import EngineError
from ovr_megatron.curation.prepare import prepare
from ovr_megatron.curation.proxy_loss import bound
from ovr_megatron.curation.settings import (
    CollectConfig,
    DifficultyConfig,
    PrepareConfig,
    ProxyLossConfig,
    TeacherConfig,
)
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.row_parsing import parse_row
from ovr_megatron.families.config_json import ShapeError
from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.rollout.sampling import banned_tokens

PIXELS = {"min_pixels": 784, "max_pixels": 12544}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("engines") / "model", tied=True, seed=3)


@pytest.fixture
def forks(loaded_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's processes be forks of one that has imported it."""
    monkeypatch.setattr(sys, "executable", str(loaded_python))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "rows.jsonl").read_text().splitlines()]


@torch.no_grad()
def loss_of(reference: Any, processor: Processor, row: Any, banned: list[int], limit: int) -> float:
    """Mean negative log-likelihood of the response within the first ``limit`` tokens, banned ids left out."""
    [sample] = processor.encode([row], generation=False)
    ids = torch.from_numpy(sample.tokens)[None]
    inputs: dict[str, torch.Tensor] = {"mm_token_type_ids": (ids == processor.shape.image_token).long()}
    if len(sample.grid_thw):
        inputs["pixel_values"] = torch.from_numpy(sample.patches)
        inputs["image_grid_thw"] = torch.from_numpy(sample.grid_thw)
    logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, :-1]
    logits[:, banned] = -torch.inf
    logprobs = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    mask = torch.from_numpy(sample.loss_mask)[1:].clone()
    mask[limit - 1 :] = False
    return -float(logprobs[mask].mean())


@pytest.mark.usefixtures("forks")
def test_local_teacher_and_proxy_loss(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of vLLM: one answers four prompts twice, one scores these answers, puzzles and pictures."""
    monkeypatch.chdir(model.parent)  # the model's name decides over the seeds: let it be the same every time
    prompts = [{"messages": [{"role": "user", "content": f"Add {i}."}], "answer": "1", "id": f"p{i}"} for i in range(4)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    sources = [str(tmp_path / "prompts.jsonl"), "puzzle:digits?form=text", "puzzle:shapes"]
    config = PrepareConfig(
        dir=str(tmp_path / "out"),
        stages=["collect", "teacher", "proxy_loss"],
        # The untrained teacher ends no thought.
        data=DataConfig(
            sources=[SourceConfig(path=path) for path in sources],
            max_prompt_tokens=256,
            without_thought="open",
            **PIXELS,
        ),
        collect=CollectConfig(limit=8),
        teacher=TeacherConfig(
            model=model.name, dtype="float32", samples=2, temperature=1.0, max_tokens=24, keep_truncated=True
        ),
        proxy_loss=ProxyLossConfig(
            model=str(model), dtype="float32", min_rows=8, quantile=0.75, max_tokens=120, batch=9
        ),
    )
    prepare(config)
    answered = rows(tmp_path / "out/teacher")
    assert [row["id"] for row in answered[:8]] == [f"p{i}#{k}" for i in range(4) for k in range(2)]
    responses = [row["messages"][1]["content"] for row in answered[:8]]
    assert len(set(responses)) == 8 and all(responses)

    told = [json.loads(line) for line in (tmp_path / "out/proxy_loss/scores.0.jsonl").read_text().splitlines()]
    found = {answered[entry["key"]]["id"]: entry["loss"] for entry in told}
    losses = {row["id"]: row["loss"] for row in rows(tmp_path / "out/proxy_loss")}
    reference = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    processor = Processor(model, config.data)
    banned = banned_tokens(processor.shape, processor.tokenizer)
    expected = {}
    for raw in answered[8:]:  # sampled responses need not come back as text with the same tokens
        row = parse_row(raw, "row", tmp_path / "out")
        expected[raw["id"]] = loss_of(reference, processor, row, banned, 120)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    assert losses == pytest.approx({name: found[name] for name in losses}, abs=1e-5)
    for source in ("p", "puzzle:digits/sum/text", "puzzle:shapes/image"):  # of each source the upper quarter went
        ranked = sorted((loss, name) for name, loss in found.items() if name.partition("#")[0].rstrip("0123") == source)
        assert [name in losses for _, name in ranked] == [True] * 6 + [False] * 2

    # A score that was there is not made again: change one, lose the last and the manifest.
    scores = tmp_path / "out/proxy_loss/scores.0.jsonl"
    lines = scores.read_text().splitlines()
    first = json.loads(lines[0]) | {"loss": 0.125}
    scores.write_text("\n".join([json.dumps(first), *lines[1:-1]]) + "\n" + lines[-1][:7])
    (tmp_path / "out/proxy_loss/manifest.json").unlink()
    prepare(config)
    again = {row["id"]: row["loss"] for row in rows(tmp_path / "out/proxy_loss")}
    assert again["p0#0"] == 0.125
    assert {name: again[name] for name in again if name != "p0#0"} == pytest.approx(
        {name: found[name] for name in again if name != "p0#0"}, abs=1e-5
    )


def test_prompts_stay_whose_pass_rate_lies_between_the_bounds(tmp_path: Path, model: Path) -> None:
    # By an interpreter of its own, as a user's command starts it.
    answers = ["all", "none", *["even"] * 10]
    prompts = [
        {"messages": [{"role": "user", "content": f"Add {i}."}], "answer": answer, "id": f"p{i}", "source": "own"}
        for i, answer in enumerate(answers)
    ]
    prompts.append({"messages": [*prompts[0]["messages"], {"role": "assistant", "content": "Done."}], "id": "taught"})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = PrepareConfig(
        dir=str(tmp_path / "out"),
        stages=["collect", "difficulty"],
        data=DataConfig(sources=[SourceConfig(path=str(tmp_path / "prompts.jsonl"))], max_prompt_tokens=256, **PIXELS),
        difficulty=DifficultyConfig(model=str(model), dtype="float32", samples=6, max_tokens=64, low=0.2, high=0.9),
        rollout=RolloutConfig(stop=["e", "a", "1"]),
        reward=RewardConfig(rules={"own": "tests.ppo.parity:as_told"}),
    )
    prepare(config)
    tries = (tmp_path / "out/difficulty/tries.0.jsonl").read_text().splitlines()
    rights = {entry["key"]: entry["right"] for entry in map(json.loads, tries)}
    assert rights[0] == 6 and rights[1] == 0 and sorted(rights) == list(range(12))
    assert len({rights[i] for i in range(2, 12)}) > 1, "these depend on what was sampled"
    kept = {row["id"]: row for row in rows(tmp_path / "out/difficulty")}
    expected = {f"p{i}" for i, right in rights.items() if 0.2 <= right / 6 <= 0.9}
    assert set(kept) == expected | {"taught"} and 0 < len(expected) < 11
    for name in expected:
        rate = rights[int(name[1:])] / 6
        assert kept[name]["pass_rate"] == pytest.approx(rate, abs=1e-6)
        assert kept[name]["difficulty"] == pytest.approx(1 - rate, abs=1e-6)
    report = json.loads((tmp_path / "out/difficulty/report.json").read_text())
    assert report["dropped"]["too easy"] + report["dropped"]["too hard"] == 12 - len(expected)


@pytest.mark.usefixtures("forks")
def test_a_model_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    config = PrepareConfig(
        dir=str(tmp_path / "out"),
        stages=["collect", "proxy_loss"],
        data=DataConfig(sources=[SourceConfig(path="puzzle:digits?form=text")]),
        collect=CollectConfig(limit=3),
        proxy_loss=ProxyLossConfig(model=str(tmp_path / "nothing")),
    )
    with pytest.raises(ShapeError, match=r"nothing: there is no such folder"):
        prepare(config)
    assert not (tmp_path / "out").exists()
    (make_tiny_model(tmp_path / "nothing") / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="score: vLLM's process ended"):
        prepare(config)


def test_bounds() -> None:
    losses = np.array([1.0, 2.0, 3.0, np.nan, 4.0])
    assert bound(losses, ProxyLossConfig(min_rows=4, quantile=0.5)) == 2.5
    assert bound(losses, ProxyLossConfig(min_rows=4, cut="zscore", z=2.0)) == pytest.approx(2.5 + 2 * np.sqrt(1.25))
    assert bound(losses, ProxyLossConfig(min_rows=5)) == np.inf
