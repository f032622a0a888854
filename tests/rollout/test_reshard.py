"""Weights of every layout into engines of one and two ranks: the same bits as an engine built from the folder."""

import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ovr_megatron.rollout.sampling import banned_tokens
from tests.ranks import launch

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4


@pytest.fixture
def remains() -> Iterator[None]:
    """Leave what a killed job leaves, the shared memory that vLLM names after the ranks alone; see that none is new."""
    shared = Path("/dev/shm")
    before = set(shared.glob("ovr-*"))
    paths = [Path(f"/dev/shm/-tp:0-[{ranks}]-cpushm_{rank}") for ranks in ("0-1", "2-3") for rank in (0, 1)]
    for path in paths:
        path.touch()
    yield
    for path in paths:
        path.unlink()
    deadline = time.monotonic() + 10  # an engine of another test may be starting
    while added := set(shared.glob("ovr-*")) - before:
        assert time.monotonic() < deadline, added
        time.sleep(0.1)


@pytest.mark.usefixtures("remains")
@pytest.mark.parametrize(
    ("family", "tp"), [("qwen2_5_vl", 1), ("qwen2_5_vl", 2), ("qwen3_vl", 2)], indirect=["family"], scope="module"
)
def test_an_updated_engine_is_a_fresh_one(family, tp, make_reference, processor, samples, ask, tmp_path):
    models = {tied: (make_reference(tied, 5), make_reference(tied, 6)) for tied in (True, False)}
    folders = {tied: (old.folder, new.folder) for tied, (old, new) in models.items()}
    job = {"tp": tp, "models": folders, "data": processor.config, "prompts": ask(samples[:4], [1, 7], 8)}
    job["layouts"] = None if family == "qwen2_5_vl" else ("zero", "tp, pp")
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    launch(ROOT / "tests/rollout/reshard.py", tmp_path, ranks=RANKS)
    ranks = [pickle.loads((tmp_path / f"rank_{rank}.pickle").read_bytes()) for rank in range(RANKS)]
    banned = banned_tokens(processor.shape, processor.tokenizer)
    for tied, (_, new) in models.items():
        fresh = [rank.pop(f"{tied} fresh") for rank in ranks]
        assert new.worst(samples[:4], fresh[0], banned, 1.0) < 3e-5
        for other in fresh[1:]:
            for ours, theirs in zip(fresh[0], other, strict=True):
                for a, b in zip(ours, theirs, strict=True):
                    np.testing.assert_array_equal(a.logprobs, b.logprobs)
        for rank in ranks:
            *updates, stayed = rank.pop(f"{tied} frozen")
            whole, later, woken = (update.copied + update.received for update in updates)
            assert later < whole == woken and stayed
        damage = [rank.pop(f"{tied} damage") for rank in ranks]
        assert "arrived changed" in damage[3] and not any(damage[:3])
    for rank in ranks:
        for name, (before, after, traffic, largest, steps) in rank.items():
            assert not before, f"{name}: the other weights give the same"
            assert after, name
            cut_alike = tp == 2 and name.endswith(" tp")
            needs_messages = not cut_alike and ("tp" in name or "pp" in name)
            assert (traffic.received > 0) == needs_messages == (steps > 3) and largest <= 0.25 * 2**20, name
