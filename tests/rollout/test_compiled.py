"""vLLM with its model compiled on a CPU answers with the trainer's probabilities, before and after an update."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ovr_megatron.model.tiny import make_tiny_model
from ovr_megatron.rollout.engine import check_compiler
from ovr_megatron.rollout.sampling import RolloutError


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler")
def test_a_compiled_model_agrees_with_the_trainer(loaded_python: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", seed=3)
    options = ["prompts=4", "responses=2", "iterations=2", "algorithm.estimator=dr_grpo"]
    options += ["algorithm.critic_warmup_iterations=0", "curriculum=[{until: 9, max_tokens: 80}]", "optimizer.lr=1e-2"]
    options += [f"run.dir={tmp_path}/run", f"model.path={tmp_path}/model", "rollout.enforce_eager=false"]
    command = [str(loaded_python), "-m", "ovr_megatron.rl", "--config-name", "tiny_rl", *options]
    # vLLM's cache of compiled code is the test's: with that of an earlier run nothing would be compiled.
    environment = {**os.environ, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    subprocess.run(command, env=environment, check=True)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics/train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert all(0 < line["rollout/mismatch_max"] <= 1e-4 for line in lines)
    compiled = tmp_path / "cache/torch_compile_cache"
    assert list(compiled.rglob("*.cpp"))


def test_a_missing_compiler_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RolloutError, match="there is no no-such-compiler; install a C\\+\\+ compiler"):
        check_compiler()
