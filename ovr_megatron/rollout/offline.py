"""Answer rows outside of training: one batch of rows to a group of responses each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ovr_megatron.data.processing import Processor, TooLongError
from ovr_megatron.data.schema import Row
from ovr_megatron.rollout.engine import RolloutEngine
from ovr_megatron.rollout.sampling import Generation, Prompt


@dataclass(frozen=True)
class Request:
    """A row to answer once for each of ``seeds``; its result belongs to ``key`` in the caller's journal."""

    key: int
    row: Row
    seeds: Sequence[int]


def answer_rows(
    engine: RolloutEngine,
    processor: Processor,
    requests: Sequence[Request],
    temperature: float,
    max_tokens: int,
    on_error: Callable[[int, dict[str, str]], None],
) -> list[tuple[Request, list[Generation]]]:
    """Generate the responses to a batch of rows.

    Args:
        engine: vLLM on this rank.
        processor: Turns rows into prompts.
        requests: The same on all ranks of a tensor-parallel group.
        temperature: 0 takes the most likely token.
        max_tokens: Longest response, its end token included.
        on_error: Called with the key of a row whose prompt is too long, and ``{"error": reason}``.

    Returns:
        Every other request and its responses, in order.
    """
    prompts = []
    fitting = []
    for request in requests:
        try:
            [sample] = processor.encode([request.row], generation=True)
        except TooLongError as error:
            on_error(request.key, {"error": f"{error.field}: {error.problem}"})
            continue
        prompts.append(Prompt(sample.prompt_tokens, sample.images, sample.videos, request.seeds, max_tokens))
        fitting.append(request)
    return list(zip(fitting, engine.generate(prompts, temperature), strict=True))
