"""Answer rows outside of training: one batch of rows to a group of responses each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ovr_megatron.config import Sampling
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import Row
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime.exchange import gather_objects


@dataclass(frozen=True)
class Request:
    """A row to answer once for each of ``seeds``; its result belongs to ``key`` in the caller's journal.

    Requests of the same key have the same row.
    """

    key: int
    row: Row
    seeds: Sequence[int]
    sampling: Sampling


R = TypeVar("R", bound=Request)


def answer_rows(
    engine: RolloutEngine,
    processor: Processor,
    requests: Sequence[R],
    on_error: Callable[[int, dict[str, str]], None],
    on_result: Callable[[R, list[Generation]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[tuple[R, list[Generation]]]:
    """Generate the responses to a batch of rows.

    Args:
        engine: vLLM on this rank.
        processor: Turns rows into prompts.
        requests: The same on all ranks of a tensor-parallel group.
        on_error: Called with the key of a row whose prompt is too long, and ``{"error": reason}``.
        on_result: Called with a request and its responses as soon as all of these are there.
        should_stop: As of `RolloutEngine.answer`.

    Returns:
        Every request whose prompt is not too long, and its responses, in order.

    Raises:
        RowError: a row cannot be used.
        RolloutError: vLLM gave a request up.
        StopRequested: ``should_stop`` returned True.
    """
    samples = _encode_fitting(processor, {request.key: request.row for request in requests}, on_error)
    fitting = [request for request in requests if request.key in samples]
    prompts = []
    for request in fitting:
        sample = samples[request.key]
        prompts.append(Prompt(sample.prompt_tokens, sample.images, sample.videos, request.seeds, request.sampling))

    if not prompts:  # an engine without work is not woken
        return []

    def on_finished(index: int, responses: list[Generation]) -> None:
        if on_result:
            on_result(fitting[index], responses)

    return list(zip(fitting, engine.generate(prompts, on_finished, should_stop), strict=True))


def _encode_fitting(
    processor: Processor, rows: Mapping[int, Row], on_error: Callable[[int, dict[str, str]], None]
) -> dict[int, Sample]:
    """Return the samples of the rows whose prompts are not too long, by key, their images processed in one batch."""
    lengths = processor.lengths(list(rows.values()), generation=True)
    fitting: dict[int, Row] = {}
    for (key, row), length in zip(rows.items(), lengths, strict=True):
        # A prompt over the limit has an error in place of a length.
        if isinstance(length, TooLongError):
            on_error(key, {"error": f"{length.field}: {length.problem}"})
        else:
            fitting[key] = row
    return dict(zip(fitting, processor.encode(list(fitting.values()), generation=True), strict=True))


def sample_rows(
    engine: RolloutEngine, processor: Processor, rows: Sequence[Row], seeds: Sequence[int], sampling: Sampling, tp: int
) -> list[list[Generation]]:
    """Answer every row once for each seed, the rows balanced over the engines; return all on every rank.

    A collective of all ranks.

    Args:
        engine: vLLM on this rank.
        processor: Turns rows into prompts.
        rows: The same on all ranks, none too long.
        seeds: Of the responses to each row.
        sampling: How they are sampled.
        tp: Ranks that hold one engine.

    Raises:
        RowError: a row cannot be used.
        RolloutError: vLLM gave a request up.
    """
    replica, tp_rank = divmod(dist.get_rank(), tp)
    replicas = dist.get_world_size() // tp
    share = range(replica, len(rows), replicas)
    samples = processor.encode([rows[index] for index in share], generation=True)
    prompts = []
    for sample in samples:
        prompts.append(Prompt(sample.prompt_tokens, sample.images, sample.videos, list(seeds), sampling))
    responses = engine.generate(prompts) if prompts else []
    # The ranks of an engine have the same responses: its first one sends them.
    local = dict(zip(share, responses, strict=True)) if tp_rank == 0 else {}
    by_row: dict[int, list[Generation]] = {}
    for rank_responses in gather_objects(local):
        by_row |= rank_responses
    return [by_row[index] for index in range(len(rows))]
