"""Answer rows outside of training: one batch of rows to a group of responses each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ovr_megatron.config import Sampling
from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.samples import Sample
from ovr_megatron.data.schema import Row
from ovr_megatron.errors import UserError
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt
from ovr_megatron.runtime.exchange import call_on_all, gather_objects, raise_first
from ovr_megatron.runtime.work_barrier import WorkBarrier

_calls = itertools.count()  # of `sample_rows`: the same on all ranks


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
    processor: Processor,
    rows: Mapping[int, Row],
    on_error: Callable[[int, dict[str, str]], None],
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
    engine: RolloutEngine,
    processor: Processor,
    rows: Sequence[Row],
    seeds: Sequence[int],
    sampling: Sampling,
    tp: int,
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
        RowError: on all ranks, as a row cannot be used.
        RolloutError: on all ranks, as vLLM gave a request up.
    """
    replica, tp_rank = divmod(dist.get_rank(), tp)
    replicas = dist.get_world_size() // tp
    share = range(replica, len(rows), replicas)
    replica_rows = [rows[index] for index in share]
    # Before generation, in which the ranks of an engine make their steps together.
    samples = call_on_all(lambda: processor.encode(replica_rows, generation=True))
    prompts = []
    for sample in samples:
        prompts.append(Prompt(sample.prompt_tokens, sample.images, sample.videos, list(seeds), sampling))
    work = WorkBarrier(f"sample/{next(_calls)}")
    responses: list[list[Generation]] = []
    problem: UserError | None = None
    try:
        if prompts:
            responses = engine.generate(prompts, should_stop=lambda: work.engine_step(engine.agree))
    except UserError as error:
        problem = error
    # Engines take very different times, and some have no prompt: this waits for as long as any of them makes steps.
    work.wait()
    raise_first(problem)
    # The ranks of an engine have the same responses: its first one sends them.
    local = dict(zip(share, responses, strict=True)) if tp_rank == 0 else {}
    by_row: dict[int, list[Generation]] = {}
    for rank_responses in gather_objects(local):
        by_row |= rank_responses
    return [by_row[index] for index in range(len(rows))]
