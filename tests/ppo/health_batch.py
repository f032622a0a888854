"""Metrics of a ragged batch of two sources, for tests/ppo/test_health.py: ``torchrun ... health_batch.py OUT``.

Responses are divided among the ranks as the data-parallel ranks of a run divide them, prompt by prompt.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ovr_megatron.config import AlgorithmConfig, ParallelConfig
from ovr_megatron.data.packing import blank_pack
from ovr_megatron.data.schema import Message, Row, TextPart
from ovr_megatron.model.scores import Scores
from ovr_megatron.ppo.advantage_histogram import advantage_metrics
from ovr_megatron.ppo.batch import Response
from ovr_megatron.ppo.measures import spread_metrics
from ovr_megatron.ppo.objectives import PolicyObjective
from ovr_megatron.ppo.prompts import Prompts
from ovr_megatron.ppo.rollouts import Rollout
from ovr_megatron.ppo.sources import response_sources
from ovr_megatron.ppo.update import source_metrics
from ovr_megatron.runtime import distributed
from ovr_megatron.runtime.layout import Layout

SOURCES = ("text", "image", "text")  # of each prompt
TOKENS = (  # of each response: prompt, reward, tokens
    (0, 1.0, [5, 6, 7, 5, 6, 7, 5, 6]),
    (0, 0.0, [9]),
    (1, 1.0, [1, 2, 3, 4]),
    (1, 1.0, [8, 8, 8, 8, 8, 8]),
    (2, 0.0, [3, 1, 4, 1, 5]),
    (2, 0.0, [2, 7]),
)


def advantages(index: int) -> np.ndarray:
    """Those of the tokens of a response."""
    _, reward, tokens = TOKENS[index]
    return (2 * reward - 1) * np.linspace(0.1, 1.0 + index, len(tokens))


def arrays(index: int) -> dict[str, np.ndarray]:
    """Ratio of the policies, log-probability of the old one, entropy, of each token of a response."""
    length = len(TOKENS[index][2])
    ratio = np.linspace(0.5, 1.6, length)
    return {"ratio": ratio, "old": np.full(length, -1.0), "entropy": np.linspace(0.0, 1.0 + index, length)}


def metrics(rank: int, ranks: int, layout: Layout) -> dict[str, float]:
    """Return the metrics over all ranks; this one has the prompts whose index leaves ``rank``.  A collective."""
    rows = [Row((Message("user", (TextPart("?"),)),), answer="1", source=name) for name in SOURCES]
    indices = [i for i, (prompt, *_) in enumerate(TOKENS) if prompt % ranks == rank]
    responses = []
    for i in indices:
        prompt, reward, tokens = TOKENS[i]
        responses.append(Response(prompt, i, tokens, np.zeros(len(tokens), np.float32), True, "", reward))
    prompts = Prompts([], None)
    prompts.rows = rows
    result = spread_metrics(Rollout(prompts, 10, responses))
    sources = response_sources(rows, responses)
    values, histogram = advantage_metrics([advantages(i) for i in indices], sources, layout)
    result |= values
    result["histogram"] = histogram.counts.tolist()
    objective = PolicyObjective(AlgorithmConfig(), sources=sources.names)
    # A pack for each response, and an empty one, as a rank without responses has it.
    for i, source in [*zip(indices, sources.token_indices([len(r.tokens) for r in responses]), strict=True), (-1, [])]:
        own = arrays(i) if i >= 0 else {name: np.zeros(0) for name in ("ratio", "old", "entropy")}
        own |= {"advantages": advantages(i) if i >= 0 else np.zeros(0), "sources": np.array(source)}
        tensors = {name: torch.tensor(value) for name, value in own.items()}
        extras = {"advantages": tensors["advantages"], "old_logprobs": tensors["old"], "sources": tensors["sources"]}
        extras["rollout_logprobs"] = tensors["old"] - 0.5
        length = len(source)
        bounds = torch.tensor([0, length], dtype=torch.int32)
        pack = replace(blank_pack(rows=max(length, 1)), cu_seqlens=bounds, extras=extras)
        logprobs = tensors["old"] + tensors["ratio"].log()
        objective(Scores(torch.arange(length), logprobs=logprobs, entropy=tensors["entropy"]), pack)
    return result | source_metrics(objective.source_means)


if __name__ == "__main__":
    world = distributed.start(ParallelConfig(), seed=1, threads=1)
    collected = metrics(world.rank, world.size, world.layout)
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(collected))
    dist.barrier()
    distributed.finish()
