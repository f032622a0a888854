"""One rank of `test_two_ranks`: an engine over both ranks takes new weights and answers; ``two_ranks.py FOLDER``."""

import pickle
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from ovr_megatron.config import ParallelConfig, RolloutConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.runtime import distributed


def main(folder: Path) -> None:
    """Read ``job.pickle``, write ``rank_N.pickle``."""
    job = pickle.loads((folder / "job.pickle").read_bytes())
    world = distributed.start(ParallelConfig(tp=2), seed=1, threads=1)
    processor = Processor(job["old"], job["data"])
    engine = RolloutEngine(job["old"], RolloutConfig(tp=2, max_num_seqs=16), processor, "float32", 256)
    engine.generate(job["prompts"], 1.0)
    engine.update(load_file(job["new"] / "model.safetensors").items())
    (folder / f"rank_{world.rank}.pickle").write_bytes(pickle.dumps(engine.generate(job["prompts"], 1.0)))
    dist.barrier()
    distributed.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
