"""One copy of the model over two processes: each rank hands over full tensors, both give the same answers."""

import os
import pickle
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np

from ovr_megatron.rollout.sampling import banned_tokens

ROOT = Path(__file__).resolve().parents[2]


def test_tensor_parallel_engine_takes_full_tensors(make_reference, processor, samples, ask, tmp_path):
    old, new = make_reference(False, 5), make_reference(False, 6)
    job = {"old": old.folder, "new": new.folder, "data": processor.config, "prompts": ask(samples, [1, 2, 7])}
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "tests/rollout/two_ranks.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (pickle.loads((tmp_path / f"rank_{rank}.pickle").read_bytes()) for rank in range(2))
    banned = banned_tokens(processor.shape, processor.tokenizer)
    assert new.worst(samples, first, banned, 1.0) < 3e-5
    for a, b in zip(chain(*first), chain(*second), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
